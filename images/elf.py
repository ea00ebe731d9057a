"""Just enough ELF to check a root tree: shared libraries needed, kernel module dependencies.

Reads 64-bit little-endian files (both of our architectures) by section, after the ELF
specification (System V gABI, chapters 4 and 5) and the kernel's `modinfo` section.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from images.errors import ImageError

_MAGIC = b"\x7fELF\x02\x01"
_DT_NEEDED = 1
_SHT_DYNAMIC = 6


def is_elf(data: bytes) -> bool:
    """Whether these are the first bytes of a 64-bit little-endian ELF file."""
    return data[:6] == _MAGIC


def _sections(data: bytes) -> Iterator[tuple[str, int, bytes, int]]:
    """(name, type, content, link) of each section."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQII", data, table + size * i) for i in range(count)]
    if not headers:
        return
    names = headers[names_at]
    strings = data[names[4] : names[4] + names[5]]
    for name, kind, _, _, offset, length, link, _ in headers:
        text = strings[name : strings.index(b"\0", name)].decode()
        yield text, kind, data[offset : offset + length], link


def needed_libraries(data: bytes) -> tuple[str, ...]:
    """The DT_NEEDED entries of an ELF file, in order."""
    sections = list(_sections(data))
    needed: list[str] = []
    for _, kind, content, link in sections:
        if kind != _SHT_DYNAMIC:
            continue
        strings = sections[link][2]
        for tag, value in struct.iter_unpack("<qQ", content):
            if tag == _DT_NEEDED:
                needed.append(strings[value : strings.index(b"\0", value)].decode())
    return tuple(needed)


def module_info(data: bytes) -> Mapping[str, tuple[str, ...]]:
    """The `modinfo` fields of a kernel module, each with all of its values."""
    info: dict[str, tuple[str, ...]] = {}
    for name, _, content, _ in _sections(data):
        if name == ".modinfo":
            for entry in content.split(b"\0"):
                key, separator, value = entry.decode(errors="replace").partition("=")
                if separator:
                    info[key] = (*info.get(key, ()), value)
    return info


def module_order(directory: Path, wanted: tuple[str, ...]) -> list[Path]:
    """Kernel modules with all that they depend on, in an order in which insmod accepts them.

    Args:
        directory: a `lib/modules/<release>/kernel` folder.
        wanted: module names; a name that the kernel has built in must not be asked for.

    Raises:
        ImageError: there is no such module.
    """
    files = {path.stem.replace("-", "_"): path for path in sorted(directory.rglob("*.ko"))}
    order: list[Path] = []
    on_path: set[str] = set()

    def visit(name: str, required_by: str) -> None:
        name = name.replace("-", "_")
        if name not in files:
            raise ImageError(f"the kernel has no module {name} (wanted by {required_by})")
        if files[name] in order or name in on_path:
            return
        on_path.add(name)
        info = module_info(files[name].read_bytes())
        for dependency in filter(None, ",".join(info.get("depends", ())).split(",")):
            visit(dependency, name)
        order.append(files[name])

    for name in wanted:
        visit(name, "the recipe")
    return order


def missing_libraries(root: Path) -> list[str]:
    """Shared libraries that ELF files below `root` need and that aren't there.

    Returns:
        One "file needs library" line each, sorted.
    """
    present = {path.name for path in root.rglob("*.so*")} | {
        path.name for path in root.rglob("ld-linux*")
    }
    missing = []
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_file() or path.suffix == ".ko":
            continue
        with path.open("rb") as file:
            if not is_elf(file.read(6)):
                continue
        for library in needed_libraries(path.read_bytes()):
            if library not in present:
                missing.append(f"{path.relative_to(root)} needs {library}")
    return missing
