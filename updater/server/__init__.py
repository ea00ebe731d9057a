"""The TLS-only server side: for now, artifacts with ranged downloads."""

from updater.server.files import ArtifactFileServer, ServerError

__all__ = ["ArtifactFileServer", "ServerError"]
