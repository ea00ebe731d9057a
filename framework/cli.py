"""`brownout VERB OBJECT`: the command of the framework.

Exit codes: 0 all well, 1 something did not hold, 2 wrong use or unusable rig or file, 3 the
explorer's oracle and a boot disagree, 130 interrupted.
Errors are one line; `--verbose` shows the whole chain.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
from rich.console import Console

from framework import replayer
from framework.bench_cli import bench
from framework.campaign import BundleError, CampaignError
from framework.campaign.models import CACHE_MODELS
from framework.demo import DemoError, run_demo
from framework.disk import MODELS, DiskError
from framework.explore.examine import EVERY, Bounds
from framework.explore.recording import SUFFIX
from framework.explorer import (
    JUDGES,
    Wish,
    parse_models,
    run_boot_state,
    run_explore,
    run_import,
    run_record,
    run_record_scenario,
)
from framework.farm_cli import farm
from framework.report import ResultError, ResultStore, write_report
from framework.report.results import name_of
from framework.rig_cli import rig
from framework.scenario.bench import BenchError
from framework.targets.errors import InfrastructureError, RigError, SimulationError

EXIT_NOT_HELD = 1
EXIT_UNUSABLE = 2
EXIT_INTERRUPTED = 130
_LOG_COLUMNS = 140
"""Of output that goes to no terminal: 80, as usual, would tear the tables in a CI job's log."""


def _console() -> Console:
    console = Console()
    return (
        console if console.is_terminal or "COLUMNS" in os.environ else Console(width=_LOG_COLUMNS)
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="brownout")
def cli() -> None:
    """Cut power and network under an A/B update, and prove that the device comes back."""


@cli.command()
@click.option(
    "--rig",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("rigs/qemu-arm64.yaml"),
    show_default=True,
    help="labgrid environment to run on",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/demo"),
    show_default=True,
    help="folder for the report and the Allure results",
)
@click.option("--workers", type=click.IntRange(1, 16), default=2, show_default=True)
def demo(rig: Path, output: Path, workers: int) -> None:
    """Build, boot, update, cut power and network, judge, report.

    Example: brownout demo --rig rigs/qemu-arm64.yaml
    """
    console = _console()
    passed = run_demo(rig, output, workers, console)
    if not passed:
        raise SystemExit(EXIT_NOT_HELD)


def _bases(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, Path]:
    """`vda=PATH` as a dictionary."""
    bases = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not name or not equals or not path:
            raise click.BadParameter(f"{text!r} is not like vda=PATH")
        bases[name] = Path(path)
    return bases


def _how_many(_: click.Context, parameter: click.Parameter, given: str) -> int:
    """A number, or `all`."""
    if given == "all":
        return EVERY
    if not given.isascii() or not given.isdigit():
        raise click.BadParameter(f"{given!r} is neither a number nor `all`", param=parameter)
    return min(int(given), EVERY)


def _accepted(
    _: click.Context, __: click.Parameter, given: tuple[str, ...]
) -> frozenset[tuple[str, int, str]]:
    """`torn:5` or `torn:5@RIG` as (model, invariant, rig)."""
    found = set()
    for text in given:
        finding, _at, rig = text.partition("@")
        model, _colon, number = finding.partition(":")
        if model not in MODELS or number not in tuple("12345678"):
            raise click.BadParameter(f"{text!r} is not like torn:5")
        found.add((model, int(number), rig))
    return frozenset(found)


BASE = click.option(
    "--base",
    "bases",
    multiple=True,
    metavar="DISK=PATH",
    callback=_bases,
    help="where a base image is, if not where the recording or bundle says; repeatable",
)
RIG = click.option(
    "--rig",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="labgrid environment to boot on, if not the one of the recording's name in rigs/",
)


@cli.command()
@click.option(
    "--rig",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("rigs/qemu-arm64.yaml"),
    show_default=True,
    help="labgrid environment to record on",
)
@click.option("--from", "base", default="v1", show_default=True, help="image in slot a")
@click.option(
    "--to",
    "variants",
    multiple=True,
    default=("v2", "unhealthy"),
    show_default=True,
    help="image in an update; repeatable, one after the other; `unhealthy` is rolled back",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="the recording's file  [default: build/explore/RIG-FROM-TO….recording]",
)
@click.option(
    "--flip-bit",
    type=click.FloatRange(0, 100),
    default=None,
    metavar="PERCENT",
    help="have the disk store one bit wrong, that far into the first update's image",
)
@click.option(
    "--scenario",
    default=None,
    metavar="NODEID",
    help="run this scenario instead, as pytest names it, with its faults and all; --from, --to and "
    "--flip-bit are of no use then",
)
def record(  # noqa: PLR0917 - click passes by name
    rig: Path,
    base: str,
    variants: tuple[str, ...],
    output: Path | None,
    flip_bit: float | None,
    scenario: str | None,
) -> None:
    """Record updates, each up to its commit or rollback, to cut them anywhere later.

    Example: brownout record --rig rigs/qemu-arm64.yaml --to v2
    """
    if scenario is not None:
        path = output or Path("build/explore") / f"{rig.stem}-{name_of(scenario)}{SUFFIX}"
        if not run_record_scenario(rig, scenario, path, _console()):
            sys.exit(EXIT_NOT_HELD)
        return
    path = output or Path("build/explore") / f"{'-'.join((rig.stem, base, *variants))}{SUFFIX}"
    run_record(rig, base, variants, path, _console(), flip_percent=flip_bit)


@cli.command()
@click.argument(
    "recordings", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path)
)
@click.option(
    "--model",
    "models",
    multiple=True,
    default=("all",),
    show_default=True,
    help="cache model, such as torn or torn:granularity=4096; repeatable",
)
@click.option(
    "--exhaustive-up-to",
    type=click.IntRange(0, 20),
    default=12,
    show_default=True,
    metavar="N",
    help="every subset of epochs with at most N writes at stake",
)
@click.option("--samples", type=click.IntRange(0), default=1000, show_default=True, metavar="M")
@click.option("--seed", type=int, default=1, show_default=True, metavar="S")
@click.option(
    "--judge",
    "judges",
    multiple=True,
    type=click.Choice(JUDGES),
    default=("static", "data"),
    show_default=True,
    help="repeatable; mount, uboot and coldboot run machines",
)
@click.option(
    "--data-checks",
    default="2000",
    show_default=True,
    callback=_how_many,
    metavar="N|all",
    help="most distinct data partitions that are checked",
)
@click.option("--mounts", type=click.IntRange(0), default=100, show_default=True)
@click.option("--decisions", type=click.IntRange(0), default=200, show_default=True)
@click.option("--cold-boots", type=click.IntRange(0), default=20, show_default=True)
@click.option(
    "--deep",
    default="0",
    show_default=True,
    callback=_how_many,
    metavar="N|all",
    help="cut again (depth two) what N distinct recoveries write, and the update tried again after",
)
@click.option(
    "--deep-minutes",
    type=click.FloatRange(0, min_open=True),
    default=None,
    help="begin no further recovery of a recording after so long  [default: no limit]",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="folder for the bundles of violations  [default: beside the recording]",
)
@BASE
@RIG
@click.option(
    "--accept",
    "accepted",
    multiple=True,
    metavar="MODEL:INVARIANT[@RIG]",
    callback=_accepted,
    help="a finding that is known, such as torn:5: told, but no failure; repeatable",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="also write the offline HTML report to FILE",
)
@click.option("--json", "as_json", is_flag=True, help="the result as JSON on standard output")
def explore(  # noqa: PLR0917 - one parameter an option
    recordings: tuple[Path, ...],
    models: tuple[str, ...],
    exhaustive_up_to: int,
    samples: int,
    seed: int,
    judges: tuple[str, ...],
    data_checks: int,
    mounts: int,
    decisions: int,
    cold_boots: int,
    deep: int,
    deep_minutes: float | None,
    output: Path | None,
    bases: dict[str, Path],
    rig: Path | None,
    accepted: frozenset[tuple[str, int, str]],
    report: Path | None,
    as_json: bool,
) -> None:
    """Cut recordings everywhere, judge every crash state, leave a bundle for each violation.

    Exit codes: 0 nothing broke, 1 an invariant broke on a device that keeps its promises, 2 the
    recording or rig can't be used, 3 the oracle and a boot disagree (then no verdict counts),
    130 interrupted.

    Example: brownout explore build/explore/qemu-arm64-v1-v2.recording --model subset --judge uboot
    """
    wish = Wish(
        parse_models(models),
        exhaustive_up_to,
        samples,
        seed,
        judges,
        Bounds(
            data_checks,
            mounts,
            decisions,
            cold_boots,
            deep=deep,
            deep_seconds=None if deep_minutes is None else 60 * deep_minutes,
        ),
        accepted,
    )
    code = run_explore(
        recordings,
        wish,
        output,
        _console(),
        bases=bases,
        rig=rig,
        report=report,
        as_json=as_json,
    )
    if code:
        raise SystemExit(code)


@cli.command("boot-state")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--recording",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="the recording, if not where the bundle says",
)
@BASE
@RIG
@click.option(
    "--export",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="write the disks to FILE instead of booting (one file a disk)",
)
@click.option(
    "--export-log",
    "export_as_log",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="write what makes the state as a dm-log-writes log to FILE (one file a disk)",
)
def boot_state(  # noqa: PLR0917 - one parameter an option
    bundle: Path,
    recording: Path | None,
    bases: dict[str, Path],
    rig: Path | None,
    export: Path | None,
    export_as_log: Path | None,
) -> None:
    """Boot the exact crash state of a bundle, with its console attached.

    Example: brownout boot-state build/explore/bundles/invariant-2-0123abcd-4
    """
    run_boot_state(
        bundle,
        _console(),
        recording=recording,
        bases=bases,
        rig=rig,
        export=export,
        export_as_log=export_as_log,
    )


@cli.command("import-log")
@click.argument("log", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--image",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="the disk's image from before the first entry",
)
@click.option(
    "--facts",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="layout, images and so on as JSON; framework/explore/RECORDING.md lists the keys",
)
@click.option("--device", default="vda", show_default=True, help="the disk's name in the layout")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), required=True)
def import_log_command(log: Path, image: Path, facts: Path, device: str, output: Path) -> None:
    """Make a recording of a dm-log-writes log that a real board wrote.

    Example: brownout import-log board.log --image board.img --facts board.json --output b.recording
    """
    click.echo(run_import(log, image, facts, device, output))


@cli.command()
@click.option("--lifetimes", type=click.IntRange(0), default=2500, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--workers", type=click.IntRange(1, 256), default=os.cpu_count() or 1)
@click.option("--single", is_flag=True, help="every power cut of one update, under every model")
@click.option(
    "--double",
    multiple=True,
    type=click.Choice(CACHE_MODELS),
    help="every pair of power cuts of one update under this cache model; repeatable",
)
@click.option(
    "--bootloader",
    type=click.Choice(("uboot", "grub", "mixed")),
    default="uboot",
    show_default=True,
    help="the devices' boot loader; mixed: either, by the seed",
)
@click.option("--replay", metavar="FILE", help="live through one schedule, and show it")
@click.option("--coverage", is_flag=True, help="one process; which branches of the client ran")
@click.option("--promote", metavar="FILE", help="live through one schedule on the rig --rig")
@RIG
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/simulate"),
    show_default=True,
    help="folder for violations",
)
def simulate(  # noqa: PLR0917 - click passes them by name
    lifetimes: int,
    seed: int,
    workers: int,
    single: bool,
    double: tuple[str, ...],
    bootloader: str,
    replay: str | None,
    coverage: bool,
    promote: str | None,
    rig: Path | None,
    output: Path,
) -> None:
    """Live through updates on simulated devices, with every kind of fault.

    Example: brownout simulate --lifetimes 100000 --seed 7 --single --double kept
    """
    # Only here: SQLite's VFS and the client's code are not needed for the rest.
    from framework.simulator import (  # noqa: PLC0415
        Search,
        run_coverage,
        run_promote,
        run_replay,
        run_simulate,
    )

    console = _console()
    if promote is not None:
        raise SystemExit(run_promote(promote, rig or Path("rigs/qemu-arm64.yaml"), console))
    if replay is not None:
        raise SystemExit(run_replay(replay, console))
    search = Search(lifetimes, seed, workers, single=single, double=double, bootloader=bootloader)
    if coverage:
        raise SystemExit(run_coverage(search, console))
    raise SystemExit(run_simulate(search, output, console))


@cli.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--rig",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="labgrid environment to run on, if not the one of the bundle's name in rigs/",
)
@click.option("--disks-only", is_flag=True, help="rebuild the disks from the journal; run nothing")
@click.option("--console", is_flag=True, help="boot what a cut left, with its console attached")
@click.option("--gdb", is_flag=True, help="as --console, but wait for a debugger before anything")
@click.option(
    "--cut",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="K",
    help="which cut's disks --console and --gdb boot",
)
@click.option(
    "--deterministic/--real-time",
    default=None,
    help="count the machine's time in instructions  [default: where the run had no network]",
)
@BASE
def replay(  # noqa: PLR0917 - click passes them by name
    bundles: tuple[Path, ...],
    rig: Path | None,
    disks_only: bool,
    console: bool,
    gdb: bool,
    cut: int,
    deterministic: bool | None,
    bases: dict[str, Path],
) -> None:
    """Do a bundle's run again: `reproduced`, or `diverged at event K`.

    A run without network is done again in deterministic mode; if it was made so, every disk
    operation has to agree as well.

    Several bundles, or a folder of them, end in a table. Exit codes: 0 all reproduced, 1 one came
    out otherwise, 2 a bundle or rig can't be used, 130 interrupted.

    Example: brownout replay build/bundles/test-power.bundle --console
    """
    terminal = _console()
    paths = replayer.bundles_in(bundles)
    if console or gdb:
        if len(paths) != 1:
            raise click.UsageError("--console and --gdb take one bundle")
        replayer.run_console(paths[0], rig, cut, terminal, gdb=gdb, bases=bases)
        return
    done = replayer.run_replay(
        paths, rig, terminal, disks_only=disks_only, bases=bases, deterministic=deterministic
    )
    if not done:
        raise SystemExit(EXIT_NOT_HELD)


@cli.command()
@click.option(
    "--rig",
    "rigs",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    default=(Path("rigs/qemu-arm64.yaml"),),
    show_default=True,
    help="labgrid environment to run on; repeatable",
)
@click.option("--runs", type=click.IntRange(1), default=None, help="how many compositions")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=None)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "-j", "--workers", type=click.IntRange(1, 64), default=None, help="[default: one a rig]"
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/campaign"),
    show_default=True,
    help="folder of the ledger (campaign.db) and of the bundles",
)
@click.option("--plant", default="", help="a planted bug (`python -m images list`), in all images")
@click.option(
    "--again",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="do every so many-th run that passed once more, to find flaky ones; 0: none",
)
@click.option("--stop-after", type=click.IntRange(0), default=0, help="end after N that violate")
@click.option("--only", multiple=True, metavar="SEED/INDEX", help="do this run again; repeatable")
@click.option(
    "--history",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    metavar="DB",
    help="show the campaigns of a ledger over time; run nothing",
)
def campaign(  # noqa: PLR0917 - click passes them by name
    rigs: tuple[Path, ...],
    runs: int | None,
    minutes: float | None,
    seed: int,
    workers: int | None,
    output: Path,
    plant: str,
    again: int,
    stop_after: int,
    only: tuple[str, ...],
    history: Path | None,
) -> None:
    """Run random compositions of faults, steered towards what was not struck yet.

    After an interrupt or a crash, the same command goes on. Exit codes: 0 all passed, 1 something
    violated an invariant, 2 the rig or the ledger can't be used, 130 interrupted.

    Example: brownout campaign --rig rigs/qemu-arm64.yaml --rig rigs/qemu-x86_64.yaml --runs 300
    """
    # Only here: neither labgrid nor a ledger is needed for the rest.
    from framework import campaigner  # noqa: PLC0415
    from framework.campaign.plan import Wish  # noqa: PLC0415

    console = _console()
    if history is not None:
        campaigner.show_history(history, console)
        return
    place = campaigner.Place(rigs, output, workers or len(rigs))
    if only:
        raise SystemExit(campaigner.run_only(only, plant, place, console))
    if runs is None and minutes is None:
        raise click.UsageError("say how much: --runs N, --minutes M, or both")
    seconds = None if minutes is None else minutes * 60
    checked = campaigner.rigs_of(rigs, plant, console)
    wish = Wish(seed, checked, runs, seconds, plant, again, stop_after)
    raise SystemExit(campaigner.run_campaign(wish, place, console))


@cli.command()
@click.argument("bundle", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--rig",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="labgrid environment to run on, if not the one of the bundle's name in rigs/",
)
@click.option("--runs", type=click.IntRange(1), default=60, show_default=True, help="at most")
@click.option(
    "--invariant", type=click.IntRange(1, 8), default=None, help="[default: the first violated]"
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/shrunk"),
    show_default=True,
    help="folder for the bundles",
)
def shrink(bundle: Path, rig: Path | None, runs: int, invariant: int | None, output: Path) -> None:
    """Make a campaign's failing run smaller: what matters in it stays.

    Exit codes: 0 the smallest was found, 1 the run does not violate any more.

    Example: brownout shrink build/campaign/bundles/campaign-7-42-3.bundle
    """
    from framework.shrinker import run_shrink  # noqa: PLC0415 - as in `campaign`

    console = _console()
    if not run_shrink(bundle, rig, output, console, most_runs=runs, invariant=invariant):
        raise SystemExit(EXIT_NOT_HELD)


@cli.command()
@click.argument("support_bundle", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--recording",
    "recordings",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="repeatable  [default: those in build/explore]",
)
@click.option(
    "--ledger",
    "ledgers",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="of campaigns; repeatable  [default: build/campaign/campaign.db]",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    default=("subset", "torn", "reordered"),
    show_default=True,
    help="cache model under which recordings are cut; repeatable",
)
@BASE
@click.option(
    "--rig",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="also perform compositions there that strike where the device failed",
)
@click.option("--runs", type=click.IntRange(1), default=10, show_default=True, help="with --rig")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--top", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/reproduce"),
    show_default=True,
    help="folder for the candidates' bundles",
)
def reproduce(  # noqa: PLR0917 - click passes them by name
    support_bundle: Path,
    recordings: tuple[Path, ...],
    ledgers: tuple[Path, ...],
    models: tuple[str, ...],
    bases: dict[str, Path],
    rig: Path | None,
    runs: int,
    seed: int,
    top: int,
    output: Path,
) -> None:
    """Find runs that end like a device in the field, of which there is a support bundle.

    Exit codes: 0 something contradicts none of its symptoms, 1 nothing does.

    Example: brownout reproduce support-20300101-120000.tar.zst --rig rigs/qemu-arm64.yaml
    """
    from framework.reproducer import Search, run_reproduce  # noqa: PLC0415 - as in `campaign`

    if not recordings and not ledgers:
        recordings = tuple(sorted(Path("build/explore").glob(f"*{SUFFIX}")))
        ledgers = tuple(p for p in (Path("build/campaign/campaign.db"),) if p.is_file())
    search = Search(recordings, bases, ledgers, parse_models(models), rig, runs, seed, top)
    if not run_reproduce(support_bundle, search, output, _console()):
        raise SystemExit(EXIT_NOT_HELD)


cli.add_command(bench)
cli.add_command(farm)
cli.add_command(rig)


@cli.group()
def report() -> None:
    """Work with the results of a run."""


@report.command("html")
@click.argument("results", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--title", default="Brownout", show_default=True)
def report_html(results: Path, output: Path, title: str) -> None:
    """Write the offline HTML report of a folder of results.

    Example: brownout report html build/demo/results --output report.html
    """
    click.echo(write_report(ResultStore(results).stored(), output, title))


def main() -> None:
    """Entry point: turns expected errors into one line and an exit code."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_UNUSABLE)
    except (click.Abort, KeyboardInterrupt):
        click.echo("brownout: interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except (
        BundleError,
        CampaignError,
        DemoError,
        ResultError,
        DiskError,
        BenchError,
        RigError,
        InfrastructureError,
        SimulationError,
    ) as error:
        click.echo(f"brownout: {error}", err=True)
        sys.exit(EXIT_UNUSABLE)


if __name__ == "__main__":
    main()
