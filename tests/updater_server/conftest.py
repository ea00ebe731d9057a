"""Every test that takes `world` runs against SQLite and against PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from updater_server_world import Postgres, World, make_artifact, world


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    if Postgres.find() is None:
        pytest.skip("PostgreSQL is not there (.ci/bootstrap tests unpacks it)")
    server = Postgres()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"], scope="session")
def database_url(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return ""
    server = request.getfixturevalue("postgres")
    assert isinstance(server, Postgres)
    return server.new_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def own_database_url(request: pytest.FixtureRequest) -> str:
    """A database that no other test has used."""
    if request.param == "sqlite":
        return ""
    server = request.getfixturevalue("postgres")
    assert isinstance(server, Postgres)
    return server.new_database()


@pytest.fixture(scope="session")
def served(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("server"), database_url) as there:
        yield there


@pytest.fixture(name="world")
def world_fixture(served: World) -> World:
    """The running server, emptied."""
    served.reset()
    return served


@pytest.fixture(scope="session")
def artifact_v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("artifacts"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long tests run when `-m` names them."""
    if "server_night" not in config.option.markexpr:
        long = pytest.mark.skip(reason="long: make server-night")
        for item in items:
            if "server_night" in item.keywords:
                item.add_marker(long)
