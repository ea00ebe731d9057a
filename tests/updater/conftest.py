"""Fixtures shared by the updater's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from updater_artifacts import make_key

from updater.artifact.signature import PrivateKey


@pytest.fixture(scope="session")
def signing_key() -> PrivateKey:
    return make_key("ecdsa")


@pytest.fixture(scope="session")
def session_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("updater")
