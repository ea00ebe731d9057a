"""A recorder over small real images, and clients of it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from disk_nbd_client import Client

from framework.disk import DeviceSpec, Recorder

MIB = 1 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An image of 8 MiB with reproducible content in its first MiB."""
    path = tmp_path / "base.img"
    with path.open("wb") as file:
        file.write(random.Random(1).randbytes(MIB))
        file.truncate(8 * MIB)
    return path


@pytest.fixture
def recorder(tmp_path: Path, base: Path):
    with Recorder([DeviceSpec("vda", base), DeviceSpec("vdb", base)], tmp_path / "run") as rec:
        yield rec


@pytest.fixture
def connect(recorder):
    clients = []

    def make(device: str = "vda", **options) -> Client:
        endpoint = recorder.endpoint(device)
        client = Client(endpoint.socket, endpoint.export, **options)
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()
