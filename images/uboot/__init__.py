"""Our own U-Boot, from Debian's source package, for the targets ``qemu-arm64-sd*``.

What goes in is pinned in ``locks/uboot-src.lock`` (source files and cross tools: name, version,
SHA-256); the configuration fragment and the default environment are beside this file. All of it is
fetched through a private apt tree, checked, unpacked with ``dpkg-deb -x`` and ``dpkg-source -x``
and built as an ordinary user; nothing is installed. Same inputs give the same bytes: the time is
the package's, the builder's name is fixed and no path gets into the binary (checked). Results are
kept by the hash of all inputs, so that a second build only looks them up.

The host gives what ``build-essential`` has (make, gcc for U-Boot's own tools, dpkg-dev, patch).
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from images.apt import PrivateApt
from images.bootenv import parse_script
from images.errors import ImageError, PackageGoneError, ToolFailedError
from images.host import run
from images.locks import LOCK_DIR, LockedPackage
from images.progress import Reporter
from images.store import (
    exclusive,
    hash_inputs,
    remove_tree,
    sha256_file,
    sweep,
    temporary_directory,
    write_atomically,
)

HERE = Path(__file__).resolve().parent
LOCK_FILE = LOCK_DIR / "uboot-src.lock"
CONFIG_FRAGMENT = HERE / "qemu-arm64-sd.config"
DEFAULT_ENVIRONMENT = HERE / "qemu-arm64-sd.env"
PATCHES = (HERE / "no-mkimage.patch",)
DEFAULT_CACHE = HERE.parent.parent / ".cache"

SUITE = "bookworm"
SOURCE_PACKAGE = "u-boot"
BOARD_DEFCONFIG = "qemu_arm64_defconfig"
CROSS_PREFIX = "aarch64-linux-gnu-"
BUILD_TIMEOUT_S = 1800.0
RECIPE_VERSION = 2
"""Part of the cache key: raise it when this file builds differently from the same inputs."""

TOOL_PACKAGES = (
    "binutils-aarch64-linux-gnu",
    "bison",
    "cpp-12-aarch64-linux-gnu",
    "flex",
    "gcc-12-aarch64-linux-gnu",
    "libgcc-12-dev-arm64-cross",
    "libgmp10",
    "libisl23",
    "libjansson4",
    "libmpc3",
    "libmpfr6",
    "libzstd1",
    "m4",
    "zlib1g",
)
"""Cross compiler and build tools. libc comes from the host: Debian 12's or newer."""

HOST_PROGRAMS = ("dpkg-source", "gcc", "make", "patch", "perl")

_RELOCK = "python -m images.uboot lock"


class UbootError(ImageError):
    """The boot loader could not be built; the text is one line that says what to do."""


@dataclass(frozen=True)
class Locked:
    """One pinned input.

    Attributes:
        kind: ``source`` (a file of the source package) or ``tool`` (a Debian package).
        name: the file's or the package's name.
        version: Debian's version, with epoch.
        sha256: of the file, in hexadecimal.
    """

    kind: str
    name: str
    version: str
    sha256: str


@dataclass(frozen=True)
class UbootBuild:
    """A built boot loader.

    Attributes:
        binary: ``u-boot.bin``, in the cache.
        key: hash of all inputs.
        sha256: of the binary.
        size_bytes: of the binary.
        manifest: what it was built from.
        cached: it was found, not built.
    """

    binary: Path
    key: str
    sha256: str
    size_bytes: int
    manifest: Mapping[str, object]
    cached: bool


def default_environment(source: Path = DEFAULT_ENVIRONMENT) -> dict[str, str]:
    """The variables that are built into the binary."""
    return parse_script(source.read_text("utf-8"), {})


def stored_environment(source: Path = DEFAULT_ENVIRONMENT) -> dict[str, str]:
    """What a card's two copies start with: the built-in variables, marked as read from there."""
    return default_environment(source) | {"bo_env": "1"}


# --- lock file -------------------------------------------------------------------------------


def read_lock(path: Path = LOCK_FILE) -> tuple[Locked, ...]:
    """Read a lock file: a line is ``kind name version sha256``; ``#`` begins a comment.

    Raises:
        UbootError: it is missing, malformed or lacks something.
    """
    if not path.exists():
        raise UbootError(f"{path}: no lock file; make one with: {_RELOCK}")
    entries = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        fields = line.split("#", maxsplit=1)[0].split()
        if not fields:
            continue
        sound = len(fields) == 4 and fields[0] in {"source", "tool"}
        if not sound or not re.fullmatch(r"[0-9a-f]{64}", fields[3]):
            raise UbootError(f"{path}:{number}: not 'source|tool name version sha256'")
        entries.append(Locked(*fields))
    missing = set(TOOL_PACKAGES) - {entry.name for entry in entries if entry.kind == "tool"}
    if missing or not any(entry.name.endswith(".dsc") for entry in entries):
        what = ", ".join(sorted(missing)) or "the source package"
        raise UbootError(f"{path}: {what} not locked; re-lock with: {_RELOCK}")
    return tuple(entries)


def write_lock(cache: Path = DEFAULT_CACHE, path: Path = LOCK_FILE) -> tuple[Locked, ...]:
    """Lock what the archive offers now.

    Raises:
        ImageError: the archive can't be reached or lacks something.
    """
    place = cache / "uboot"
    with exclusive(place / ".lock", "building U-Boot"), temporary_directory(place) as scratch:
        apt = _SourceApt(place / "apt", "amd64", SUITE)
        version = apt.source_candidate(SOURCE_PACKAGE)
        entries = [
            Locked("source", file.name, version, sha256_file(file))
            for file in apt.download_source(SOURCE_PACKAGE, version, scratch)
        ]
        tools = apt.resolve(TOOL_PACKAGES, ())
        entries += [Locked("tool", p.name, p.version, p.sha256) for p in tools.packages]
    lines = ["# Inputs of our U-Boot build: kind, name, version, SHA-256 of the file."]
    lines.append(f"# Made by: {_RELOCK}")
    lines += [f"{e.kind} {e.name} {e.version} {e.sha256}" for e in entries]
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return tuple(entries)


# --- fetching --------------------------------------------------------------------------------


class _SourceApt(PrivateApt):
    """The private apt with the sources of packages too (the machine's may lack ``deb-src``)."""

    def _prepare(self) -> None:
        super()._prepare()
        file = self._directory / "machine.sources"
        text = re.sub(r"(?im)^types: deb$", "types: deb deb-src", file.read_text("utf-8"))
        file.write_text(text, "utf-8")

    def source_candidate(self, package: str) -> str:
        """The newest version of a source package that the archive has now."""
        self.update()
        text = self._run("apt-cache", "showsrc", "--only-source", package, may_fail=True)
        versions: list[str] = re.findall(r"^Version: (\S+)$", text, re.MULTILINE)
        if not versions:
            raise UbootError(f"Debian {self.suite} has no source package {package}")
        newest = versions[0]
        for version in versions[1:]:
            comparison = ["dpkg", "--compare-versions", version, "gt", newest]
            if run(comparison, may_fail=True).returncode == 0:
                newest = version
        return newest

    def download_source(self, package: str, version: str, directory: Path) -> list[Path]:
        """Fetch a source package's .dsc and tarballs; their names, sorted."""
        self.update()
        directory.mkdir(parents=True, exist_ok=True)
        wanted = f"{package}={version}"
        command = ["apt-get", "-q", "--download-only", "--only-source", "source", wanted]
        try:
            self._run(*command, cwd=directory)
        except ToolFailedError as error:
            if re.search(r"Unable to find|was not found|404", str(error)):
                raise UbootError(
                    f"the archive no longer has the source package {wanted}: "
                    f"lock what it has now with: {_RELOCK}"
                ) from error
            raise
        return sorted(directory.iterdir())


def _fetch(entries: Sequence[Locked], cache: Path, reporter: Reporter) -> dict[Locked, Path]:
    """Every locked file, from the cache or the archive, with its hash verified."""
    place = cache / "uboot"
    apt = _SourceApt(place / "apt", "amd64", SUITE)
    sources = {e: place / "files" / e.sha256 for e in entries if e.kind == "source"}
    tools = {e: cache / "debs" / f"{e.sha256}.deb" for e in entries if e.kind == "tool"}
    if not all(_is(file, entry) for entry, file in sources.items()):
        with reporter.step("fetching U-Boot's source"), temporary_directory(place) as scratch:
            version = next(iter(sources)).version
            found = {file.name: file for file in apt.download_source("u-boot", version, scratch)}
            for entry, file in sources.items():
                if entry.name not in found or not _is(found[entry.name], entry):
                    raise UbootError(
                        f"{entry.name} is not the locked file (SHA-256 {entry.sha256[:12]}…), not "
                        f"used; if the change is right, re-lock with: {_RELOCK}"
                    )
                file.parent.mkdir(exist_ok=True)
                found[entry.name].replace(file)
    missing = [entry for entry, file in tools.items() if not _is(file, entry)]
    if missing:
        packages = [LockedPackage(e.name, e.version, e.sha256) for e in missing]
        try:
            with exclusive(cache / "debs" / ".lock", "the package cache"):
                apt.download(packages, cache / "debs", reporter)
        except PackageGoneError as error:
            raise UbootError(
                f"the archive no longer has {', '.join(error.packages[:3])}: "
                f"lock what it has now with: {_RELOCK}"
            ) from error
    return {**sources, **tools}


def _is(file: Path, entry: Locked) -> bool:
    """A damaged file in the cache is fetched again, never used."""
    return file.is_file() and sha256_file(file) == entry.sha256


# --- toolchain -------------------------------------------------------------------------------


def _toolchain(tools: Mapping[Locked, Path], cache: Path, reporter: Reporter) -> Path:
    """Unpack the cross tools once; what to put on PATH is in its ``bin``."""
    key = hash_inputs(
        [(f"recipe {RECIPE_VERSION}", ""), *((e.name, e.sha256) for e in sorted(tools, key=str))]
    )
    final = cache / "uboot" / f"toolchain-{key[:16]}"
    if final.exists():
        return final
    with (
        reporter.step("unpacking the cross compiler"),
        temporary_directory(cache / "uboot") as scratch,
    ):
        root = scratch / "toolchain"
        root.mkdir()
        for deb in tools.values():
            run(["dpkg-deb", "-x", deb, root])
        _write_wrappers(root, final)
        root.rename(final)
    return final


def _write_wrappers(root: Path, final: Path) -> None:
    """Small scripts in ``bin`` that start the unpacked tools with the unpacked libraries.

    Only they see those libraries: the host's compiler keeps its own.
    """
    programs = {p.name: p.name for p in (root / "usr/bin").glob(f"{CROSS_PREFIX}*")}
    programs[f"{CROSS_PREFIX}gcc"] = f"{CROSS_PREFIX}gcc-12"
    programs |= {name: name for name in ("bison", "flex", "m4")}
    (root / "bin").mkdir()
    libraries = f"{final}/usr/lib/x86_64-linux-gnu:{final}/lib/x86_64-linux-gnu"
    for name, target in sorted(programs.items()):
        script = root / "bin" / name
        script.write_text(
            "#!/bin/sh\n"
            f"LD_LIBRARY_PATH='{libraries}' M4='{final}/usr/bin/m4' "
            f"BISON_PKGDATADIR='{final}/usr/share/bison' "
            f"exec '{final}/usr/bin/{target}' \"$@\"\n",
            "utf-8",
        )
        script.chmod(0o755)
    # U-Boot's build uses xxd for one thing: bytes of stdin as a C initialiser.
    xxd = root / "bin" / "xxd"
    xxd.write_text("#!/bin/sh\nod -An -v -tx1 | sed 's/[0-9a-f][0-9a-f]/0x&,/g'\n", "utf-8")
    xxd.chmod(0o755)


# --- building --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What shapes the binary besides the locked files.

    Attributes:
        fragment: configuration on top of the board's.
        environment: source of the default environment.
        extra: further configuration lines (a planted flaw).
    """

    fragment: Path = CONFIG_FRAGMENT
    environment: Path = DEFAULT_ENVIRONMENT
    extra: tuple[str, ...] = ()

    @property
    def configuration(self) -> str:
        """The fragment with the further lines."""
        return self.fragment.read_text("utf-8") + "".join(f"{line}\n" for line in self.extra)


def build_key(inputs: Inputs | None = None, lock_file: Path = LOCK_FILE) -> str:
    """Hash of everything that goes into the binary.

    Raises:
        UbootError: the lock file or an input is missing or malformed.
    """
    chosen = inputs or Inputs()
    for file in (chosen.fragment, chosen.environment, *PATCHES):
        if not file.is_file():
            raise UbootError(f"{file}: no such file")
    return hash_inputs(
        (
            ("recipe", str(RECIPE_VERSION)),
            ("lock", "\n".join(map(str, read_lock(lock_file)))),
            ("configuration", chosen.configuration),
            ("environment", chosen.environment.read_bytes()),
            *((patch.name, patch.read_bytes()) for patch in PATCHES),
        )
    )[:16]


def build(
    cache: Path = DEFAULT_CACHE,
    *,
    inputs: Inputs | None = None,
    lock_file: Path = LOCK_FILE,
    reporter: Reporter | None = None,
    force: bool = False,
) -> UbootBuild:
    """Build U-Boot, or find it in the cache; ``force`` builds anyway (to compare the bytes).

    Raises:
        ImageError: one line. After a failed compilation it names the log, ``uboot/build.log`` in
            the cache.
    """
    chosen = inputs or Inputs()
    say = reporter or Reporter()
    key = build_key(chosen, lock_file)
    kept = cache / "uboot" / f"u-boot-{key}"
    if not force and (kept / "manifest.json").exists():
        return _result(kept, key, cached=True)
    _check_host()
    with exclusive(cache / "uboot" / ".lock", "building U-Boot", BUILD_TIMEOUT_S):
        if not force and (kept / "manifest.json").exists():
            return _result(kept, key, cached=True)
        sweep(cache / "uboot")
        entries = read_lock(lock_file)
        files = _fetch(entries, cache, say)
        tools = _toolchain({e: f for e, f in files.items() if e.kind == "tool"}, cache, say)
        with temporary_directory(cache / "uboot") as scratch:
            tree = _unpack(files, scratch, chosen, say)
            _compile(tree, tools, chosen, cache / "uboot" / "build.log", say)
            _store(tree, kept, entries, key)
    return _result(kept, key, cached=False)


def _check_host() -> None:
    missing = [name for name in HOST_PROGRAMS if shutil.which(name) is None]
    if missing:
        raise UbootError(
            f"building U-Boot needs {', '.join(missing)}: run `apt-get install build-essential`"
        )
    machine = os.uname().machine
    if machine != "x86_64":
        raise UbootError(f"the locked cross compiler runs on x86_64, this machine is {machine}")


def _unpack(files: Mapping[Locked, Path], scratch: Path, inputs: Inputs, say: Reporter) -> Path:
    """The patched source tree with our configuration and environment in it."""
    with say.step("unpacking U-Boot's source"):
        sources = scratch / "files"
        sources.mkdir()
        for entry, file in files.items():
            if entry.kind == "source":
                (sources / entry.name).symlink_to(file.absolute())
        (dsc,) = sources.glob("*.dsc")
        tree = scratch / "u-boot"
        # --no-check: each file's SHA-256 was compared with the lock just now.
        run(["dpkg-source", "--no-check", "--no-copy", "-x", dsc, tree])
        for patch in PATCHES:
            run(["patch", "-d", tree, "-p1", "-i", patch])
    variables = default_environment(inputs.environment)
    text = "".join(f"{name}={value}\n" for name, value in variables.items())
    (tree / "brownout.env").write_text(text, "utf-8")
    board = (tree / "configs" / BOARD_DEFCONFIG).read_text("utf-8")
    (tree / "configs" / "brownout_defconfig").write_text(board + inputs.configuration, "utf-8")
    return tree


def _compile(tree: Path, tools: Path, inputs: Inputs, log: Path, say: Reporter) -> None:
    """Configure and build in ``tree``."""
    epoch = _package_time(tree / "debian" / "changelog")
    settings = {
        "PATH": f"{tools / 'bin'}:{os.environ.get('PATH', os.defpath)}",
        "HOME": str(tree.parent),
        "LC_ALL": "C",
        "TZ": "UTC",
        "SOURCE_DATE_EPOCH": str(epoch),
        "KBUILD_BUILD_USER": "brownout",
        "KBUILD_BUILD_HOST": "brownout",
        "KBUILD_BUILD_TIMESTAMP": f"@{epoch}",
        # The environment is on a card behind PCI: scan PCI before the environment is read.
        "KCPPFLAGS": "-DCONFIG_SYS_EARLY_PCI_INIT",
        "KCFLAGS": f"-ffile-prefix-map={tree}=.",
    }
    command = ["make", "-s", f"-j{os.cpu_count() or 1}", f"CROSS_COMPILE={CROSS_PREFIX}"]
    log.write_bytes(b"")
    with say.step("configuring U-Boot"):
        _make([*command, "brownout_defconfig"], tree, settings, log)
        _check_config(inputs, tree / ".config")
    with say.step("compiling U-Boot"):
        _make([*command, "u-boot.bin"], tree, settings, log)
    if str(tree.parent).encode() in (tree / "u-boot.bin").read_bytes():
        raise UbootError("the built u-boot.bin holds the build directory's path: not used")


def _package_time(changelog: Path) -> int:
    match = re.search(r"^ -- .*>  (.+)$", changelog.read_text("utf-8"), re.MULTILINE)
    if match is None:
        raise UbootError("the source package's changelog has no date")
    return int(email.utils.parsedate_to_datetime(match[1]).timestamp())


def _check_config(inputs: Inputs, config: Path) -> None:
    """Kconfig drops silently what it doesn't know or can't have: compare what was asked for."""
    result = set(config.read_text("utf-8").splitlines())
    known = {line.split("=", maxsplit=1)[0] for line in result}
    asked: dict[str, str] = {}
    for line in inputs.configuration.splitlines():
        match = re.match(r"(?:# )?(CONFIG_\w+)(?:=| is not set$)", line)
        if match:
            asked[match[1]] = line
        elif line.strip() and not line.startswith("#"):
            raise UbootError(f"{inputs.fragment.name}: {line!r} is no configuration line")
    for name, line in asked.items():
        if (name in known) if line.startswith("#") else (line not in result):
            raise UbootError(
                f"{inputs.fragment.name}: U-Boot's configuration does not take {line!r}"
            )


def _make(command: list[str], tree: Path, settings: Mapping[str, str], log: Path) -> None:
    with log.open("ab") as output:
        try:
            done = subprocess.run(
                command,
                cwd=tree,
                env=settings,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=BUILD_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UbootError(f"make: no end after {BUILD_TIMEOUT_S:.0f} s; log: {log}") from error
    if done.returncode:
        lines = log.read_text("utf-8", "replace").splitlines()
        telling = re.compile(r"\berror:|undefined reference|No rule|not found|\*\*\*")
        found = [line.strip() for line in lines if telling.search(line)]
        first = found[0][:160] if found else f"exit code {done.returncode}"
        raise UbootError(f"U-Boot does not build: {first}; log: {log}")


def _store(tree: Path, kept: Path, entries: Sequence[Locked], key: str) -> None:
    """Put the result into the cache: complete or not at all."""
    fresh = tree.parent / "kept"
    fresh.mkdir()
    shutil.copyfile(tree / "u-boot.bin", fresh / "u-boot.bin")
    shutil.copyfile(tree / ".config", fresh / "u-boot.config")
    binary = fresh / "u-boot.bin"
    manifest = {
        "bootloader": "uboot",
        "key": key,
        "u-boot.bin": {"sha256": sha256_file(binary), "size": binary.stat().st_size},
        "inputs": [vars(entry) for entry in entries],
    }
    (fresh / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    remove_tree(kept)
    fresh.rename(kept)


def _result(kept: Path, key: str, *, cached: bool) -> UbootBuild:
    binary = kept / "u-boot.bin"
    try:
        manifest = json.loads((kept / "manifest.json").read_text("utf-8"))
        wanted, size = manifest["u-boot.bin"]["sha256"], manifest["u-boot.bin"]["size"]
        sound = hashlib.sha256(binary.read_bytes()).hexdigest() == wanted
    except (OSError, ValueError, KeyError):
        sound = False
    if not sound:
        raise UbootError(f"{kept} is damaged: delete it and build again")
    return UbootBuild(binary, key, wanted, size, manifest, cached)
