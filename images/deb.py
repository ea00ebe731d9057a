"""The update client's Debian package, built from the tree: without root, always the same bytes.

What is in it: the client's Python files (not the server's), and what `images/package/root` holds:
launcher, systemd units, SysV init script, documentation. The images install this same package, so
what the scenarios cut the power of is what a user installs. `dpkg-deb` does the packing; debhelper
would add nothing here but its own build dependencies. Python's bytecode is not part of it: the
package's postinst compiles on the device, the image builder compiles for its target.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import tomllib
from pathlib import Path

from images.errors import ImageError
from images.host import run
from images.recipe import HERE
from images.tree import client_files, normalise

PACKAGE_DIR = HERE / "package"
TIMESTAMP = 1_700_000_000
_LIBRARY = "usr/lib/python3/dist-packages/updater"


def package_version(repository: Path = HERE.parent) -> str:
    """The version in pyproject.toml; ImageError when there is none that dpkg would take."""
    try:
        with (repository / "pyproject.toml").open("rb") as file:
            version = str(tomllib.load(file)["project"]["version"])
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise ImageError(f"pyproject.toml: no version for the package ({error})") from error
    if not re.fullmatch(r"[0-9][A-Za-z0-9.+~]*", version):
        raise ImageError(f"pyproject.toml: version {version!r} is none for a Debian package")
    return version


def build_deb(
    directory: Path,
    *,
    updater: Path = HERE.parent / "updater",
    timestamp: int = TIMESTAMP,
    compression: str = "xz",
) -> Path:
    """Build `updater_VERSION_all.deb` in `directory`, replacing one that is there.

    Args:
        directory: where; made if needed.
        updater: the client's package folder.
        timestamp: time of every file, in seconds.
        compression: dpkg-deb's: "xz", or "none" where it is unpacked again at once.

    Raises:
        ImageError: there is no client, or dpkg-deb failed.
    """
    version = package_version()
    directory.mkdir(parents=True, exist_ok=True)
    output = directory / f"updater_{version}_all.deb"
    with tempfile.TemporaryDirectory(prefix=".deb-", dir=directory) as scratch:
        tree = Path(scratch) / "tree"
        _stage(tree, updater)
        size_kib = sum(f.stat().st_size + 1023 >> 10 for f in tree.rglob("*") if f.is_file())
        _control(tree / "DEBIAN", {"VERSION": version, "SIZE": str(size_kib)})
        normalise(tree, timestamp)
        made = Path(scratch) / output.name
        run(
            # One thread: with several, the bytes depend on the machine's number of cores.
            ["dpkg-deb", "--root-owner-group", f"-Z{compression}", "--threads-max=1", "--build",
             tree, made],
            env={"SOURCE_DATE_EPOCH": str(timestamp)},
        )  # fmt: skip
        made.replace(output)
    return output


def install_client(root: Path, updater: Path, timestamp: int) -> None:
    """Unpack the client's package into an image's tree. Raises ImageError."""
    with tempfile.TemporaryDirectory(prefix="updater-deb-") as scratch:
        deb = build_deb(Path(scratch), updater=updater, timestamp=timestamp, compression="none")
        run(["dpkg-deb", "-x", deb, root])


def _stage(tree: Path, updater: Path) -> None:
    shutil.copytree(PACKAGE_DIR / "root", tree)
    for relative, file in client_files(updater):
        target = tree / _LIBRARY / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        with file.open("rb") as content:
            target.chmod(0o755 if content.read(2) == b"#!" else 0o644)


def _control(directory: Path, values: dict[str, str]) -> None:
    directory.mkdir()
    for source in sorted((PACKAGE_DIR / "control").iterdir()):
        target = directory / source.name.removesuffix(".in")
        text = source.read_text()
        for name, value in values.items():
            text = text.replace(f"@{name}@", value)
        target.write_text(text)
        target.chmod(0o755 if text.startswith("#!") else 0o644)
