"""Planted bug: an updater that goes on with an interrupted download without checking what is there.

Its checkpoint says how much was downloaded, and is durable; the bytes that it speaks of are not
synced, and nobody compares them with their hash. It takes a slow download (fast ones are not kept),
a power cut behind a checkpoint, and a cache that loses the bytes: then every further try goes on
from what is not there.
"""

from __future__ import annotations

import json
import os

from updater.cli import main
from updater.device import files
from updater.device.spool import Checkpoint, Spool


def _find_without_checking(self: Spool, identity: str) -> Checkpoint | None:
    try:
        with open(self._record, "rb") as file:  # noqa: PTH123 - as the client does
            checkpoint = Checkpoint(**json.loads(file.read(16 * 1024)))
        if checkpoint.identity != identity:
            return None
        self._handle = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        self._digest = self._hash(checkpoint.size)
    except (OSError, ValueError, TypeError):
        return None
    self._size = self._durable = checkpoint.size
    self._head = (checkpoint.identity, checkpoint.total, checkpoint.validator)
    return checkpoint


def _checkpoint_without_sync(self: Spool) -> None:
    if self._handle < 0 or self._digest is None or self._size == self._durable:
        return
    record = Checkpoint(*self._head, self._size, self._digest.hexdigest())
    try:
        files.write_durably(self._record, json.dumps(record._asdict()).encode())
    except OSError as error:
        self._give_up(error)
        return
    self._durable = self._size


Spool.find = _find_without_checking  # type: ignore[method-assign]
Spool.checkpoint = _checkpoint_without_sync  # type: ignore[method-assign]

if __name__ == "__main__":
    raise SystemExit(main())
