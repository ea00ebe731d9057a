"""What can be wrong with an artifact. One line each, naming the member and the limit or value."""

from __future__ import annotations


class ArtifactError(Exception):
    """The artifact cannot be written, read or trusted; the message says why."""


class ArtifactFormatError(ArtifactError):
    """The bytes are not a valid Artifact v3: order, names, JSON, tar headers."""


class ArtifactTruncatedError(ArtifactFormatError):
    """The stream ended before the artifact did."""


class ArtifactLimitError(ArtifactFormatError):
    """A part is larger than its declared size or than the reader's bound."""


class ArtifactIntegrityError(ArtifactError):
    """A checksum in the manifest does not match the bytes."""


class ArtifactSignatureError(ArtifactError):
    """The signature is missing, malformed, or made by none of the trusted keys."""
