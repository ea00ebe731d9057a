"""Root trees: Debian packages unpacked, trimmed and completed into what goes into a slot.

Two stages: the *base* of a target (packages, kernel, initrd, compiled libraries), which takes
seconds and is cached, and a *variant* of it (overlays, client, keys, version, filler), which takes
a moment. No maintainer script runs, so any architecture can be built on any machine.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from images.cpio import CpioArchive
from images.elf import missing_libraries, module_order
from images.errors import ImageError, RecipeError
from images.host import find_tool, run
from images.keys import Keys
from images.progress import Reporter
from images.pyc import MAGIC_VERSION
from images.recipe import HERE, OVERLAY_DIR, PLANTED_DIR, Recipe, Variant

_DIRECTORIES = (
    "bin",
    "boot",
    "boot/grub/mender_grubenv1",
    "boot/grub/mender_grubenv2",
    "data",
    "dev",
    "etc",
    "lib",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
)
_PROGRAMS = ("bin/busybox", "bin/dash", "usr/bin/python3.11")
_SUFFIX = ".in"
_CLIENT_PARTS = ("__init__.py", "cli.py", "artifact", "device", "modules")


def unpack(debs: Mapping[str, Path], destination: Path, reporter: Reporter) -> None:
    """Unpack .deb files over each other into `destination`."""
    destination.mkdir(parents=True, exist_ok=True)
    with reporter.step("unpacking packages") as step:
        for number, (name, deb) in enumerate(debs.items()):
            step.update(number, len(debs), name)
            run(["dpkg-deb", "-x", deb, destination])
        step.update(len(debs), len(debs), f"{len(debs)} packages")


def build_base(
    recipe: Recipe, debs: Mapping[str, Path], kernel_deb: Path, scratch: Path, reporter: Reporter
) -> Path:
    """Build a target's base tree below `scratch`.

    Returns:
        The tree's root.

    Raises:
        ImageError: a shared library or a kernel module is missing, or the recipe has an error.
    """
    root = scratch / "root"
    unpack(debs, root, reporter)
    unpack({"kernel": kernel_deb}, scratch / "kernel", reporter)
    with reporter.step("trimming the tree"):
        for pattern in recipe.drop:
            for path in list(root.glob(pattern)):
                remove(path)
        for name in _DIRECTORIES:
            (root / name).mkdir(parents=True, exist_ok=True)
        for name in ("tmp", "var"):
            if (root / name).exists():
                remove(root / name)
            (root / name).mkdir()
        absent = [name for name in _PROGRAMS if not (root / name).is_file()]
        if absent:
            raise ImageError(f"recipe {recipe.target}: no package brings {', '.join(absent)}")
        _link_busybox(root, recipe)
        link(root / "usr/bin/python3", "python3.11")
        install_kernel(recipe, scratch / "kernel", root)
        problems = missing_libraries(root)
        if problems:
            raise ImageError(f"recipe {recipe.target}: {'; '.join(problems[:3])}")
    with reporter.step("compiling Python's library"):
        for name in ("usr/lib/python3.11", "usr/lib/python3/dist-packages"):
            compile_python(root / name, f"/{name}", "sourceless")
    return root


def remove(path: Path) -> None:
    """Delete a file, a link or a whole tree."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link(path: Path, target: str) -> None:
    """Make a symbolic link, replacing what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.exists():
        remove(path)
    path.symlink_to(target)


def _link_busybox(root: Path, recipe: Recipe) -> None:
    for applet in recipe.applets:
        place = root / ("sbin" if applet == "init" else "bin") / applet
        if not place.exists():
            link(place, "../bin/busybox" if applet == "init" else "busybox")


def install_kernel(recipe: Recipe, kernel: Path, root: Path) -> None:
    """Put the kernel, the modules the recipe names, and an initrd into `root`."""
    (image,) = (kernel / "boot").glob("vmlinuz-*")
    shutil.copyfile(image, root / "boot/vmlinuz")
    (modules,) = (kernel / "lib/modules").iterdir()
    early = module_order(modules / "kernel", recipe.initrd_modules)
    late = [m for m in module_order(modules / "kernel", recipe.root_modules) if m not in early]
    folder = root / "lib/modules"
    folder.mkdir(parents=True, exist_ok=True)
    for module in late:
        shutil.copyfile(module, folder / module.name)
    (folder / "load").write_text("".join(f"/lib/modules/{module.name}\n" for module in late))
    archive = CpioArchive()
    for name in ("bin", "dev", "proc", "root"):
        archive.add_directory(name)
    archive.add_character_device("dev/console", 5, 1)
    archive.add_file("bin/busybox", (root / "bin/busybox").read_bytes(), 0o755)
    for applet in ("sh", "mount", "insmod", "usleep", "switch_root"):
        archive.add_symlink(f"bin/{applet}", "busybox")
    for module in early:
        archive.add_file(module.name, module.read_bytes())
    archive.add_file("load", "".join(f"/{module.name}\n" for module in early).encode())
    archive.add_file("init", (HERE / "boot/initrd-init.sh").read_bytes(), 0o755)
    (root / "boot/initrd.img").write_bytes(archive.data())


def target_python() -> Path:
    """An interpreter of the host whose bytecode the target's Python accepts.

    Raises:
        ImageError: there is none.
    """
    if sys.version_info[:2] == MAGIC_VERSION:
        return Path(sys.executable)
    try:
        return find_tool("python3.11")
    except ImageError as error:
        raise ImageError(
            "compiling for the target needs Python 3.11: run `apt-get install python3.11`, or use "
            "a virtual environment with it"
        ) from error


def compile_python(root: Path, prefix: str, mode: str) -> None:
    """Compile the Python files below `root`, which the device knows as `prefix`."""
    python = target_python()
    run(
        [python, "-s", "-S", HERE / "pyc.py", mode, root, prefix],
        env={"PYTHONHASHSEED": "0"},
    )


def client_files(updater: Path) -> list[tuple[str, Path]]:
    """(path below the package, file) of each file of the client that goes into an image.

    Raises:
        ImageError: there is no client.
    """
    if not (updater / "cli.py").is_file():
        raise ImageError(f"there is no update client in {updater} (cli.py is missing)")
    found = []
    for part in _CLIENT_PARTS:
        place = updater / part
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        files = [file for file in files if file.suffix in (".py", "")]
        found += [(str(file.relative_to(updater)), file) for file in files if file.is_file()]
    return found


def apply_overlay(overlay: Path, root: Path, values: Mapping[str, str]) -> None:
    """Lay a folder over the tree; files called `*.in` have their `@NAMES@` replaced.

    Raises:
        RecipeError: a name has no value, or there is no such overlay.
    """
    if not overlay.is_dir():
        raise RecipeError(f"there is no overlay {overlay.name}")
    for source in sorted(overlay.rglob("*")):
        relative = source.relative_to(overlay)
        if source.is_dir() and not source.is_symlink():
            (root / relative).mkdir(parents=True, exist_ok=True)
            continue
        if source.is_symlink():
            link(root / relative, str(source.readlink()))
            continue
        data = source.read_bytes()
        if source.name.endswith(_SUFFIX):
            relative = relative.with_name(relative.name.removesuffix(_SUFFIX))
            data = _substitute(data.decode(), values, str(relative)).encode()
        target = root / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.write_bytes(data)
        target.chmod(0o755 if source.stat().st_mode & 0o100 else 0o644)


def _substitute(text: str, values: Mapping[str, str], name: str) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise RecipeError(f"overlay file {name} wants @{match[1]}@, which nothing sets")
        return values[match[1]]

    return re.sub(r"@([A-Z_0-9]+)@", value, text)


def build_variant(
    base: Path,
    root: Path,
    *,
    recipe: Recipe,
    variant: Variant,
    values: Mapping[str, str],
    keys: Keys,
    updater: Path,
    extra: Mapping[str, bytes],
) -> None:
    """Make the tree of one variant at `root`, from a copy of the base tree.

    Args:
        base: the base tree.
        root: where; must not exist.
        recipe: the target's.
        variant: which one.
        values: for the overlays' templates.
        keys: whose public parts go in.
        updater: the client's package.
        extra: more files, by path.
    """
    shutil.copytree(base, root, symlinks=True)
    for name in (*recipe.overlays, *variant.overlays):
        apply_overlay(OVERLAY_DIR / name, root, values)
    for name, data in extra.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    # At the call, because the package is made of this module's pieces.
    from images.deb import install_client  # noqa: PLC0415

    install_client(root, updater, recipe.timestamp)
    package = "usr/lib/python3/dist-packages/updater"
    compile_python(root / package, f"/{package}", "cached")
    if variant.plants:
        _plant(root, variant)
    settings = root / "etc/updater"
    shutil.copyfile(keys.ca_certificate, settings / "server-ca.pem")
    shutil.copyfile(keys.artifact_public, settings / "artifact-key.pem")
    (settings / "artifact_info").write_text(f"artifact_name={variant.name}\n")
    filler = hashlib.shake_256(f"brownout filler {variant.name}".encode())
    place = root / "usr/share/zz-filler.bin"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(filler.digest(recipe.filler_mib << 20))
    normalise(root, recipe.timestamp)


def _plant(root: Path, variant: Variant) -> None:
    """Install a deliberate bug: the launcher runs the planting file, which starts the client."""
    if len(variant.plants) > 1:
        raise RecipeError(f"{variant.name}: one bug at a time can be planted")
    shutil.copyfile(PLANTED_DIR / f"{variant.plants[0]}.py", root / "usr/lib/updater-planted.py")
    launcher = root / "usr/bin/updater"
    launcher.write_text('#!/bin/sh\nexec /usr/bin/python3 -sP /usr/lib/updater-planted.py "$@"\n')
    launcher.chmod(0o755)


def normalise(root: Path, timestamp: int) -> None:
    """Give every file the same time, and modes that don't depend on the builder's umask."""
    for directory, names, files in os.walk(root, topdown=False):
        for name in (*files, *names):
            path = Path(directory) / name
            if not path.is_symlink():
                executable = path.is_dir() or path.stat().st_mode & 0o100
                path.chmod(0o755 if executable else 0o644)
            os.utime(path, (timestamp, timestamp), follow_symlinks=False)
    for name, mode in (("tmp", 0o1777), ("root", 0o700)):
        if (root / name).is_dir():
            (root / name).chmod(mode)
    root.chmod(0o755)
    os.utime(root, (timestamp, timestamp))
