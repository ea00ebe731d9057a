"""Artifact v3: the update file format that Mender devices understand, read and written.

`ArtifactReader` streams one and refuses everything that is not provably whole; `write_artifact`
and its siblings make one; `sign_artifact` signs one. Facts: Mender's public format description and
what `mender-artifact` 3.9 writes and accepts (`tests/peers/`). The writer is imported when it is
first asked for: devices only read.
"""

from typing import TYPE_CHECKING

from updater.artifact.errors import (
    ArtifactError,
    ArtifactFormatError,
    ArtifactIntegrityError,
    ArtifactLimitError,
    ArtifactSignatureError,
    ArtifactTruncatedError,
)
from updater.artifact.reader import ArtifactReader, Limits, PayloadFile, check_compatible

if TYPE_CHECKING:
    from updater.artifact.writer import (
        Software,
        sign_artifact,
        write_artifact,
        write_bootstrap_artifact,
        write_module_artifact,
    )

__all__ = [
    "ArtifactError",
    "ArtifactFormatError",
    "ArtifactIntegrityError",
    "ArtifactLimitError",
    "ArtifactReader",
    "ArtifactSignatureError",
    "ArtifactTruncatedError",
    "Limits",
    "PayloadFile",
    "Software",
    "check_compatible",
    "sign_artifact",
    "write_artifact",
    "write_bootstrap_artifact",
    "write_module_artifact",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        from updater.artifact import writer  # noqa: PLC0415

        return getattr(writer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
