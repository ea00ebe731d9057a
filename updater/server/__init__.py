"""The TLS-only server side.

`ArtifactFileServer` serves a folder of artifacts and nothing else; the management server is the
rest of this package, from `app.py` down, and starts by `updater server run`. DESIGN.md beside this
file says how it is built and why.
"""

from updater.server.errors import ServerError
from updater.server.files import ArtifactFileServer

__all__ = ["ArtifactFileServer", "ServerError"]
