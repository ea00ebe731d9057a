"""A private apt: this machine's package sources, another architecture, and state of its own.

The host's apt state is never read or changed: lists, caches and the (empty) dpkg status live below
a directory of ours, which also makes it work without privileges. What is taken from the machine
are its sources (`/etc/apt/sources.list` and `sources.list.d`, both formats, see sources.list(5))
as far as they serve the wanted Debian suite, its trusted keys, and its apt.conf (proxies,
mirrors). Dependencies are not resolved here: recipes name every package they want, and the builder
checks the result (see `images.elf`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from images.errors import DownloadFailedError, LockError, PackageGoneError, ToolFailedError
from images.host import run
from images.locks import Lock, LockedPackage
from images.progress import Reporter
from images.store import exclusive, sha256_file, temporary_directory

# Packages per call of apt: few calls, since each reads all lists, but enough to show progress.
_BATCH = 8

SOURCES = (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d"))


@dataclass(frozen=True)
class Candidate:
    """A package as the archive has it now.

    Attributes:
        package: name, version and SHA-256.
        depends: the raw Depends field.
        size: of the .deb, in bytes.
    """

    package: LockedPackage
    depends: str
    size: int


def select_sources(texts: Iterable[tuple[str, str]], suite: str) -> str:
    """The machine's sources as far as they serve `suite`, as one deb822 document.

    Args:
        texts: (file name, content); names ending in `.sources` are deb822, others one-line.
        suite: Debian's code name; its `-updates` and `-security` siblings are taken too.
    """
    wanted = {suite, f"{suite}-updates", f"{suite}-security"}
    stanzas: list[str] = []
    for name, text in texts:
        if name.endswith(".sources"):
            stanzas += _deb822_stanzas(text, wanted)
        else:
            stanzas += _one_line_stanzas(text, wanted)
    return "\n\n".join(stanzas) + "\n" if stanzas else ""


def _deb822_stanzas(text: str, wanted: set[str]) -> list[str]:
    stanzas = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        fields: dict[str, list[str]] = {}
        key = ""
        for line in lines:
            if line[:1] in (" ", "\t"):
                fields.setdefault(key, []).append(line)
            elif ":" in line:
                key, _, value = line.partition(":")
                key = key.strip().lower()
                fields[key] = [value.strip()]
        suites = " ".join(fields.get("suites", [])).split()
        kept = [name for name in suites if name in wanted]
        enabled = " ".join(fields.get("enabled", ["yes"])).strip().lower()
        if not kept or enabled in ("no", "false", "0"):
            continue
        # "Architectures" would hide the foreign one; dep-11 and sources aren't needed.
        fields = {
            **{k: v for k, v in fields.items() if k not in ("architectures", "enabled")},
            "types": ["deb"],
            "suites": [" ".join(kept)],
        }
        stanzas.append("\n".join(f"{k}: " + "\n".join(v) for k, v in fields.items()))
    return stanzas


def _one_line_stanzas(text: str, wanted: set[str]) -> list[str]:
    pattern = re.compile(r"^deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<rest>.+)$")
    stanzas = []
    for raw in text.splitlines():
        match = pattern.match(raw.split("#", 1)[0].strip())
        if match is None:
            continue
        suite, *components = match["rest"].split()
        if suite not in wanted:
            continue
        lines = ["types: deb", f"uris: {match['uri']}", f"suites: {suite}"]
        lines.append("components: " + " ".join(components))
        for option in (match["options"] or "").split():
            key, _, value = option.partition("=")
            if key.lower() not in ("arch", "lang", "target"):
                lines.append(f"{key}: {value.replace(',', ' ')}")
        stanzas.append("\n".join(lines))
    return stanzas


def _machine_sources() -> list[tuple[str, str]]:
    texts = []
    for place in SOURCES:
        files = sorted(place.iterdir()) if place.is_dir() else [place]
        for file in files:
            if file.is_file() and file.suffix in (".list", ".sources"):
                texts.append((file.name, file.read_text(encoding="utf-8", errors="replace")))
    return texts


class PrivateApt:
    """apt for one architecture, with all of its state below `directory`."""

    def __init__(self, directory: Path, architecture: str, suite: str) -> None:
        self.architecture = architecture
        self.suite = suite
        self._directory = directory.absolute()
        self._config = self._directory / "apt.conf"
        self._updated = False

    def _prepare(self) -> None:
        for name in ("state/lists/partial", "cache/archives/partial"):
            (self._directory / name).mkdir(parents=True, exist_ok=True)
        (self._directory / "state/status").touch()
        sources = select_sources(_machine_sources(), self.suite)
        if not sources:
            raise DownloadFailedError(
                f"no source in /etc/apt serves Debian {self.suite}: add one to "
                "/etc/apt/sources.list.d (any architecture will do)"
            )
        (self._directory / "machine.sources").write_text(sources, encoding="utf-8")
        root = str(self._directory)
        settings = {
            "Dir::State": f"{root}/state",
            "Dir::State::status": f"{root}/state/status",
            "Dir::Cache": f"{root}/cache",
            "Dir::Etc::sourcelist": f"{root}/machine.sources",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "APT::Architecture": self.architecture,
            "APT::Sandbox::User": "",
            "APT::Get::List-Cleanup": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": "2",
            "Acquire::http::Timeout": "30",
            # Without the host's hooks and extra targets (command-not-found, AppStream).
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
            "Acquire::IndexTargets::deb::CNF::DefaultEnabled": "false",
        }
        text = "".join(f'{key} "{value}";\n' for key, value in settings.items())
        text += f'#clear APT::Architectures;\nAPT::Architectures {{ "{self.architecture}"; }};\n'
        text += "#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n"
        text += "#clear DPkg::Post-Invoke;\n"
        self._config.write_text(text, encoding="utf-8")

    def _run(self, *command: str, cwd: Path | None = None, may_fail: bool = False) -> str:
        env = {"APT_CONFIG": str(self._config), "HOME": str(self._directory)}
        return run(command, env=env, cwd=cwd, timeout_s=600, may_fail=may_fail).stdout

    def update(self) -> None:
        """Fetch the archive's lists, once per object.

        Raises:
            DownloadFailedError: the archive can't be reached or its signature is wrong.
        """
        if self._updated:
            return
        self._prepare()
        try:
            self._run("apt-get", "-o", "APT::Update::Error-Mode=any", "update")
        except ToolFailedError as error:
            raise DownloadFailedError(f"fetching Debian's package lists: {error}") from error
        self._updated = True

    def candidates(self, names: Sequence[str]) -> dict[str, Candidate]:
        """What the archive has now for each name; absent names are absent from the result."""
        self.update()
        stanzas = self._show("--no-all-versions", *names)
        found: dict[str, Candidate] = {}
        for fields in stanzas:
            package = LockedPackage(fields["Package"], fields["Version"], fields["SHA256"])
            found[package.name] = Candidate(package, fields.get("Depends", ""), int(fields["Size"]))
        return {name: found[name] for name in names if name in found}

    def _show(self, *arguments: str) -> list[dict[str, str]]:
        """The control fields of packages; what the archive doesn't have is left out."""
        text = self._run("apt-cache", "--quiet=0", "show", *arguments, may_fail=True)
        pattern = re.compile(r"^([A-Za-z0-9-]+): (.*)$", re.MULTILINE)
        stanzas = [dict(pattern.findall(stanza)) for stanza in text.split("\n\n")]
        return [fields for fields in stanzas if "SHA256" in fields]

    def resolve(self, names: Iterable[str], metapackages: Iterable[str]) -> Lock:
        """Lock the present versions of `names`, and of what each metapackage stands for.

        Raises:
            LockError: the archive has no such package.
            DownloadFailedError: the archive can't be reached.
        """
        metas = sorted(set(metapackages))
        aliases: dict[str, str] = {}
        for meta, candidate in self.candidates(metas).items():
            aliases[meta] = candidate.depends.split(",")[0].split()[0]
        wanted = sorted((set(names) - set(metas)) | set(aliases.values()))
        found = self.candidates(wanted)
        missing = sorted((set(metas) - set(aliases)) | (set(wanted) - set(found)))
        if missing:
            raise LockError(
                f"Debian {self.suite} has no package {', '.join(missing)} for {self.architecture}"
            )
        packages = tuple(sorted(candidate.package for candidate in found.values()))
        return Lock(self.architecture, packages, tuple(sorted(aliases.items())))

    def download(self, packages: Sequence[LockedPackage], cache: Path, reporter: Reporter) -> int:
        """Fetch packages into the cache, where a .deb is called by its SHA-256.

        Returns:
            The number of bytes fetched.

        Raises:
            PackageGoneError: the archive no longer has a locked version, or has other bytes for it.
            DownloadFailedError: the archive can't be reached.
        """
        self.update()
        self._refuse_gone(packages)
        wanted = {package.sha256: package for package in packages}
        fetched = 0
        with reporter.step("fetching packages") as step, temporary_directory(cache) as scratch:
            for first in range(0, len(packages), _BATCH):
                batch = packages[first : first + _BATCH]
                step.update(first, len(packages), batch[0].name)
                names = [f"{package.name}={package.version}" for package in batch]
                try:
                    self._run("apt-get", "download", *names, cwd=scratch)
                except ToolFailedError as error:
                    raise DownloadFailedError(f"fetching {names[0]} and others: {error}") from error
            for deb in scratch.glob("*.deb"):
                digest = sha256_file(deb)
                if wanted.pop(digest, None) is not None:
                    fetched += deb.stat().st_size
                    deb.replace(cache / f"{digest}.deb")
            step.update(len(packages), len(packages), f"{fetched / 1e6:.1f} MB")
        if wanted:
            left = tuple(f"{package.name}={package.version}" for package in wanted.values())
            raise DownloadFailedError(
                f"apt gave other bytes than were locked for {', '.join(left)}"
            )
        return fetched

    def _refuse_gone(self, packages: Sequence[LockedPackage]) -> None:
        names = [f"{package.name}={package.version}" for package in packages]
        present = {fields["SHA256"] for fields in self._show(*names)}
        gone = tuple(
            f"{package.name}={package.version}"
            for package in packages
            if package.sha256 not in present
        )
        if gone:
            raise PackageGoneError(gone, self.architecture)


def fetch(
    apt: PrivateApt, packages: Iterable[LockedPackage], cache: Path, reporter: Reporter
) -> dict[str, Path]:
    """The .deb of each package, from the cache or else from the archive.

    Raises:
        PackageGoneError: as `PrivateApt.download`.
        DownloadFailedError: as `PrivateApt.download`.
    """
    wanted = {package.name: package for package in packages}
    cache.mkdir(parents=True, exist_ok=True)
    with exclusive(cache / ".lock", "the package cache"):
        missing = [p for p in wanted.values() if not (cache / f"{p.sha256}.deb").is_file()]
        if missing:
            apt.download(missing, cache, reporter)
    return {name: cache / f"{package.sha256}.deb" for name, package in wanted.items()}
