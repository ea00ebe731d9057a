"""`brownout bench`: the virtual bench, for people and for tests.

`up` holds everything until Ctrl-C; what it prints is all that one needs to use it.
"""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import click

from framework.targets.errors import InfrastructureError, RigError

CHECK_S = 1.0
CONTROL_S = 10.0
MOST_BOARDS = 64


@click.group()
def bench() -> None:
    """Emulated boards behind real serial ports, power heads and labgrid's coordinator."""


@bench.command("up")
@click.option("--boards", type=click.IntRange(1, MOST_BOARDS), default=1, show_default=True)
@click.option(
    "--head",
    "heads",
    multiple=True,
    metavar="KIND",
    help="kind of power head, repeatable: taken in turn  [default: all kinds in turn]",
)
@click.option(
    "--rig",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("rigs/qemu-arm64.yaml"),
    show_default=True,
    help="rig file of the machine behind each board",
)
@click.option("--cache", default="subset", show_default=True, help="cache model of the disks")
@click.option("--port", type=int, default=20408, show_default=True, help="of the coordinator")
@click.option("--baud", type=int, default=115200, show_default=True, help="0: as fast as it goes")
@click.option("--garbage", type=int, default=0, help="random bytes at each power-up")
@click.option("--lost", type=int, default=0, help="of a million bytes, how many get lost")
@click.option("--flipped", type=int, default=0, help="of a million bytes, how many are wrong")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--state",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="also write what is printed into this file, as JSON",
)
@click.option(
    "--log",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="folder for the output of the bench's programs",
)
def bench_up(  # noqa: PLR0917 - click passes them by name
    boards: int,
    heads: tuple[str, ...],
    rig: Path,
    cache: str,
    port: int,
    baud: int,
    garbage: int,
    lost: int,
    flipped: int,
    seed: int,
    state: Path | None,
    log: Path | None,
) -> None:
    """Start a bench, say how to use it, and hold it until Ctrl-C; nothing is left of it then.

    Example: brownout bench up --boards 4 --head rest --head apc
    """
    # Here: a bench needs packages that nothing else does.
    from framework.disk import MODELS  # noqa: PLC0415
    from framework.targets.bench import HEADS, BenchOptions, Line, VirtualBench  # noqa: PLC0415

    if cache not in MODELS:
        raise RigError(f"--cache: {cache!r}; known: {', '.join(MODELS)}")
    kinds = heads or tuple(HEADS)
    line = Line(baud, garbage, lost, flipped, seed)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    signal.signal(signal.SIGINT, lambda *_: ended.set())
    if log is not None:
        log.mkdir(parents=True, exist_ok=True)
    desk = VirtualBench(
        [kinds[number % len(kinds)] for number in range(boards)],
        BenchOptions(rig, cache, line, seed),
        port=port,
        log=log,
    )
    with desk:
        told = {
            "coordinator": desk.coordinator,
            "control": desk.control,
            "places": [
                {"name": p.name, "head": p.head.name, "sold_as": p.head.sold_as, "rig": p.head.rig}
                for p in desk.places
            ],
        }
        _tell(told)
        if state is not None:
            unfinished = state.with_name(f".{state.name}")
            unfinished.write_text(json.dumps(told))
            unfinished.replace(state)
        try:
            while not ended.wait(CHECK_S):
                desk.check()
        finally:
            if state is not None:
                state.unlink(missing_ok=True)
            click.echo("bench: ending", err=True)


def _tell(told: dict[str, Any]) -> None:
    """How to use it."""
    first = told["places"][0]
    for place in told["places"]:
        click.echo(f"{place['name']}: {place['sold_as']} ({place['head']}), {place['rig']}")
    click.echo(
        f"""
  export LG_COORDINATOR={told["coordinator"]}
  labgrid-client places
  eval "$(labgrid-client reserve --wait --shell name={first["name"]})"
  labgrid-client -p + lock
  brownout rig check {first["rig"]} --live
  pytest scenarios -m smoke --lg-env {first["rig"]}
  labgrid-client -p + unlock

  brownout bench fault pull-out 1 --control {told["control"]}

Ctrl-C ends it."""
    )


@bench.command("fault")
@click.argument("action")
@click.argument("board", type=int)
@click.option("--control", required=True, help="the bench's address, as `bench up` prints it")
def bench_fault(action: str, board: int, control: str) -> None:
    """Do something to a board: pull-out, plug-in, weld, unweld, hang, unhang.

    Example: brownout bench fault weld 1 --control http://127.0.0.1:40001
    """
    if not control.startswith("http://127.0.0.1:"):
        raise RigError(f"--control: {control!r} is no address of a bench")
    request = Request(f"{control}/control/{board}/{action}", data=b"", method="POST")  # noqa: S310
    try:
        with urlopen(request, timeout=CONTROL_S) as answer:  # noqa: S310
            click.echo(answer.read().decode())
    except HTTPError as error:
        raise RigError(f"{action} {board}: {error.read().decode()}") from error
    except (URLError, OSError) as error:
        raise InfrastructureError(f"no bench at {control}: {error}") from error
