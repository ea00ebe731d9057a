"""`updater server …`: make, run and look after a server; manage a fleet through its API.

Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted. The commands that manage a fleet
(`fleet_cli.py`) speak the management API over TLS; the others work on a server's folder.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from updater.server.errors import RefusedError, ServerError
from updater.server.fleet_cli import fleet

# What QEMU's user network calls the host (QEMU's manual, "Network emulation").
_QEMU_HOST = "10.0.2.2"
_FOLDER = click.argument(
    "folder", type=click.Path(path_type=Path, file_okay=True), default=Path("updater-server")
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="example: updater server init --name updates.example.com && updater server run",
)
def server() -> None:
    """The TLS-only update server."""


@server.command()
@_FOLDER
@click.option("--name", "names", multiple=True, help="DNS name or address of this server.")
@click.option("--port", type=click.IntRange(0, 65535), default=8443, show_default=True)
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen on.")  # noqa: S104
@click.option(
    "--artifact-key",
    "artifact_keys",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Public key; only artifacts signed by one are taken.",
)
@click.option("--database-url", default="", help="postgresql://…; default: SQLite in the folder.")
def init(
    folder: Path,
    names: tuple[str, ...],
    port: int,
    host: str,
    artifact_keys: tuple[Path, ...],
    database_url: str,
) -> None:
    """Make a server's FOLDER: authority, certificate, settings, database, first admin."""
    from updater.server.setup import initialise  # noqa: PLC0415

    made = initialise(
        folder,
        list(names) or ["localhost", "127.0.0.1"],
        port,
        host,
        list(artifact_keys),
        database_url,
    )
    click.echo(f"made {folder}; start it with: updater server run {folder}")
    click.echo(f"web page: {made.url}/  user: admin  password: {made.admin_password}")
    click.echo(f"authority: {folder / 'ca.pem'}")
    click.echo(f"SHA-256 fingerprint: {made.fingerprint}")
    click.echo(f"\nTo connect a device:\n\n{made.device_configuration}", nl=False)
    if _QEMU_HOST in names:
        from updater.server.setup import qemu_device  # noqa: PLC0415

        authority = (folder / "ca.pem").read_text()
        click.echo(f"\n{qemu_device(authority, _QEMU_HOST, port)}", nl=False)


@server.command()
@_FOLDER
@click.option("--port", type=click.IntRange(0, 65535), help="Instead of the settings' port.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
def run(folder: Path, port: int | None, log_level: str | None) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    from updater.server.app import create_app  # noqa: PLC0415
    from updater.server.core import open_core  # noqa: PLC0415
    from updater.server.run import serve, set_up_logging  # noqa: PLC0415
    from updater.server.settings import load_settings  # noqa: PLC0415

    changes = {"port": port, "log_level": log_level}
    settings = load_settings(folder, **{k: v for k, v in changes.items() if v is not None})
    set_up_logging(settings.log_level)
    core = open_core(settings)
    try:
        core.database.check_schema()
        serve(
            create_app(core),
            settings,
            lambda bound: click.echo(f"listening on https://{settings.host}:{bound}"),
        )
    finally:
        core.database.close()


@server.command()
@_FOLDER
def migrate(folder: Path) -> None:
    """Bring the database to this version's schema."""
    from updater.server.database import Database  # noqa: PLC0415
    from updater.server.settings import load_settings  # noqa: PLC0415

    database = Database(load_settings(folder).database_url)
    try:
        database.migrate()
    finally:
        database.close()
    click.echo("the database is up to date")


@server.command("token")
@_FOLDER
@click.option("--user", default="admin", show_default=True)
@click.option("--label", default="command line", show_default=True)
@click.option("--days", type=click.IntRange(1, 3650), default=365, show_default=True)
def token(folder: Path, user: str, label: str, days: int) -> None:
    """Make an API token for a user and print it: for the other commands and for scripts."""
    from updater.server import accounts  # noqa: PLC0415
    from updater.server.audit import record  # noqa: PLC0415
    from updater.server.database import Database  # noqa: PLC0415
    from updater.server.settings import load_settings  # noqa: PLC0415

    database = Database(load_settings(folder).database_url)
    now = time.time()

    def job(session: Any) -> str:
        found = accounts.require_user(session, user)
        record(session, now, "command line", "token.create", found.id, label=label)
        return accounts.grant(session, found.id, accounts.TOKEN, label, now, days * 86_400.0)

    try:
        click.echo(database.write_now(job))
    finally:
        database.close()


@server.command("password")
@_FOLDER
@click.option("--user", default="admin", show_default=True)
@click.password_option()
def password(folder: Path, user: str, password: str) -> None:
    """Set a user's password."""
    from updater.server import accounts  # noqa: PLC0415
    from updater.server.database import Database  # noqa: PLC0415
    from updater.server.settings import load_settings  # noqa: PLC0415

    hashed = accounts.hash_password(password)
    database = Database(load_settings(folder).database_url)
    try:
        database.write_now(
            lambda s: accounts.change_user(
                s, user, "command line", time.time(), password_hash=hashed
            )
        )
    finally:
        database.close()


@server.command()
@_FOLDER
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False))
def backup(folder: Path, output: Path) -> None:
    """Copy FOLDER's server (which may run) into the tar OUTPUT."""
    from updater.server.backup import back_up  # noqa: PLC0415
    from updater.server.settings import load_settings  # noqa: PLC0415

    back_up(load_settings(folder), output, click.echo)


@server.command()
@click.argument("backup_file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("folder", type=click.Path(path_type=Path))
def restore(backup_file: Path, folder: Path) -> None:
    """Unpack BACKUP_FILE into the new FOLDER."""
    from updater.server.backup import restore as unpack  # noqa: PLC0415

    unpack(backup_file, folder, click.echo)


@server.command()
@click.option("--url", envvar="UPDATER_SERVER_URL", default="https://localhost:8443")
@click.option("--ca", envvar="UPDATER_SERVER_CA", type=click.Path(path_type=Path), required=True)
@click.option("--devices", type=click.IntRange(1, 1_000_000), default=100, show_default=True)
@click.option("--device-type", default="simulated", show_default=True)
@click.option("--artifact-name", default="v1", show_default=True, help="What they run at first.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--pause", type=click.FloatRange(0), default=2.0, metavar="SECONDS")
@click.option("--connections", type=click.IntRange(1, 20_000), default=64, show_default=True)
@click.option("--fail", type=click.FloatRange(0, 100), default=0.0, metavar="PERCENT")
@click.option("--seed", type=int, default=0, show_default=True)
def simulate(
    url: str,
    ca: Path,
    devices: int,
    device_type: str,
    artifact_name: str,
    rounds: int,
    pause: float,
    connections: int,
    fail: float,
    seed: int,
) -> None:
    """Be a fleet: the real protocol over TLS, then a table of latencies."""
    import asyncio  # noqa: PLC0415

    from updater.server import simulate as fleet  # noqa: PLC0415

    figures = asyncio.run(
        fleet.run(
            url,
            ca,
            devices=devices,
            device_type=device_type,
            artifact_name=artifact_name,
            rounds=rounds,
            pause_s=pause,
            connections=connections,
            fail_percent=fail,
            seed=seed,
            say=click.echo,
        )
    )
    click.echo("\n".join(figures.lines()))
    if figures.errors:
        raise ServerError(f"{sum(figures.errors.values())} requests failed")


server.add_command(fleet)


def main(arguments: list[str], *, verbose: bool = False) -> int:
    """Run one command; return its exit code. Every error is one line."""
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

    from updater.server.database import one_line  # noqa: PLC0415

    try:
        server.main(arguments, prog_name="updater server", standalone_mode=False)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.UsageError as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("error: interrupted", err=True)
        return 130
    except (ServerError, RefusedError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else error
        click.echo(f"error: {message}", err=True)
    except SQLAlchemyError as error:
        click.echo(f"error: the database: {one_line(error)}", err=True)
    except OSError as error:
        click.echo(f"error: {error.filename or ''}: {error.strerror}", err=True)
    except Exception as error:
        if verbose:
            raise
        click.echo(f"error: internal: {type(error).__name__}: {error}", err=True)
    else:
        return 0
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
