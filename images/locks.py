"""Lock files: which Debian packages an image is made of, by version and SHA-256.

One file per architecture (`images/locks/<architecture>.lock`) serves every recipe of that
architecture, so that targets share downloads. A line is `name version sha256`; `#` starts a
comment. There are no addresses: where a package comes from is the business of the machine's apt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from images.errors import LockError
from images.store import write_atomically

LOCK_DIR = Path(__file__).parent / "locks"

_LINE = re.compile(r"^([a-z0-9][a-z0-9.+-]*) ([0-9A-Za-z.+:~-]+) ([0-9a-f]{64})$")


@dataclass(frozen=True, order=True)
class LockedPackage:
    """One Debian package, pinned.

    Attributes:
        name: the package's name.
        version: Debian's version, with epoch.
        sha256: of the .deb file, in hexadecimal.
    """

    name: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Lock:
    """The packages of one architecture, by name.

    Attributes:
        architecture: Debian's name of the architecture.
        packages: sorted by name.
        aliases: what each metapackage (the kernel) stood for when the lock was made.
    """

    architecture: str
    packages: tuple[LockedPackage, ...]
    aliases: tuple[tuple[str, str], ...] = ()

    def get(self, name: str) -> LockedPackage:
        """The locked package called `name`; a metapackage gives the package it stands for.

        Raises:
            LockError: the lock lacks it.
        """
        real = dict(self.aliases).get(name, name)
        for package in self.packages:
            if package.name == real:
                return package
        raise LockError(
            f"{self.architecture}.lock lacks {name}: run `python -m images relock` and commit it"
        )


def parse_lock(text: str, architecture: str) -> Lock:
    """Read a lock file's text.

    Raises:
        LockError: a line is malformed or a package appears twice; names the line.
    """
    packages: dict[str, LockedPackage] = {}
    aliases: dict[str, str] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        if " -> " in line:
            alias, _, real = line.partition(" -> ")
            aliases[alias.strip()] = real.strip()
            continue
        match = _LINE.match(line)
        if match is None:
            raise LockError(
                f"{architecture}.lock line {number}: expected `name version sha256`, got {line!r}"
            )
        package = LockedPackage(*match.groups())
        if package.name in packages:
            raise LockError(f"{architecture}.lock line {number}: {package.name} is there twice")
        packages[package.name] = package
    return Lock(architecture, tuple(sorted(packages.values())), tuple(sorted(aliases.items())))


def format_lock(lock: Lock, comments: Iterable[str] = ()) -> str:
    """The text of a lock file; `parse_lock` reads it back."""
    lines = [f"# {comment}" for comment in comments]
    lines += [f"{alias} -> {real}" for alias, real in lock.aliases]
    lines += [f"{package.name} {package.version} {package.sha256}" for package in lock.packages]
    return "\n".join(lines) + "\n"


def read_lock(path: Path, architecture: str) -> Lock:
    """Read a lock file.

    Raises:
        LockError: it is missing or malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LockError(
            f"there is no lock file for {architecture}: run `python -m images relock`"
        ) from error
    return parse_lock(text, architecture)


def write_lock(path: Path, lock: Lock, comments: Iterable[str] = ()) -> None:
    """Write a lock file, atomically."""
    write_atomically(path, format_lock(lock, comments).encode())
