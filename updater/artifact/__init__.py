"""Artifact v3: the update file format that Mender devices understand, read and written.

`write_artifact` makes one from a root file system image; `ArtifactReader` streams one and refuses
everything that is not provably whole. Facts: Mender's public format description and what
`mender-artifact` 3.9 writes and accepts (`tests/peers/`).
"""

from updater.artifact.errors import (
    ArtifactError,
    ArtifactFormatError,
    ArtifactIntegrityError,
    ArtifactLimitError,
    ArtifactSignatureError,
    ArtifactTruncatedError,
)
from updater.artifact.reader import ArtifactReader, Limits, PayloadFile, check_compatible
from updater.artifact.writer import write_artifact

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
    "check_compatible",
    "write_artifact",
]
