"""`brownout replay`: bundles done again, or one of them opened at a cut, on a console or debugger.

What is compared is `framework.campaign`'s; here are the progress, the table, and the terminal.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from framework.campaign.bundle import SUFFIX, Bundle, BundleError, read_bundle, unpack_journal
from framework.campaign.replay import rebased, replay
from framework.campaign.replays import Again, replay_all
from framework.disk import BaseImageError, DiskError, JournalReader
from framework.explore.serve import StateMachine, Workplace
from framework.explorer import machine_on
from framework.terminal import keys, raw_terminal, show


def bundles_in(given: Sequence[Path]) -> list[Path]:
    """The bundles among some paths; a folder stands for those in it. Raises BundleError."""
    found: list[Path] = []
    for path in given:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(path.glob(f"*{SUFFIX}"))
        if not inside:
            raise BundleError(f"{path}: has no file that ends in {SUFFIX}")
        found.extend(inside)
    return found


def rig_for(bundle: Bundle, rig: Path | None) -> Path:
    """The rig file to use: the one asked for, or the one of the bundle's name."""
    return rig or Path("rigs") / bundle.rig


def run_replay(
    paths: Sequence[Path],
    rig: Path | None,
    console: Console,
    *,
    disks_only: bool,
    bases: Mapping[str, Path] | None = None,
    deterministic: bool | None = None,
) -> bool:
    """Do bundles again; whether all came out the same. Raises BundleError for a single one.

    `deterministic`: whether the machines' time is to be their own; None: where there was no
    network.
    """
    if len(paths) > 1:
        return _run_many(paths, rig, console, disks_only, bases, deterministic)
    done = replay(
        paths[0],
        rig_for(read_bundle(paths[0]), rig),
        lambda text: console.print(text, markup=False, soft_wrap=True),
        disks_only=disks_only,
        bases=bases,
        deterministic=deterministic,
    )
    for difference in done.disks:
        console.print(f"not the same: {difference}", markup=False)
    if done.divergence is not None:
        console.print(str(done.divergence), markup=False)
    if done.reproduced:
        note = f", {done.note}" if done.note else ""
        console.print(f"reproduced{note}", markup=False)
    return done.reproduced


def _run_many(  # noqa: PLR0917 - what, where, and how
    paths: Sequence[Path],
    rig: Path | None,
    console: Console,
    disks_only: bool,
    bases: Mapping[str, Path] | None,
    deterministic: bool | None,
) -> bool:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("bundles", total=len(paths))

        def done(again: Again) -> None:
            name = again.path.name if again.bundle is None else again.bundle.scenario
            console.print(f"{name}: {again.told}", markup=False, soft_wrap=True)
            progress.advance(task)

        ended = replay_all(
            paths,
            lambda bundle: rig_for(bundle, rig),
            done,
            disks_only=disks_only,
            bases=bases,
            deterministic=deterministic,
        )
    console.print(_table(ended))
    idle = sum(again.idle for again in ended)
    same = sum(again.reproduced for again in ended)
    cuts = sum(len(a.bundle.cuts) for a in ended if a.bundle is not None and a.replayed is not None)
    rest = f"; {idle} had no power cut" if idle else ""
    console.print(f"{same} of {len(ended) - idle} reproduced; {cuts} cuts rebuilt{rest}")
    return same == len(ended) - idle


def _table(ended: Sequence[Again]) -> Table:
    table = Table(title="Bundles done again", expand=True)
    for name, ratio in (("Run", 5), ("It was", 2), ("It is", 2), ("Cuts", 1), ("Outcome", 5)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for again in sorted(ended, key=lambda each: (each.reproduced, each.path)):
        bundle, now = again.bundle, again.replayed
        colour = "green" if again.reproduced else "dim" if again.idle else "red"
        table.add_row(
            again.path.name if bundle is None else bundle.scenario.rpartition("/")[2],
            "" if bundle is None else bundle.verdict,
            "" if now is None else now.verdict,
            "" if bundle is None else str(len(bundle.cuts)),
            f"[{colour}]{_escaped(again.told)}[/]",
        )
    return table


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def run_console(
    path: Path,
    rig: Path | None,
    cut: int,
    console: Console,
    *,
    gdb: bool,
    bases: Mapping[str, Path] | None = None,
) -> None:
    """Boot the disks that a bundle's cut left, with its console here; `gdb`: a debugger first.

    Raises BundleError, RigError or InfrastructureError.
    """
    bundle = rebased(read_bundle(path), bases or {})
    if cut >= len(bundle.cuts):
        raise BundleError(
            f"bundle {path}: has no cut {cut}: the run had {len(bundle.cuts)}"
            + (f", 0 to {len(bundle.cuts) - 1}" if bundle.cuts else " power cuts")
        )
    facts = bundle.cuts[cut]
    machine = machine_on(rig_for(bundle, rig))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="brownout-bundle-")))
        journal = unpack_journal(path, bundle, folder / "disk.journal")
        try:
            images = {name: Path(base) for name, (base, _) in bundle.bases.items()}
            reader = JournalReader(journal, images, verify_bases=True)
            disks = {
                name: stack.enter_context(reader.after_cut(facts.index, name))
                for name in reader.devices
            }
        except BaseImageError as error:
            raise BundleError(f"bundle {path}: {error}; build the images it was made of") from error
        except DiskError as error:
            raise BundleError(f"bundle {path}: {error}") from error
        if gdb:
            port = _free_port()
            machine = replace(
                machine, extra_args=(*machine.extra_args, "-gdb", f"tcp:127.0.0.1:{port}")
            )
            console.print(
                f"waiting for a debugger: gdb-multiarch -ex 'target remote 127.0.0.1:{port}'"
                " (and `continue` there)",
                markup=False,
                soft_wrap=True,
            )
        place = stack.enter_context(Workplace())
        running = stack.enter_context(StateMachine(machine, disks, place))
        console.print(
            f"cut {cut} of {len(bundle.cuts)}: after operation {facts.operation}, {facts.model}, "
            f"seed {facts.seed}; console attached; Ctrl-] ends it",
            markup=False,
            soft_wrap=True,
        )
        with raw_terminal():
            running.converse(keys, show, paused=gdb)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
