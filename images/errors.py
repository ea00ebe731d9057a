"""Errors of the image builder: a small tree, one line each, with what to do about it."""

from __future__ import annotations


class ImageError(Exception):
    """Base of everything the builder raises on purpose; its text is one line for a person."""


class RecipeError(ImageError):
    """A recipe, overlay or variant name doesn't make sense."""


class MissingToolError(ImageError):
    """A program of the host is missing.

    Attributes:
        tool: the program's name.
        package: the Debian package that has it.
    """

    def __init__(self, tool: str, package: str) -> None:
        self.tool = tool
        self.package = package
        super().__init__(f"{tool} is not installed: run `apt-get install {package}`")


class ToolFailedError(ImageError):
    """A program of the host ended with an error; the text carries its last lines."""


class LockError(ImageError):
    """A lock file is malformed or lacks a package."""


class PackageGoneError(LockError):
    """The archive no longer has a locked version.

    Attributes:
        packages: ``name=version`` of each package that has gone.
        architecture: Debian's name of the architecture.
    """

    def __init__(self, packages: tuple[str, ...], architecture: str) -> None:
        self.packages = packages
        self.architecture = architecture
        shown = ", ".join(packages[:3]) + (" ..." if len(packages) > 3 else "")
        super().__init__(
            f"the archive no longer has {shown} ({architecture}): build with --relock to lock the "
            "present versions, or with --relock-if-gone to use them without changing the lock file"
        )


class DownloadFailedError(ImageError):
    """apt could not fetch something; the text carries apt's own words."""


class ImageTooLargeError(ImageError):
    """A root file system does not fit into its slot."""
