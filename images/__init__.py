"""Images of the targets: bootloader, kernel, root file systems and disks, built from Debian.

`build_target` is the whole interface; `python -m images --help` is the same for the shell. Recipes
are in `recipes/`, pinned package versions in `locks/`.
"""

from images.builder import Places, TargetImages, build_target, read_manifest
from images.errors import ImageError, PackageGoneError
from images.progress import Progress
from images.recipe import planted_bugs, recipe_names

__all__ = [
    "ImageError",
    "PackageGoneError",
    "Places",
    "Progress",
    "TargetImages",
    "build_target",
    "planted_bugs",
    "read_manifest",
    "recipe_names",
]
