"""What `updater --help` prints, ready-made: argparse costs a device ten times as much as the text.

Written by `python -m updater.device.usage`; a test compares it with what argparse would print.
"""

TEXT = """\
usage: updater [-h] [--config FILE] [-v] VERB ...

A/B updates that survive a power cut at any moment.

positional arguments:
  VERB
    install       install an artifact into the passive slot
    commit        check the running system's health and keep it
    rollback      give up the update in progress
    resume        go on after a restart (run by init at boot)
    show-artifact
                  print the name of the artifact that runs
    show-provides
                  print what the committed system provides
    status        print the state, the last outcome and its cause
    daemon        let the server of [server] manage this device
    setup         check this system and write its configuration
    support-bundle
                  collect what explains a failure in one file
    server        run and manage an update server (host)
    artifact      write, read and validate artifacts (host)

options:
  -h, --help      show this help message and exit
  --config FILE   default: /etc/updater/updater.toml
  -v, --verbose   show the chain of an error

examples:
  updater install https://updates.example.com/v2.mender
  updater artifact write rootfs-image -f rootfs.img -n v2 -t qemu-arm64 -o v2.mender -k key.pem

exit codes: 0 done, 1 error, 2 nothing in progress, 4 reboot needed, 130/143 interrupted
"""


def rendered() -> str:
    """Return what argparse makes of the command line."""
    from updater.cli import command_line  # noqa: PLC0415

    return command_line()[0].format_help()


def module(text: str) -> str:
    """Return this module's source with `text` in it."""
    from pathlib import Path  # noqa: PLC0415

    source = Path(__file__).read_text(encoding="utf-8")
    before, _, rest = source.partition("\nTEXT = ")
    after = rest[rest.index("\n\n\ndef rendered") :]
    quoted = '"""\\\n' + text.replace("\\", "\\\\") + '"""'
    return f"{before}\nTEXT = {quoted}{after}"


if __name__ == "__main__":
    import os
    from pathlib import Path

    os.environ["COLUMNS"] = "80"
    Path(__file__).write_text(module(rendered()), encoding="utf-8")
