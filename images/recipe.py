"""Recipes: what a target's images are made of, read from `images/recipes/*.toml`.

A recipe may extend another one (`extends = "base-tiny"`); tables are merged, lists replaced.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from images.errors import RecipeError

HERE = Path(__file__).parent
RECIPE_DIR = HERE / "recipes"
OVERLAY_DIR = HERE / "overlays"
PLANTED_DIR = HERE / "planted"
MIB = 1 << 20

# Suffixes that any variant may carry besides the names of planted bugs.
SINGLE_ENV = "single-env"


@dataclass(frozen=True)
class Recipe:
    """One target's recipe.

    Attributes:
        target: its name, the recipe file's too.
        description: one line for `list`.
        architecture: Debian's name.
        suite: Debian's code name.
        bootloader: "uboot" or "grub".
        device: the disk as Linux calls it, and before a partition number ("/dev/vda").
        console: the kernel's console ("ttyAMA0").
        kernel_arguments: appended to the kernel's command line.
        kernel: metapackage whose first dependency is the kernel package.
        packages: unpacked into the root file system.
        bootloader_packages: unpacked for the bootloader only.
        initrd_modules: kernel modules in the initrd, loaded in dependency order.
        root_modules: kernel modules loaded by init.
        applets: busybox commands that get a link.
        overlays: folders of `images/overlays` laid over the tree, in order.
        drop: glob patterns removed from the unpacked packages.
        slot_mib: size of each slot.
        data_mib: size of the data partition.
        filler_mib: incompressible bytes per variant, so that versions differ.
        timestamp: seconds since 1970, for every file.
        variants: overlay folders of each named variant.
        options: anything target-specific (addresses for the boot script).
    """

    target: str
    description: str
    architecture: str
    suite: str
    bootloader: str
    device: str
    console: str
    kernel_arguments: str
    kernel: str
    packages: tuple[str, ...]
    bootloader_packages: tuple[str, ...]
    initrd_modules: tuple[str, ...]
    root_modules: tuple[str, ...]
    applets: tuple[str, ...]
    overlays: tuple[str, ...]
    drop: tuple[str, ...]
    slot_mib: int
    data_mib: int
    filler_mib: int
    timestamp: int
    variants: Mapping[str, tuple[str, ...]]
    options: Mapping[str, str]

    @property
    def multiarch(self) -> str:
        """Debian's library folder of the architecture."""
        return {"arm64": "aarch64-linux-gnu", "amd64": "x86_64-linux-gnu"}[self.architecture]


@dataclass(frozen=True)
class Variant:
    """One root file system of a target.

    Attributes:
        name: as asked for, "v1" or "v1+never-fsync".
        base: the part before the first "+".
        plants: file stems in `images/planted`, from the parts after it.
        single_env: only one copy of the boot environment is used.
        overlays: overlay folders of the base variant.
    """

    name: str
    base: str
    plants: tuple[str, ...]
    single_env: bool
    overlays: tuple[str, ...]

    @property
    def is_modified(self) -> bool:
        """Whether something is planted or changed, so that it needs a disk of its own."""
        return "+" in self.name


def recipe_names() -> list[str]:
    """The targets that have a recipe, sorted."""
    return sorted(p.stem for p in RECIPE_DIR.glob("*.toml") if not p.stem.startswith("base-"))


def load_recipe(target: str) -> Recipe:
    """Read a target's recipe.

    Raises:
        RecipeError: there is none, or it is malformed.
    """
    if target not in recipe_names():
        raise RecipeError(f"there is no target {target!r}: choose {', '.join(recipe_names())}")
    raw = _load_merged(target)
    try:
        packages, modules, tree, disk = raw["packages"], raw["modules"], raw["tree"], raw["disk"]
        return Recipe(
            target=target,
            description=raw["description"],
            architecture=raw["architecture"],
            suite=raw["suite"],
            bootloader=raw["bootloader"],
            device=disk["device"],
            console=raw["console"],
            kernel_arguments=raw["kernel_arguments"],
            kernel=packages["kernel"],
            packages=tuple(packages["rootfs"]) + tuple(packages.get("extra", ())),
            bootloader_packages=tuple(packages["bootloader"]),
            initrd_modules=tuple(modules["initrd"]),
            root_modules=tuple(modules["rootfs"]),
            applets=tuple(tree["applets"]),
            overlays=tuple(tree["overlays"]),
            drop=tuple(tree["drop"]) + tuple(tree.get("drop_extra", ())),
            slot_mib=int(disk["slot_mib"]),
            data_mib=int(disk["data_mib"]),
            filler_mib=int(tree["filler_mib"]),
            timestamp=int(tree["timestamp"]),
            variants={name: tuple(v["overlays"]) for name, v in raw["variants"].items()},
            options={name: str(value) for name, value in raw.get("options", {}).items()},
        )
    except KeyError as error:
        raise RecipeError(f"recipe {target}.toml lacks {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"recipe {target}.toml: {error}") from error


def recipe_text(target: str) -> str:
    """The text of a recipe and of all that it extends (an input of the images)."""
    path = RECIPE_DIR / f"{target}.toml"
    text = path.read_text(encoding="utf-8")
    parent = tomllib.loads(text).get("extends")
    return text + (recipe_text(str(parent)) if parent else "")


def _load_merged(name: str) -> dict[str, Any]:
    path = RECIPE_DIR / f"{name}.toml"
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"there is no recipe {name}.toml to extend") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {name}.toml: {error}") from error
    parent = own.pop("extends", None)
    return own if parent is None else _merge(_load_merged(str(parent)), own)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_tables = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both_tables else value
    return merged


def planted_bugs() -> list[str]:
    """The bugs that can be planted into an image, as written in variant names."""
    return sorted(
        path.stem.replace("_", "-")
        for path in PLANTED_DIR.glob("*.py")
        if not path.stem.startswith("_")
    )


def parse_variant(recipe: Recipe, name: str) -> Variant:
    """Understand a variant's name: a base, then `+` and planted bugs or `single-env`.

    Raises:
        RecipeError: a part of it is unknown; says what there is.
    """
    base, *additions = name.split("+")
    if base not in recipe.variants:
        raise RecipeError(
            f"{recipe.target} has no variant {base!r}: choose {', '.join(recipe.variants)}"
        )
    known = planted_bugs()
    for addition in additions:
        if addition.replace("_", "-") not in (*known, SINGLE_ENV):
            raise RecipeError(
                f"nothing called {addition!r} can be planted: choose "
                f"{', '.join((*known, SINGLE_ENV))}"
            )
    plants = tuple(a.replace("-", "_") for a in additions if a.replace("_", "-") != SINGLE_ENV)
    single = len(plants) != len(additions)
    return Variant(name, base, plants, single, recipe.variants[base])
