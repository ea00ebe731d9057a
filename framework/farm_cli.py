"""`brownout farm`: scenarios on many boards that a coordinator lends, and what is seen of them."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from framework.targets.errors import RigError

MOST_BOARDS = 200
HISTORY = click.option(
    "--history",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("build/farm/history.db"),
    show_default=True,
    help="what was seen of each board, and how long scenarios take",
)


@click.group()
def farm() -> None:
    """Run scenarios on boards that labgrid's coordinator (LG_COORDINATOR) lends."""


@farm.command("run")
@click.argument("scenarios", nargs=-1, required=True)
@click.option("--tags", multiple=True, required=True, help="which boards, such as board=rpi4")
@click.option("--boards", type=click.IntRange(1, MOST_BOARDS), default=1, show_default=True)
@click.option(
    "--lg-env",
    "rig",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("rigs/bench.yaml"),
    show_default=True,
    help="rig file for such boards; its place is `+`",
)
@click.option("-m", "select", default="", help="only scenarios with these marks, as pytest")
@click.option("-k", "keyword", default="", help="only scenarios with such names, as pytest")
@click.option(
    "--retries",
    type=click.IntRange(0, 10),
    default=2,
    show_default=True,
    help="how often a scenario that ends INFRASTRUCTURE is tried again, on another board",
)
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(1),
    default=600.0,
    show_default=True,
    help="seconds to wait for a board that others have",
)
@click.option(
    "--check/--skip-check", default=True, show_default=True, help="check each board before its use"
)
@click.option("--cycles", type=click.IntRange(1, 100), default=1, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/farm"),
    show_default=True,
    help="folder for results and report",
)
@click.option("--junit", type=click.Path(dir_okay=False, path_type=Path), default=None)
@click.option("--bundles", type=click.Path(file_okay=False, path_type=Path), default=None)
@HISTORY
def farm_run(  # noqa: PLR0917 - click passes them by name
    scenarios: tuple[str, ...],
    tags: tuple[str, ...],
    boards: int,
    rig: Path,
    select: str,
    keyword: str,
    retries: int,
    wait_s: float,
    check: bool,
    cycles: int,
    seed: int,
    report: Path,
    junit: Path | None,
    bundles: Path | None,
    history: Path,
) -> None:
    """Run scenarios in parallel, one board a worker, and hand every board back.

    Boards are taken by labgrid's reservations, among those with the tag health=ok. Each is checked
    first; one that is not fit is quarantined, the others go on. A scenario that ends INFRASTRUCTURE
    is tried again on another board. Exit codes: 0 all passed, 1 something failed, 2 it can't be
    run, 4 nothing failed but something ended INFRASTRUCTURE, 130 interrupted.

    Example: brownout farm run scenarios -m smoke --tags board=rpi4 --boards 8
    """
    # Here: they import labgrid.
    from framework.farm.controller import Wish  # noqa: PLC0415
    from framework.farm.run import run_farm  # noqa: PLC0415
    from framework.targets.places import parse_tags  # noqa: PLC0415

    for scenario in scenarios:
        path = Path(scenario.partition("::")[0])
        if not path.exists():
            raise RigError(f"{path}: there are no such scenarios")
    wish = Wish(
        scenarios=scenarios,
        rig=rig,
        tags=parse_tags(tags),
        boards=boards,
        report=report,
        history=history,
        select=select,
        keyword=keyword,
        retries=retries,
        wait_s=wait_s,
        check_cycles=cycles if check else 0,
        seed=seed,
        junit=junit,
        bundles=bundles,
    )
    report.mkdir(parents=True, exist_ok=True)
    code = run_farm(wish, Console())
    if code:
        raise SystemExit(code)


@farm.command("free")
@click.option("--dry-run", is_flag=True, help="only say which they are")
def farm_free(dry_run: bool) -> None:
    """Hand back the places of runs that are dead, and say whose they were.

    A run on this host is dead when its process is; one on another host when its lease has expired.
    The places of living runs are never touched, nor are those that somebody locked by hand.

    Example: brownout farm free
    """
    from framework.farm.tenure import free_dead  # noqa: PLC0415
    from framework.targets.places import Places  # noqa: PLC0415

    with Places() as places:
        found = free_dead(places, dry=dry_run)
        for each in found:
            click.echo(str(each).removesuffix("; freed") if dry_run else str(each))
        if not found:
            click.echo(f"{places.coordinator}: no place of a dead run")


@farm.command("stats")
@HISTORY
@click.option("--json", "as_json", is_flag=True)
def farm_stats(history: Path, as_json: bool) -> None:
    """Show what was seen of each board: cycles, boots, failures, INFRASTRUCTURE.

    Example: brownout farm stats --json
    """
    from attrs import asdict  # noqa: PLC0415

    from framework.farm.history import History  # noqa: PLC0415
    from framework.farm.run import boards_table  # noqa: PLC0415

    if not history.exists():
        raise RigError(f"{history}: there is no such history")
    with History(history) as opened:
        boards = opened.boards()
    if as_json:
        told = [
            {**asdict(board), "infrastructure_rate": board.infrastructure_rate} for board in boards
        ]
        click.echo(json.dumps(told, indent=1))
    else:
        Console().print(boards_table(boards, str(history)))
