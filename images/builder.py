"""The builder: from a recipe and a lock to a target's files in `build/<target>/`.

    recipe + lock --> .debs --> base tree --> variant trees --> rootfs-<variant>.img --> disk.img
                        \\-> bootloader files (u-boot.bin, seed.img) ------------------/

Every arrow is cached by the hash of all that goes into it (recipe, lock, overlays, client, keys,
the builder's own source), so a second call finds everything done. Files are renamed into place
when they are complete; `manifest.json` comes last and lists only what is there.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from images import bootloaders
from images.apt import PrivateApt, fetch
from images.errors import ImageError, ImageTooLargeError, LockError, PackageGoneError
from images.ext4 import BLOCK, MIB, backup_superblocks, fixed_uuid, make_ext4
from images.gpt import Partition, write_gpt
from images.keys import Keys, ensure_keys
from images.locks import LOCK_DIR, Lock, LockedPackage, read_lock, write_lock
from images.progress import ProgressCallback, Reporter
from images.recipe import (
    HERE,
    OVERLAY_DIR,
    PLANTED_DIR,
    Recipe,
    Variant,
    load_recipe,
    parse_variant,
    recipe_names,
    recipe_text,
)
from images.store import (
    TEMPORARY,
    copy_sparse,
    exclusive,
    hash_inputs,
    hash_tree,
    remove_tree,
    sha256_file,
    sweep,
    temporary_directory,
    write_atomically,
)
from images.tree import build_base, build_variant, client_files, unpack

REPOSITORY = HERE.parent
MANIFEST = "manifest.json"
BASE_VARIANT = "v1"
_STATE = ".state.json"

# A group of 16 MiB, so that a data partition of 64 MiB has two copies of its superblock, and no
# erase unit holds two.
_DATA_GROUP_BLOCKS = 4096

# The modules that decide what bytes come out; a change in another one rebuilds nothing.
_SHAPING = (
    "bootenv.py",
    "bootloaders.py",
    "builder.py",
    "cpio.py",
    "deb.py",
    "elf.py",
    "ext4.py",
    "gpt.py",
    "pyc.py",
    "tree.py",
)


@dataclass(frozen=True)
class TargetImages:
    """What a build left behind.

    Attributes:
        target: the target's name.
        directory: `build/<target>`.
        manifest: the content of its `manifest.json`.
    """

    target: str
    directory: Path
    manifest: Mapping[str, Any]

    def path(self, name: str) -> Path:
        """A file of the build, as named in the manifest."""
        return self.directory / name

    def rootfs(self, variant: str) -> Path:
        """The root file system image of a variant."""
        return self.directory / str(self.manifest["variants"][variant]["file"])

    def disk(self, variant: str = BASE_VARIANT) -> Path:
        """The disk image with this variant in slot a (v1 or a planted variant)."""
        return self.directory / str(self.manifest["disks"][variant]["file"])


@dataclass(frozen=True)
class Places:
    """Where a build reads and writes.

    Attributes:
        build: output, one folder a target, and `keys`.
        cache: packages, apt state, base trees.
        updater: the client's package that goes into the images.
    """

    build: Path = REPOSITORY / "build"
    cache: Path = REPOSITORY / ".cache"
    updater: Path = REPOSITORY / "updater"


def build_target(
    target: str,
    variants: Sequence[str] = (BASE_VARIANT,),
    *,
    progress: ProgressCallback | None = None,
    places: Places | None = None,
    relock: bool = False,
    relock_if_gone: bool = False,
) -> TargetImages:
    """Build a target's bootloader, root file systems and disk, or find them built.

    Args:
        target: a recipe's name.
        variants: root file systems wanted, such as "v2" or "v1+never-fsync"; v1 always is.
        progress: called with every report.
        places: where to read and write; the repository by default.
        relock: lock the archive's present versions, in `images/locks`.
        relock_if_gone: where the archive has lost a locked version, warn and use the present ones
            without changing `images/locks`.

    Raises:
        ImageError: anything that a person can act on, in one line.
    """
    recipe = load_recipe(target)
    wanted = [parse_variant(recipe, name) for name in dict.fromkeys((BASE_VARIANT, *variants))]
    build = _Build(recipe, places or Places(), Reporter(progress))
    output = build.output
    try:
        with exclusive(output / ".lock", f"building {target}"):
            sweep(output)
            return build.run(wanted, relock, relock_if_gone)
    except OSError as error:
        raise ImageError(f"{target} can't be built: {_one_line(error)}") from error


def _one_line(error: OSError) -> str:
    """What the operating system said; of a tree whose copying failed in many places, the first."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        first, *more = error.args[0]
        return f"{first[2]} (and {len(more)} more like it)"
    return str(error)


def relock_architecture(architecture: str, cache: Path, destination: Path) -> Lock:
    """Lock the archive's present versions of everything that recipes of an architecture name.

    Raises:
        LockError: a package doesn't exist.
        DownloadFailedError: the archive can't be reached.
    """
    recipes = [r for r in map(load_recipe, recipe_names()) if r.architecture == architecture]
    names = {n for r in recipes for n in (*r.packages, *r.bootloader_packages)}
    suite = recipes[0].suite
    apt = PrivateApt(cache / "apt" / architecture, architecture, suite)
    with exclusive(cache / "apt" / f"{architecture}.lock", f"apt for {architecture}"):
        lock = apt.resolve(names, {r.kernel for r in recipes})
    comments = [
        f"Debian {suite}, {architecture}: name version sha256. Made by `python -m images relock`.",
    ]
    if destination.parent != LOCK_DIR:
        committed = LOCK_DIR / f"{architecture}.lock"
        comments.append(f"in place of {sha256_file(committed) if committed.exists() else 'none'}")
    write_lock(destination, lock, comments)
    return lock


class _Build:
    """One call of `build_target`: the inputs gathered, then each output made where it is stale."""

    def __init__(self, recipe: Recipe, places: Places, reporter: Reporter) -> None:
        self.recipe = recipe
        self.places = places
        self.reporter = reporter
        self.output = places.build / recipe.target
        self.keys: Keys = ensure_keys(places.build / "keys")
        self.state: dict[str, dict[str, Any]] = {}
        self.debs: dict[str, Path] = {}
        self.lock = Lock(recipe.architecture, ())

    def run(self, variants: Sequence[Variant], relock: bool, relock_if_gone: bool) -> TargetImages:
        """Make everything that is stale, then the manifest. The caller holds the lock."""
        self.state = self._read_state()
        self.lock = self._choose_lock(relock)
        try:
            return self._run(variants)
        except PackageGoneError as gone:
            if not relock_if_gone:
                raise
            self.reporter.note(f"warning: {gone}; using the present versions for this build")
            arch = self.recipe.architecture
            own = self.places.cache / "locks" / f"{arch}.lock"
            self.lock = relock_architecture(arch, self.places.cache, own)
            return self._run(variants)

    # --- inputs -------------------------------------------------------------------------------

    def _choose_lock(self, relock: bool) -> Lock:
        arch = self.recipe.architecture
        committed = LOCK_DIR / f"{arch}.lock"
        if relock:
            with self.reporter.step("locking package versions"):
                return relock_architecture(arch, self.places.cache, committed)
        lock = read_lock(committed, arch)
        own = self.places.cache / "locks" / f"{arch}.lock"
        have_all = all((self._deb_cache / f"{p.sha256}.deb").is_file() for p in self._used(lock))
        if not have_all and own.is_file() and sha256_file(committed) in own.read_text():
            # An earlier build found the committed versions gone; it holds for as long as the
            # committed lock stays the same and the packages aren't cached.
            self.reporter.note(f"using {own.name} of the cache: committed versions have gone")
            return read_lock(own, arch)
        return lock

    @property
    def _deb_cache(self) -> Path:
        return self.places.cache / "debs"

    def _used(self, lock: Lock) -> list[LockedPackage]:
        recipe = self.recipe
        names = (*recipe.packages, *recipe.bootloader_packages, recipe.kernel)
        return [lock.get(name) for name in names]

    def _fetch(self) -> None:
        if self.debs:
            return
        arch = self.recipe.architecture
        apt = PrivateApt(self.places.cache / "apt" / arch, arch, self.recipe.suite)
        with exclusive(self.places.cache / "apt" / f"{arch}.lock", f"apt for {arch}"):
            self.debs = fetch(apt, self._used(self.lock), self._deb_cache, self.reporter)

    def deb(self, name: str) -> Path:
        """The .deb of a package of the recipe."""
        return self.debs[self.lock.get(name).name]

    def _builder_hash(self) -> str:
        own = bootloaders.modules(self.recipe)
        return hash_inputs((name, (HERE / name).read_bytes()) for name in (*_SHAPING, *own))

    def _base_key(self) -> str:
        recipe = self.recipe
        return hash_inputs(
            (
                ("builder", self._builder_hash()),
                ("boot", hash_tree(HERE / "boot")),
                ("recipe", recipe_text(recipe.target)),
                ("packages", "\n".join(map(str, self._used(self.lock)))),
                ("python", platform.python_version()),
                ("bootloader", bootloaders.source_key(recipe)),
            )
        )

    def _variant_key(self, variant: Variant) -> str:
        overlays = (*self.recipe.overlays, *variant.overlays)
        plants = [(PLANTED_DIR / f"{name}.py").read_bytes() for name in variant.plants]
        client = [(f"client {n}", f.read_bytes()) for n, f in client_files(self.places.updater)]
        return hash_inputs(
            (
                ("base", self._base_key()),
                ("name", variant.name),
                *((f"overlay {name}", hash_tree(OVERLAY_DIR / name)) for name in overlays),
                *((f"plant {number}", plant) for number, plant in enumerate(plants)),
                *client,
                ("package", hash_tree(HERE / "package")),
                ("ca", self.keys.ca_certificate.read_bytes()),
                ("artifact key", self.keys.artifact_public.read_bytes()),
            )
        )

    # --- outputs ------------------------------------------------------------------------------

    def _run(self, variants: Sequence[Variant]) -> TargetImages:
        self.debs = {}
        layout = bootloaders.layout(self.recipe)
        keys: dict[str, str] = {}
        variants = [*variants, *self._earlier_variants({variant.name for variant in variants})]
        for variant in variants:
            name = f"rootfs-{variant.name}.img"
            keys[name] = self._variant_key(variant)
            self._make(name, keys[name], partial(self._rootfs, variant))
        loader = bootloaders.for_recipe(self.recipe)
        files: dict[str, str] = {}
        disks: dict[str, dict[str, Any]] = {}
        for variant in variants:
            if variant.name != BASE_VARIANT and not variant.is_modified:
                continue
            context = self._context(variant)
            for name, make in loader.files(context).items():
                files[name] = hash_inputs((("base", self._base_key()), ("file", name)))
                self._make(name, files[name], make)
            disk = "disk.img" if not variant.is_modified else f"disk-{variant.name}.img"
            key = hash_inputs(
                (
                    ("base", self._base_key()),
                    ("rootfs", keys[f"rootfs-{variant.name}.img"]),
                    ("single", str(variant.single_env)),
                )
            )
            files[disk] = key
            self._make(disk, key, partial(self._disk, context, variant, layout.partitions))
            disks[variant.name] = {"file": disk, **loader.disk_files(context)}
        return self._write_manifest(loader, layout, {**keys, **files}, disks)

    def _context(self, variant: Variant) -> bootloaders.Context:
        return bootloaders.Context(
            recipe=self.recipe,
            single_env=variant.single_env,
            bootloader_tree=self._bootloader_tree,
            scratch=self.output,
            cache=self.places.cache,
            reporter=self.reporter,
        )

    def _make(self, name: str, key: str, make: Callable[[Path], None]) -> None:
        """Make an output if it is stale, under a temporary name first."""
        path = self.output / name
        known = self.state.get(name)
        if known is not None and known["key"] == key and path.is_file():
            stat = path.stat()
            if [stat.st_size, stat.st_mtime_ns] == known["stat"]:
                return
        with temporary_directory(self.output) as scratch, self.reporter.step(f"making {name}"):
            new = scratch / name
            make(new)
            digest = sha256_file(new)
            new.chmod(0o644)
            new.replace(path)
        stat = path.stat()
        self.state[name] = {
            "key": key,
            "sha256": digest,
            "size": stat.st_size,
            "stat": [stat.st_size, stat.st_mtime_ns],
        }
        self._write_state()

    def _base_tree(self) -> Path:
        """The cached base tree, built if need be."""
        place = self.places.cache / "trees" / self._base_key()
        unfinished = any(place.parent.glob(f"*{TEMPORARY}*"))
        if place.is_dir() and not unfinished:
            os.utime(place)
            return place
        with exclusive(self.places.cache / "trees.lock", "building a base tree"):
            sweep(place.parent)  # of a build killed right after its rename, too
            if place.is_dir():
                return place
            self._fetch()
            with temporary_directory(place.parent) as scratch:
                debs = {name: self.deb(name) for name in self.recipe.packages}
                kernel = self.deb(self.recipe.kernel)
                root = build_base(self.recipe, debs, kernel, scratch, self.reporter)
                os.utime(root)
                root.rename(place)
            self._forget_old_trees(place.parent)
        return place

    @staticmethod
    def _forget_old_trees(directory: Path, keep: int = 6) -> None:
        trees = [path for path in directory.iterdir() if path.is_dir()]
        trees.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in trees[keep:]:
            remove_tree(path)

    def _bootloader_tree(self, scratch: Path) -> Path:
        """The bootloader's packages, unpacked below `scratch`."""
        self._fetch()
        debs = {name: self.deb(name) for name in self.recipe.bootloader_packages}
        unpack(debs, scratch, self.reporter)
        return scratch

    def _rootfs(self, variant: Variant, path: Path) -> None:
        recipe = self.recipe
        values = {
            "CONSOLE": recipe.console,
            "DEVICE": recipe.device,
            "DATA_DEVICE": f"{recipe.device}4",
            "DATA_BACKUPS": " ".join(map(str, _data_backups(recipe))),
            "DATA_BLOCK": str(BLOCK),
            "DEVICE_TYPE": recipe.target,
            **bootloaders.for_recipe(recipe).template_values(recipe, variant.single_env),
        }
        root = path.parent / "tree"
        base = self._base_tree()
        build_variant(
            base,
            root,
            recipe=recipe,
            variant=variant,
            values=values,
            keys=self.keys,
            updater=self.places.updater,
            extra=bootloaders.root_files(recipe, path.parent / "bootloader"),
        )
        size = make_ext4(
            path,
            name=f"{recipe.target}/{variant.name}",
            label="rootfs",
            timestamp=recipe.timestamp,
            tree=root,
        )
        if size > recipe.slot_mib * MIB:
            raise ImageTooLargeError(
                f"rootfs-{variant.name}.img has {size / MIB:.0f} MiB, a slot of {recipe.target} "
                f"has {recipe.slot_mib} MiB: raise slot_mib in the recipe"
            )

    def _disk(
        self,
        context: bootloaders.Context,
        variant: Variant,
        partitions: Sequence[Partition],
        path: Path,
    ) -> None:
        recipe = self.recipe
        loader = bootloaders.for_recipe(recipe)
        by_name = {partition.name: partition for partition in partitions}
        size = bootloaders.disk_size(partitions)
        rootfs = f"rootfs-{variant.name}.img"
        data = path.parent / "data.img"
        make_ext4(
            data,
            name=f"{recipe.target}/data",
            label="data",
            timestamp=recipe.timestamp,
            size=by_name["data"].size,
            journal=True,
            group_blocks=_DATA_GROUP_BLOCKS,
        )
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.truncate(descriptor, size)
            guid = fixed_uuid(f"{recipe.target}/disk")
            write_gpt(descriptor, size, partitions, guid, loader.boot_code(context))
            copy_sparse(self.output / rootfs, descriptor, by_name["rootfs-a"].offset)
            copy_sparse(data, descriptor, by_name["data"].offset)
            loader.install(context, descriptor, by_name)
        finally:
            os.close(descriptor)

    # --- manifest -----------------------------------------------------------------------------

    def _earlier_variants(self, asked: set[str]) -> list[Variant]:
        """Variants of earlier builds that are still fresh; the files of stale ones are deleted."""
        fresh: list[Variant] = []
        for name in sorted(self.state):
            variant_name = name.removeprefix("rootfs-").removesuffix(".img")
            if not name.startswith("rootfs-") or variant_name in asked:
                continue
            try:
                variant = parse_variant(self.recipe, variant_name)
                if self._variant_key(variant) == self.state[name]["key"]:
                    fresh.append(variant)
                    continue
            except ImageError:
                # It was built from a recipe that no longer knows it.
                pass
            for stale in (name, f"disk-{variant_name}.img"):
                (self.output / stale).unlink(missing_ok=True)
                self.state.pop(stale, None)
        return fresh

    def _write_manifest(
        self,
        loader: bootloaders.Bootloader,
        layout: bootloaders.Layout,
        files: Mapping[str, str],
        disks: Mapping[str, Mapping[str, Any]],
    ) -> TargetImages:
        recipe = self.recipe
        variants = {
            name.removeprefix("rootfs-").removesuffix(".img"): {
                "file": name,
                "sha256": self.state[name]["sha256"],
                "size": self.state[name]["size"],
                "artifact_name": name.removeprefix("rootfs-").removesuffix(".img"),
            }
            for name in files
            if name.startswith("rootfs-")
        }
        manifest = {
            "target": recipe.target,
            "arch": recipe.architecture,
            "bootloader": recipe.bootloader,
            "packages": [vars(package) for package in sorted(set(self._used(self.lock)))]
            + bootloaders.sources(recipe),
            "files": {
                name: {"sha256": self.state[name]["sha256"], "size": self.state[name]["size"]}
                for name in sorted(files)
            },
            "layout": {
                "size": bootloaders.disk_size(layout.partitions),
                "sector_size": 512,
                "partitions": [
                    {"name": p.name, "number": p.number, "offset": p.offset, "size": p.size}
                    for p in layout.partitions
                ]
                + [
                    {
                        "name": p.name,
                        "number": p.number,
                        "offset": p.offset,
                        "size": p.size,
                        "device": disk,
                    }
                    for disk, p in bootloaders.other_partitions(recipe)
                ],
                "env": loader.environment(recipe),
                "data_repair": {"block": BLOCK, "backups": list(_data_backups(recipe))},
            },
            "slots": {
                slot: {
                    "partition": f"rootfs-{slot}",
                    "device": f"{recipe.device}{number}",
                    "number": number,
                }
                for slot, number in (("a", 2), ("b", 3))
            },
            "variants": dict(sorted(variants.items())),
            "disks": {name: dict(disk) for name, disk in sorted(disks.items())},
        }
        text = json.dumps(manifest, indent=2) + "\n"
        path = self.output / MANIFEST
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, text.encode())
        return TargetImages(recipe.target, self.output, manifest)

    def _read_state(self) -> dict[str, dict[str, Any]]:
        try:
            loaded = json.loads((self.output / _STATE).read_text(encoding="utf-8"))
            return dict(loaded) if isinstance(loaded, dict) else {}
        except (OSError, ValueError):
            # No record, or a damaged one: everything is made anew.
            return {}

    def _write_state(self) -> None:
        write_atomically(self.output / _STATE, json.dumps(self.state, indent=1).encode())


def _data_backups(recipe: Recipe) -> tuple[int, ...]:
    return backup_superblocks(recipe.data_mib * MIB, _DATA_GROUP_BLOCKS)


def read_manifest(target: str, build: Path | None = None) -> dict[str, Any]:
    """The manifest of a target that has been built.

    Raises:
        ImageError: it hasn't.
    """
    path = (build or Places().build) / target / MANIFEST
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ImageError(
            f"{target} hasn't been built: run `python -m images build {target}`"
        ) from error
    except ValueError as error:
        raise ImageError(f"{path} is damaged: delete it and build {target} again") from error


__all__ = ["LockError", "Places", "TargetImages", "build_target", "read_manifest"]
