"""`brownout rig`: check rig files without hardware, boards with it, and mark the sick ones."""

from __future__ import annotations

import os
from pathlib import Path

import click

from framework.targets.errors import InfrastructureError, RigError

EXIT_NOT_FIT, EXIT_INFRASTRUCTURE = 1, 4


@click.group()
def rig() -> None:
    """Check rig files and boards."""


@rig.command("check")
@click.argument("files", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--live", is_flag=True, help="also check the board, which must be yours (locked)")
@click.option("--cycles", type=click.IntRange(1, 1000), default=3, show_default=True)
@click.option(
    "--quarantine",
    is_flag=True,
    help="with --live: tag the place `health=quarantine` if it fails, `health=ok` if it passes",
)
def rig_check(files: tuple[Path, ...], live: bool, cycles: int, quarantine: bool) -> None:
    """Check environment and exporter files: every key and value; nothing is started.

    With --live, switch the board of the one environment off and on and say what it can do.
    Exit codes: 0 fit, 1 the board is not fit, 2 a file is wrong or the rig can't be used.

    Example: brownout rig check rigs/bench.yaml --live --quarantine
    """
    # Here: they import every driver.
    from framework.targets.exports import check_exporter, is_exporter  # noqa: PLC0415
    from framework.targets.rig import check_rig, is_remote, load_rig  # noqa: PLC0415

    if live and len(files) != 1:
        raise RigError("--live checks one rig at a time")
    if quarantine and not live:
        raise RigError("--quarantine needs --live")
    for path in files:
        if is_exporter(path):
            if live:
                raise RigError(f"{path}: is an exporter's file; --live takes an environment")
            click.echo(f"{path}: good, exports {check_exporter(path)} resources")
            continue
        check_rig(path)
        lent = ", its board is lent by a coordinator" if is_remote(load_rig(path)) else ""
        click.echo(f"{path}: good{lent}")
    if live and not _check_live(files[0], cycles, quarantine):
        raise SystemExit(EXIT_NOT_FIT)


def _check_live(path: Path, cycles: int, quarantine: bool) -> bool:
    """Check the board of a rig; whether it is fit."""
    from framework.targets.health import check_board, strategy_of  # noqa: PLC0415
    from framework.targets.places import Places  # noqa: PLC0415
    from framework.targets.rig import (  # noqa: PLC0415
        load_rig,
        open_target,
        remote_place,
        rig_features,
    )

    places = Places()
    name = remote_place(load_rig(path))
    if quarantine and not name:
        raise RigError(f"{path}: no coordinator lends its board, so nothing can be tagged")
    place = places.find(name).name if name else ""
    try:
        strategy = strategy_of(open_target(path))
        findings = check_board(
            strategy, rig_features(path), cycles=cycles, say=lambda f: click.echo(str(f))
        )
        failed = [finding for finding in findings if finding.held is False]
        reason = failed[0].question + ": " + failed[0].fact if failed else ""
    except InfrastructureError as error:
        if not quarantine:
            raise
        reason = str(error)
    if quarantine:
        if reason:
            places.quarantine(place, reason)
            click.echo(f"{place}: quarantined: {reason}")
        else:
            places.heal(place)
    places.close()
    return not reason


@rig.command("endure")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--cycles", type=click.IntRange(1), default=500, show_default=True, help="in all")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=None, help="stop then")
@click.option(
    "--record",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("build/endurance.db"),
    show_default=True,
    help="what became of each cycle; the same command goes on where it was interrupted",
)
def rig_endure(file: Path, cycles: int, minutes: float | None, path: Path) -> None:
    """Switch a board, which must be yours (locked), off and on again, hundreds of times.

    Off is what the power head says and the console shows; on is a boot never seen before. A cycle
    that the rig spoilt is counted apart (INFRASTRUCTURE) and done again, at most three times in a
    row. Exit codes: 0 always ready, 1 a boot failed, 2 the rig can't be used, 4 no boot failed but
    the rig did, or the time was over first.

    Example: brownout rig endure rigs/bench.yaml --cycles 500
    """
    # Here: they import every driver.
    from framework.targets.endurance import Cycle, CycleRecord, endure  # noqa: PLC0415
    from framework.targets.health import strategy_of  # noqa: PLC0415
    from framework.targets.places import Places  # noqa: PLC0415
    from framework.targets.rig import (  # noqa: PLC0415
        check_rig,
        load_rig,
        open_target,
        remote_place,
    )

    check_rig(file)
    board = file.stem
    name = remote_place(load_rig(file))
    if name:
        with Places() as places:
            board = places.find(name).name

    def say(number: int, cycle: Cycle) -> None:
        click.echo(f"{number:4} of {cycles}: {cycle.verdict}, {cycle.seconds:.1f} s: {cycle.fact}")

    with CycleRecord(path) as record:
        before = record.tally(board)
        if before.done:
            click.echo(f"before: {before}")
        strategy = strategy_of(open_target(file))
        seconds = None if minutes is None else 60 * minutes
        tally = endure(strategy, record, board, cycles, seconds=seconds, say=say)
    click.echo(str(tally))
    if tally.not_ready:
        raise SystemExit(EXIT_NOT_FIT)
    if tally.spoilt or tally.done < cycles:
        raise SystemExit(EXIT_INFRASTRUCTURE)


@rig.command("release")
@click.argument("place")
def rig_release(place: str) -> None:
    """Take a place out of quarantine, by hand: a person looked at it.

    Example: brownout rig release bench3
    """
    from framework.targets.places import Places  # noqa: PLC0415

    with Places() as places:
        if not places.find(place).quarantined:
            raise RigError(f"{place} is not quarantined ({places.coordinator})")
        places.heal(place)
    click.echo(f"{place}: released by {os.environ.get('USER', 'somebody')}")
