"""`updater`: the command line on the device, and `updater artifact|server …` on the host.

Exit codes: 0 done, 1 error, 2 nothing in progress, 4 reboot needed, 130 and 143 interrupted.
Whatever happens, the last word is one line, not a traceback (`--verbose` shows that too).

`updater resume` runs at every boot, so it is recognised before argparse is imported, and each
verb imports what it needs and nothing more.
"""

from __future__ import annotations

import sys

from updater.device.config import DEFAULT_PATH, Config, load_config
from updater.device.console import say
from updater.device.errors import (
    BusyError,
    InterruptedBySignal,
    NothingInProgressError,
    UpdaterError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from updater.device.client import Client

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_NOTHING_IN_PROGRESS = 2
EXIT_REBOOT_NEEDED = 4

_EPILOG = """\
examples:
  updater install https://updates.example.com/v2.mender
  updater artifact write rootfs-image -f rootfs.img -n v2 -t qemu-arm64 -o v2.mender -k key.pem

exit codes: 0 done, 1 error, 2 nothing in progress, 4 reboot needed, 130/143 interrupted
"""


def main(
    arguments: list[str] | None = None, compose: Callable[[Config], Client] | None = None
) -> int:
    """Run one command; return its exit code.

    `compose` puts the client's surroundings together; without it they are the device's own.
    """
    from updater.device.signals import install_handlers  # noqa: PLC0415

    given = sys.argv[1:] if arguments is None else arguments
    install_handlers()
    verbose = "--verbose" in given or "-v" in given
    try:
        if given == ["resume"]:
            return _on_device("resume", DEFAULT_PATH, compose or open_client)
        if given[:1] == ["server"]:
            # Interrupts are uvicorn's and click's there.
            import signal  # noqa: PLC0415

            from updater.server import cli as server_cli  # noqa: PLC0415

            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            return server_cli.main(given[1:], verbose=verbose)
        options = _parse(given)
        if options.verb == "artifact":
            from updater.artifact import cli as artifact_cli  # noqa: PLC0415

            return artifact_cli.run(options)
        return _on_device(options.verb, options.config, compose or open_client, options)
    except InterruptedBySignal as interrupt:
        say(f"error: {interrupt}; nothing is lost, run the command again")
        return interrupt.exit_code
    except NothingInProgressError as error:
        say(f"error: {error}")
        return EXIT_NOTHING_IN_PROGRESS
    except Exception as error:  # noqa: BLE001 - the last word must be one line
        if verbose:
            import traceback  # noqa: PLC0415

            traceback.print_exc()
        known = isinstance(error, UpdaterError) or type(error).__module__.startswith("updater.")
        say(f"error: {error}" if known else f"error: internal: {type(error).__name__}: {error}")
        return EXIT_ERROR


def _on_device(
    verb: str,
    config_path: str,
    compose: Callable[[Config], Client],
    options: argparse.Namespace | None = None,
) -> int:
    config = load_config(config_path)
    if verb in ("show-artifact", "show-provides", "status"):
        return _show(verb, compose(config))
    from updater.device import lock  # noqa: PLC0415

    try:
        lock.take(config.data_dir, verb)
    except BusyError as error:
        if verb == "commit" and error.verb in ("commit", "resume"):
            raise NothingInProgressError(f"{error}: it commits") from error
        raise
    client = compose(config)
    try:
        if verb == "install":
            assert options is not None
            client.install(options.source)
            return EXIT_REBOOT_NEEDED if options.reboot_exit_code else EXIT_OK
        getattr(client, verb)()
    except UpdaterError as error:
        if not client.reboot_needed:
            raise
        say(f"error: {error}")
    return EXIT_REBOOT_NEEDED if client.reboot_needed else EXIT_OK


def open_client(config: Config) -> Client:
    """Put the device's own implementations together: the one place where they meet."""
    from updater.device.blockdev import LinuxMachine  # noqa: PLC0415
    from updater.device.bootenv import open_environment  # noqa: PLC0415
    from updater.device.client import Client, Ports  # noqa: PLC0415
    from updater.device.clock import SystemClock  # noqa: PLC0415
    from updater.device.health import HealthRunner  # noqa: PLC0415
    from updater.device.reboot import ExitCodeReboot  # noqa: PLC0415
    from updater.device.store import SqliteStore, database_path  # noqa: PLC0415
    from updater.device.transport import FileOrHttpsTransport  # noqa: PLC0415

    clock = SystemClock()
    return Client(
        config,
        Ports(
            machine=LinuxMachine(),
            bootenv=open_environment(config.bootenv),
            store=SqliteStore(database_path(config.data_dir)),
            clock=clock,
            transport=FileOrHttpsTransport(config.ca_file, config.download, clock),
            reboot=ExitCodeReboot(),
            health=HealthRunner(config.health_directory, config.health_timeout_s),
        ),
    )


def _show(verb: str, client: Client) -> int:
    if verb == "show-artifact":
        lines = [client.artifact_name()]
    elif verb == "show-provides":
        lines = [f"{key}={value}" for key, value in client.provides().items()]
    else:
        lines = client.status()
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
    return EXIT_OK


def _parse(given: list[str]) -> argparse.Namespace:
    import argparse  # noqa: PLC0415
    from typing import NoReturn  # noqa: PLC0415

    class Parser(argparse.ArgumentParser):
        """argparse would exit with 2, which means "nothing in progress" here."""

        def error(self, message: str) -> NoReturn:
            raise UpdaterError(f"{message}; see `{self.prog} --help`")

    parser = Parser(
        prog="updater",
        description="A/B updates that survive a power cut at any moment.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", default=DEFAULT_PATH, metavar="FILE", help=f"default: {DEFAULT_PATH}"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show the chain of an error")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    install = verbs.add_parser("install", help="install an artifact into the passive slot")
    install.add_argument("source", metavar="FILE|URL", help="a path or an https URL")
    install.add_argument(
        "--reboot-exit-code", action="store_true", help="exit with 4 when a reboot is needed"
    )
    for name, text in (
        ("commit", "check the running system's health and keep it"),
        ("rollback", "give up the update in progress"),
        ("resume", "go on after a restart (run by init at boot)"),
        ("show-artifact", "print the name of the artifact that runs"),
        ("show-provides", "print what the committed system provides"),
        ("status", "print the state, the last outcome and its cause"),
    ):
        verbs.add_parser(name, help=text)
    verbs.add_parser("server", help="run and manage an update server (host)", add_help=False)
    artifact = verbs.add_parser("artifact", help="write, read and validate artifacts (host)")
    if given and "artifact" in given:
        from updater.artifact import cli as artifact_cli  # noqa: PLC0415

        artifact_cli.add_arguments(artifact)
    return parser.parse_args(given)


if __name__ == "__main__":
    raise SystemExit(main())
