"""Files that appear whole or not at all, locks between builds, and hashes of inputs.

Everything the builder leaves behind is written under a temporary name beside its final place and
renamed into it, so a build killed at any moment leaves either the old file or the new one. Left
over temporary files carry `.tmp-` in their names and are swept by the next build that holds the
lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from images.errors import ImageError

TEMPORARY = ".tmp-"
_CHUNK = 1 << 20


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_inputs(parts: Iterable[tuple[str, bytes | str]]) -> str:
    """One hash over named inputs; names and lengths are hashed too, so no two sets collide."""
    digest = hashlib.sha256()
    for name, value in parts:
        data = value.encode() if isinstance(value, str) else value
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def hash_tree(root: Path, pattern: str = "**/*") -> str:
    """One hash over the names, contents and executable bits of the files below `root`."""
    parts: list[tuple[str, bytes | str]] = []
    for path in sorted(root.glob(pattern)):
        if "__pycache__" in path.parts:
            continue
        name = str(path.relative_to(root))
        if path.is_symlink():
            parts.append((name, f"-> {path.readlink()}"))
        elif path.is_file():
            executable = "x" if path.stat().st_mode & 0o100 else "-"
            parts.append((name + executable, path.read_bytes()))
    return hash_inputs(parts)


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file under a temporary name, sync it, and rename it into its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}{TEMPORARY}", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def temporary_directory(parent: Path) -> Iterator[Path]:
    """A scratch directory below `parent` (so that a rename out of it stays on one file system)."""
    parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=f"work{TEMPORARY}", dir=parent))
    try:
        yield path
    finally:
        remove_tree(path)


def remove_tree(path: Path) -> None:
    """Delete a directory tree, read-only directories in it included."""
    if not path.exists():
        return
    for directory, _, _ in os.walk(path):
        Path(directory).chmod(0o700)
    shutil.rmtree(path)


def sweep(directory: Path) -> None:
    """Delete what killed builds left in `directory`; call it only while holding the lock."""
    for path in directory.glob(f"*{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            remove_tree(path)
        else:
            path.unlink(missing_ok=True)
    for path in directory.glob(f".*{TEMPORARY}*"):
        path.unlink(missing_ok=True)


@contextmanager
def exclusive(path: Path, what: str, timeout_s: float = 900) -> Iterator[None]:
    """Hold the lock file `path` against other processes; the kernel frees it if we die.

    Raises:
        ImageError: another process held it for longer than `timeout_s`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ImageError(
                        f"another process has been at {what} for {timeout_s:.0f} s ({path})"
                    ) from error
                # flock has no time-out of its own, and an alarm would need the main thread.
                time.sleep(0.1)
        yield


def copy_sparse(source: Path, target_fd: int, offset: int) -> None:
    """Copy a file into an open one at `offset`, leaving all-zero pieces as holes."""
    zeros = bytes(_CHUNK)
    with source.open("rb") as file:
        position = offset
        while chunk := file.read(_CHUNK):
            if chunk != zeros[: len(chunk)]:
                os.pwrite(target_fd, chunk, position)
            position += len(chunk)
