"""`updater`: the command line on the device, and `updater artifact|server …` on the host.

Exit codes: 0 done, 1 error, 2 nothing in progress, 4 reboot needed, 130 and 143 interrupted.
Whatever happens, the last word is one line, not a traceback (`--verbose` shows that too).

`updater resume` runs at every boot, so it is recognised before argparse is imported, and each
verb imports what it needs and nothing more; `updater --help` needs nothing but its text
(`device/usage.py`).
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any

    from updater.device.client import Client
    from updater.device.config import Config
    from updater.device.modules import ModuleRunner
    from updater.device.scripts import ScriptRunner

EXIT_OK = 0
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
    given = sys.argv[1:] if arguments is None else arguments
    if given in (["--help"], ["-h"]):
        from updater.device.usage import TEXT  # noqa: PLC0415

        sys.stdout.write(TEXT)
        return EXIT_OK
    if "install" in given or "daemon" in given:
        from updater.device import ciphers  # noqa: PLC0415

        ciphers.prefer_fast_ciphers()  # before anything else loads OpenSSL
    from updater.device.console import say  # noqa: PLC0415
    from updater.device.errors import (  # noqa: PLC0415
        InterruptedBySignal,
        NothingInProgressError,
    )
    from updater.device.signals import install_handlers  # noqa: PLC0415

    install_handlers()
    verbose = "--verbose" in given or "-v" in given
    try:
        if given == ["resume"]:
            from updater.device.config import DEFAULT_PATH  # noqa: PLC0415

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
        if options.verb == "setup":
            return _set_up(options)
        if options.verb == "support-bundle":
            # Before the configuration is looked at: it may be what is broken.
            from updater.device.support_bundle import write_bundle  # noqa: PLC0415

            place = write_bundle(options.output, options.config, slot_hashes=options.slot_hashes)
            say(f"wrote {place}")
            return EXIT_OK
        return _on_device(options.verb, options.config, compose or open_client, options)
    except (InterruptedBySignal, Exception) as error:  # noqa: BLE001 - the last word is one line
        if verbose and not isinstance(error, (InterruptedBySignal, NothingInProgressError)):
            import traceback  # noqa: PLC0415

            traceback.print_exc()
        from updater.device.command import last_word  # noqa: PLC0415

        return last_word(error)


def _on_device(
    verb: str,
    config_path: str,
    compose: Callable[[Config], Client],
    options: argparse.Namespace | None = None,
) -> int:
    from updater.device.command import operate  # noqa: PLC0415
    from updater.device.config import load_config  # noqa: PLC0415
    from updater.device.errors import BusyError, NothingInProgressError  # noqa: PLC0415

    config = load_config(config_path)
    if verb == "daemon":
        assert options is not None
        return _daemon(config, compose, once=options.once)
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
    source = "" if options is None or verb != "install" else options.source
    code = operate(client, verb, source)
    if verb == "install" and options is not None and options.reboot_exit_code:
        return EXIT_REBOOT_NEEDED
    return code


def _daemon(config: Config, compose: Callable[[Config], Client], *, once: bool) -> int:
    """Run managed mode until a signal; the key is made before anything else."""
    from updater.device.api import DeviceApi  # noqa: PLC0415
    from updater.device.errors import ConfigError  # noqa: PLC0415
    from updater.device.identity import identity, open_key  # noqa: PLC0415
    from updater.device.managed import Daemon, DeploymentLog, ServerObserver  # noqa: PLC0415

    if not config.server.url:
        raise ConfigError(f"{config.path}: there is no [server] with a url to be managed by")
    first = compose(config)
    clock = first.ports.clock
    import os  # noqa: PLC0415

    os.makedirs(config.data_dir, mode=0o700, exist_ok=True)  # noqa: PTH103
    api = DeviceApi(
        config.server,
        config.ca_file,
        open_key(config),
        identity(config.server),
    )
    log = DeploymentLog(config.data_dir, clock)
    observer = ServerObserver(config, api, log, clock)

    def make_client() -> Client:
        client = compose(config)
        client.ports = client.ports._replace(observer=observer)
        return client

    Daemon(config, api, observer, log, make_client).run(once=once)
    return EXIT_OK


def _set_up(options: argparse.Namespace) -> int:
    from updater.device.console import say  # noqa: PLC0415
    from updater.device.setup import Wish, set_up  # noqa: PLC0415

    wish = Wish(
        device_type=options.device_type,
        slots=tuple(options.slot),
        data_dir=options.data_dir,
        fw_env_config=options.fw_env_config,
        grub_copies=tuple(options.grub_env),
        artifact_keys=tuple(options.artifact_key),
        ca_file=options.ca_file,
        server_url=options.server,
        artifact_name=options.artifact_name,
    )
    changed = set_up(wish, options.config, force=options.force, dry_run=options.dry_run)
    if not options.dry_run:
        say(f"{options.config}: {'written' if changed else 'is as it should be'}")
    return EXIT_OK


def _add_setup(verbs: argparse._SubParsersAction[Any]) -> None:
    setup = verbs.add_parser("setup", help="check this system and write its configuration")
    setup.add_argument("--device-type", required=True, metavar="TYPE")
    setup.add_argument("--slot", action="append", required=True, metavar="DEVICE", help="twice")
    setup.add_argument("--data-dir", default="/data/updater", metavar="FOLDER")
    setup.add_argument("--fw-env-config", default="", metavar="FILE", help="U-Boot's environment")
    setup.add_argument(
        "--grub-env", action="append", default=[], metavar="FILE", help="GRUB's, twice"
    )
    setup.add_argument("--artifact-key", action="append", default=[], metavar="PEM")
    setup.add_argument("--ca-file", default="", metavar="PEM")
    setup.add_argument("--server", default="", metavar="URL", help="to be managed by")
    setup.add_argument("--artifact-name", default="unknown", metavar="NAME", help="what runs now")
    setup.add_argument("--force", action="store_true", help="replace a different configuration")
    setup.add_argument(
        "--dry-run", action="store_true", help="check, and say what would be written"
    )


def open_client(config: Config) -> Client:
    """Put the device's own implementations together: the one place where they meet."""
    from updater.device.blockdev import LinuxMachine  # noqa: PLC0415
    from updater.device.bootenv import open_environment  # noqa: PLC0415
    from updater.device.client import Client, LeaveToDaemon, NoObserver, Ports  # noqa: PLC0415
    from updater.device.clock import SystemClock, floor_seconds, raise_to  # noqa: PLC0415
    from updater.device.health import HealthRunner  # noqa: PLC0415
    from updater.device.later import later  # noqa: PLC0415
    from updater.device.reboot import ExitCodeReboot  # noqa: PLC0415
    from updater.device.signals import limit  # noqa: PLC0415
    from updater.device.store import SqliteStore, database_path  # noqa: PLC0415
    from updater.device.transport import FileOrHttpsTransport  # noqa: PLC0415

    def scripts() -> ScriptRunner:
        from updater.device.scripts import ScriptRunner  # noqa: PLC0415

        return ScriptRunner(config.scripts, config.data_dir, clock)

    def modules() -> ModuleRunner:
        from updater.device.modules import ModuleRunner  # noqa: PLC0415

        return ModuleRunner(config.modules, config.data_dir, config.device_type)

    clock = SystemClock()
    database = database_path(config.data_dir)
    newest = [config.artifact_info, config.path, database]
    return Client(
        config,
        Ports(
            machine=LinuxMachine(),
            bootenv=open_environment(config.bootenv),
            store=SqliteStore(database),
            clock=clock,
            transport=FileOrHttpsTransport(
                config.ca_file,
                config.download,
                clock,
                spool_dir=config.data_dir,
                before_tls=lambda: raise_to(floor_seconds(newest)),
            ),
            reboot=ExitCodeReboot(),
            health=HealthRunner(config.health_directory, config.health_timeout_s),
            scripts=later(scripts),
            modules=later(modules),
            observer=LeaveToDaemon() if _is_left_to_daemon(config) else NoObserver(),
            limit=limit,
        ),
    )


def _is_left_to_daemon(config: Config) -> bool:
    """Whether a deployment may only be committed with the server's word, which init has not."""
    if config.server.require_contact:
        return True
    import os  # noqa: PLC0415

    # The path is that of `managed.control_path`, whose module is not for the boot.
    return bool(config.server.url) and os.path.exists(f"{config.data_dir}/update-control")  # noqa: PTH110


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
    parser, artifact = command_line()
    if "artifact" in given:
        from updater.artifact import cli as artifact_cli  # noqa: PLC0415

        artifact_cli.add_arguments(artifact)
    return parser.parse_args(given)


def command_line() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Return the command line's parser, and that of `updater artifact`, still empty."""
    import argparse  # noqa: PLC0415
    from typing import NoReturn  # noqa: PLC0415

    from updater.device.config import DEFAULT_PATH  # noqa: PLC0415
    from updater.device.errors import UpdaterError  # noqa: PLC0415

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
    daemon = verbs.add_parser("daemon", help="let the server of [server] manage this device")
    daemon.add_argument("--once", action="store_true", help="one cycle, then end")
    _add_setup(verbs)
    bundle = verbs.add_parser("support-bundle", help="collect what explains a failure in one file")
    bundle.add_argument("-o", "--output", metavar="FILE", help="default: here, named by the date")
    bundle.add_argument("--slot-hashes", action="store_true", help="hash both slots (slow)")
    verbs.add_parser("server", help="run and manage an update server (host)", add_help=False)
    artifact = verbs.add_parser("artifact", help="write, read and validate artifacts (host)")
    return parser, artifact


if __name__ == "__main__":
    raise SystemExit(main())
