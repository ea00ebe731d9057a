"""Fixtures: a desk, a rig on it, and a whole bench; all gone when the test is."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_desk import RIG, Desk, FarmDesk, LittleBoard, RunningBench, free_port, wait_for_port

from framework.targets.bench.stack import find_peer
from framework.targets.errors import RigError


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.close()


@pytest.fixture
def rig(desk: Desk, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """The target of a little board: labgrid's own drivers over HTTP and a real ser2net."""
    from framework.targets.rig import open_target

    try:
        ser2net = find_peer("ser2net")
    except RigError as error:
        pytest.skip(str(error))
    programs: list[subprocess.Popen[bytes]] = []
    targets: list[Any] = []

    def make(board: LittleBoard, budget_s: float = 60.0, switch_timeout_s: float = 30.0) -> Any:
        port = free_port()
        accepter = f"connection: &con01#  accepter: telnet(rfc2217),tcp,127.0.0.1,{port}"
        line = f"  connector: serialdev(nouucplock=true),{board.serial.path},115200n81,local"
        programs.append(
            subprocess.Popen(
                [ser2net, "-d", "-n", "-Y", accepter, "-Y", line], stderr=subprocess.DEVNULL
            )
        )
        wait_for_port(port)
        path = tmp_path / f"little-{board.number}.yaml"
        path.write_text(
            RIG.format(
                url=desk.url,
                number=board.number,
                port=port,
                budget_s=budget_s,
                switch_timeout_s=switch_timeout_s,
            )
        )
        target = open_target(path)
        targets.append(target)
        return target

    yield make
    for target in targets:
        target.deactivate_all_drivers()
    for program in programs:
        program.kill()
        program.wait()


@pytest.fixture
def farm_desk(tmp_path: Path) -> Iterator[Callable[..., FarmDesk]]:
    """Makes a farm of little boards, one a variant; its programs are gone when the test is."""
    try:
        find_peer("ser2net")
    except RigError as error:
        pytest.skip(str(error))
    made: list[FarmDesk] = []

    def make(*variants: str) -> FarmDesk:
        made.append(FarmDesk(tmp_path, variants or ("", "")))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def bench_up(tmp_path: Path) -> Iterator[Callable[..., RunningBench]]:
    made: list[RunningBench] = []
    for program in ("ser2net", "mosquitto", "snmpd"):
        try:
            find_peer(program)
        except RigError as error:
            pytest.skip(str(error))

    def make(*options: str) -> RunningBench:
        folder = tmp_path / f"bench-{len(made)}"
        folder.mkdir()
        made.append(RunningBench(folder, *options))
        return made[-1]

    yield make
    for each in made:
        each.end()
