"""labgrid's ConsoleProtocol on a pump: `ConsolePumpDriver`, and what drivers of ours share.

`ConsolePumpDriver` stands on any console driver of labgrid that can be read in the background
(`SerialDriver` over a local port, ser2net or a remote place), so that a real board gets what the
QEMU driver has: nothing lost, times on everything, waits that end at once. It outranks the
console below it, so ShellDriver and strategies bind to the pump without being told::

    drivers:
      SerialDriver: {}
      ConsolePumpDriver: {log_dir: ../build/logs}
      ShellDriver: {...}

The pump itself outlives deactivation: strategies deactivate everything between two states, and
the positions that a test holds must stay true.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import attr
from labgrid.driver.common import Driver
from labgrid.driver.consoleexpectmixin import ConsoleExpectMixin
from labgrid.driver.exception import ExecutionError
from labgrid.factory import target_factory
from labgrid.protocol import ConsoleProtocol
from labgrid.util import PtxExpect
from pexpect import TIMEOUT

from framework.console.patterns import DEFAULT_DEATHS
from framework.console.pump import ConsolePump
from framework.console.transports import ConsoleDriverTransport, end_reader_quietly

__all__ = ["ConsolePumpDriver", "PumpedConsoleMixin", "new_log"]

_LOGS_KEPT = 60


def new_log(directory: Path, target: str, number: str = "1") -> Path:
    """The path of a new console log; the oldest of too many logs in `directory` are removed."""
    directory.mkdir(parents=True, exist_ok=True)
    old = sorted(directory.glob("console-*.log"), key=lambda path: path.name)
    for path in old[: max(0, len(old) - _LOGS_KEPT + 1)]:
        path.unlink(missing_ok=True)
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    return directory / f"console-{now}-{target}-{os.getpid()}-{number}.log"


class PumpedConsoleMixin(ConsoleExpectMixin):  # type: ignore[misc]
    """`expect`, `read` and `write` of labgrid on a `ConsolePump`.

    The class using it sets `_pump`, calls `skip_to` when a new stretch begins, and has the
    attributes `txdelay`, `txchunk` and `fail_fast`.
    """

    _pump: ConsolePump | None
    fail_fast: bool

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self._pump = None
        self._cursor = 0
        self._deaths_since = 0
        self._one_boot: int | None = None

    @property
    def pump(self) -> ConsolePump:
        """The console pump, the same one across power cycles."""
        if self._pump is None:
            raise ExecutionError(f"{self}: has not been activated, there is no console yet")
        return self._pump

    def skip_to(self, position: int, *, one_boot: bool = False) -> None:
        """Have `expect` and what stands on it (ShellDriver) begin at `position` of the pump.

        With `one_boot`, they fail with `ConsoleLost` when the machine restarts, instead of
        waiting for their answer in the next boot's output.
        """
        self._cursor = self._deaths_since = position
        self._one_boot = self.pump.generation if one_boot else None
        self._expect = PtxExpect(self)  # pexpect keeps what it read of a boot that is gone

    def _read(self, size: int = 1, timeout: float = 10, max_size: int | None = None) -> bytes:
        del size  # as labgrid's own drivers: at least one byte, and as many as there are
        data, end = self.pump.read(
            self._cursor,
            timeout,
            max_size or None,
            deaths_since=self._deaths_since if self.fail_fast else None,
            generation=self._one_boot,
        )
        if not data:
            raise TIMEOUT(f"Timeout of {timeout:.2f} seconds exceeded")
        self._cursor = end
        return data

    def _write(self, data: bytes) -> int:
        return self.pump.write(data)


@target_factory.reg_driver
@attr.s(eq=False)
class ConsolePumpDriver(
    PumpedConsoleMixin,
    Driver,  # type: ignore[misc]
    ConsoleProtocol,  # type: ignore[misc]
):
    """A pump over another console driver; see the module text.

    Args (in YAML):
        log_dir: where console logs are kept (relative to the rig file); empty: no log
        deaths: further console texts (bounded patterns) that end any wait
        fail_fast: whether a death string ends `expect` and ShellDriver.run at once
    """

    bindings: ClassVar[dict[str, Any]] = {"port": ConsoleProtocol}
    #: Above the console it stands on, for everything that binds to "a console".
    priorities: ClassVar[dict[Any, int]] = {ConsoleProtocol: 10}

    log_dir: str = attr.ib("", attr.validators.instance_of(str))
    deaths: Any = attr.ib(factory=list)
    fail_fast: bool = attr.ib(True, attr.validators.instance_of(bool))

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.txdelay = 0.0
        self.txchunk = 1
        end_reader_quietly(getattr(self.port, "serial", None))

    def on_activate(self) -> None:
        """Start draining."""
        if self._pump is None:
            log = None
            if self.log_dir:
                directory = self.log_dir
                if self.target.env is not None:
                    directory = self.target.env.config.resolve_path(directory)
                log = new_log(Path(os.path.normpath(directory)), self.target.name)
            self._pump = ConsolePump(
                self.target.name, log_path=log, deaths=(*DEFAULT_DEATHS, *self.deaths)
            )
        self._pump.attach(ConsoleDriverTransport(self.port))
        self.skip_to(self._pump.position)

    def reconnect(self) -> None:
        """Open the port below again and go on draining, if the console was lost.

        Raises what the driver below raises if its port cannot be opened.
        """
        if self.pump.gone is None:
            return
        self.port.close()
        self.port.open()
        self.pump.attach(ConsoleDriverTransport(self.port))
        self.skip_to(self.pump.position)

    def on_deactivate(self) -> None:
        """Stop draining, and end every wait."""
        self.pump.lost("the console was deactivated")

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.target.name})"
