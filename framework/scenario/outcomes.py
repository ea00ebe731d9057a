"""How a scenario may go on to its end, in one line: what is expected of the device, and judged.

Each of them installs the update, says what must come of it, and tries it again where that belongs
to it. The invariants are judged besides, as always.
"""

from __future__ import annotations

from framework.scenario.device import Device, Update

EXIT_OK, EXIT_ERROR = 0, 1


def fails_cleanly(
    device: Device, update: Update, *, says: str = "", exit_code: int = EXIT_ERROR
) -> None:
    """The installation fails and says why; nothing is changed, and it can be tried again.

    Raises AssertionError for another exit code, or a cause without the words `says`.
    """
    ended = device.install(update)
    assert ended.exit_code == exit_code, f"exit code {ended.exit_code}: {ended.cause}"
    assert says.lower() in ended.cause.lower(), f"the cause does not say {says!r}: {ended.cause}"
    device.check_data()
    device.retry(update)


def goes_through(device: Device, update: Update) -> None:
    """The update gets there in spite of what happened, without being tried again."""
    ended = device.update(update)
    assert ended.exit_code == EXIT_OK, f"exit code {ended.exit_code}: {ended.cause}"
    device.retry(update)


def went_back(device: Device) -> None:
    """The device runs the system that it had at the beginning."""
    assert device.running is not None
    assert device.running.version == device.base.name, f"{device.running.version} runs"
