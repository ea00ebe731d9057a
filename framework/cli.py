"""`brownout VERB OBJECT`: the command of the framework.

Exit codes: 0 all well, 1 something did not hold, 2 wrong use or unusable rig, 130 interrupted.
Errors are one line; `--verbose` shows the whole chain.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console

from framework.demo import DemoError, run_demo
from framework.report import ResultError, ResultStore, write_report

EXIT_NOT_HELD = 1
EXIT_UNUSABLE = 2
EXIT_INTERRUPTED = 130


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
    console = Console()
    passed = run_demo(rig, output, workers, console)
    if not passed:
        raise SystemExit(EXIT_NOT_HELD)


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
    click.echo(write_report(ResultStore(results).read_all(), output, title))


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
    except (DemoError, ResultError) as error:
        click.echo(f"brownout: {error}", err=True)
        sys.exit(EXIT_UNUSABLE)


if __name__ == "__main__":
    main()
