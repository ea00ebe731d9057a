"""From a fault to what is done for it: to the power, the proxy, the recorder, the device's shell.

An `Action` can always strike at once, from any thread, without blocking. Where the recorder or the
proxy can do it by itself, it is also armed there, and then strikes with the very operation or byte
of its trigger.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import shlex
import threading
from collections.abc import Callable, Sequence

from attrs import define, evolve, field
from labgrid.driver.exception import ExecutionError

from framework.console import ConsoleError, Line
from framework.disk import Armed as ArmedOnDisk
from framework.disk import Fault as RecorderFault
from framework.disk import Inject, LayoutError, Notify, TornSector, model_from
from framework.disk import Trigger as RecorderTrigger
from framework.disk.files import ExtReader
from framework.disk.models import CacheModel
from framework.faults import (
    BadCertificate,
    BitFlip,
    BitRot,
    BrownOut,
    Clock,
    ClockBattery,
    DataFull,
    Fault,
    FaultError,
    Hang,
    Interrupt,
    KernelPanic,
    LinkDown,
    LyingFlushes,
    MemoryPressure,
    NameGone,
    NetworkDrop,
    NetworkSlow,
    PowerCut,
    ProcessKilled,
    ReadOnly,
    SecondCommand,
    ServerAnswers,
    SlotWrite,
    SlowDisk,
    StorageError,
    WrongContent,
)
from framework.faults.triggers import Direction
from framework.network import (
    Answer,
    AnswerServer,
    NetworkFault,
    OrderLine,
    server_context,
)
from framework.network.answers import PORTAL
from framework.network.certificates import CertificateKind
from framework.scenario.watching import Callback, Surroundings, area_of
from framework.targets.errors import InfrastructureError

SHELL_TIMEOUT_S = 60.0
BITS = 8
CTRL_C = b"\x03"
SECOND_HAND = "second hand:"
"""How the outcome of a second command begins, on the console."""


OnDisk = Callable[[RecorderTrigger, bool, Callback], tuple[Callable[[], bool], Callback]]


def _nothing() -> None:
    return


@define
class Action:
    """What a fault does.

    Attributes:
        strike: do it now.
        on_disk: arm it with the recorder, at its trigger; the flag says that power goes inside
            the operation; the callback is told when it strikes. Returns whether it struck, and what
            takes it back.
        on_stream: arm it with the proxy, at a byte of a direction; the callback is told.
        undo: the fault is over.
        power_back: power is given back after a cut, which cleared what the recorder had.
        restarts: the device restarts because of it.
        cuts: power is gone after it.
    """

    strike: Callback
    on_disk: OnDisk | None = None
    on_stream: Callable[[int, Direction, Callback], Callback] | None = None
    undo: Callback = _nothing
    power_back: Callback = _nothing
    restarts: bool = False
    cuts: bool = False


def action_of(around: Surroundings, fault: Fault) -> Action:
    """Prepare what a fault does; what takes time on the device is done here.

    Raises:
        FaultError: it makes no sense on this device.
    """
    match fault:
        case PowerCut():
            return _power(around, fault)
        case BitFlip():
            return _bit_flip(around, fault)
        case StorageError() | ReadOnly() | SlowDisk() | LyingFlushes() | BitRot():
            return _storage(around, _recorder_faults(around, fault))
        case NetworkDrop(kind=kind, lasts_s=lasts_s, times=times):
            return _network(around, NetworkFault(kind, 0, times=times, lasts_s=lasts_s))
        case NetworkSlow():
            return _network(
                around,
                NetworkFault(
                    "slow",
                    0,
                    lasts_s=fault.lasts_s,
                    bytes_per_s=fault.bytes_per_s,
                    latency_s=fault.latency_s,
                ),
            )
        case ServerAnswers() | WrongContent() | BadCertificate():
            return _other_server(around, fault)
        case LinkDown():
            return _link(around, fault)
        case Interrupt(times=times):
            send = around.device.machine.send
            return Action(lambda: send(CTRL_C * times))
        case ClockBattery(at=at):
            machine = around.device.machine
            return Action(
                lambda: machine.set_clock(at.strftime("%Y-%m-%dT%H:%M:%S")),
                undo=lambda: machine.set_clock(""),
            )
        case _:
            return _shell(around, fault)


def _soon(action: Callable[[], object]) -> None:
    """Do what may block on a thread of its own; a machine that is gone is no error then."""

    def run() -> None:
        with contextlib.suppress(ConsoleError, ExecutionError):
            action()

    threading.Thread(target=run, name="fault", daemon=True).start()


# -- power ---------------------------------------------------------------------------------------


def _power(around: Surroundings, fault: PowerCut) -> Action:
    machine, seed = around.device.machine, around.seed
    model = fault.model if isinstance(fault.model, CacheModel) else model_from(fault.model)
    said = str(fault)

    def on_disk(
        where: RecorderTrigger, inside: bool, _: Callback
    ) -> tuple[Callable[[], bool], Callback]:
        chosen = model
        if inside and model == TornSector():
            # The write in flight is the newest, and the one that is torn.
            chosen = TornSector(newest=True)
        armed = machine.arm_cut(where, chosen, seed, inside=inside)
        return armed.fired.is_set, armed.disarm

    made = Action(lambda: machine.trip(said, model, seed), on_disk, cuts=True)
    if isinstance(fault, BrownOut):
        again = _Again(around, fault, model)
        made.power_back, made.undo = again.power_back, again.undo
    return made


@define
class _Again:
    """The further cuts of a brown-out, one in each start."""

    around: Surroundings
    fault: BrownOut
    model: CacheModel
    done: int = 1
    forget: Callback = _nothing

    def power_back(self) -> None:
        """Arm the next one, at the next stage of the start: first line, kernel, first line..."""
        if self.done >= self.fault.cuts:
            return
        machine = self.around.device.machine
        early = self.done % 2 == 1
        starts = self.around.device.uut.boot_signs.booting
        cause = f"cut {self.done + 1} of {self.fault}"
        seed = self.around.seed + self.done
        self.done += 1
        struck: list[bool] = []

        def heard(line: Line) -> None:
            if line.direction != "RX" or struck or not line.text.strip():
                return
            if early or starts.search(line.text + "\n"):
                struck.append(True)
                machine.trip(cause, self.model, seed)

        self.undo()
        self.forget = machine.pump.add_listener(heard)

    def undo(self) -> None:
        """Listen no more: the console outlives the scenario."""
        self.forget()
        self.forget = _nothing


# -- the disk ------------------------------------------------------------------------------------


def _bit_flip(around: Surroundings, fault: BitFlip) -> Action:
    """Strikes whichever write covers its place, so that place is its trigger."""
    assert isinstance(fault.trigger, SlotWrite)
    slot = area_of(around.device, "passive slot")[0]
    size = around.update.image.size_bytes
    place = slot.offset + math.floor((size - 1) * fault.trigger.percent / 100)
    flip = RecorderFault.bit_flip(slot.device, place, bit=around.seed % BITS)
    recorder = around.device.machine.recorder

    def on_disk(
        _: RecorderTrigger, __: bool, struck: Callback
    ) -> tuple[Callable[[], bool], Callback]:
        where = RecorderTrigger.block_range(slot.device, place, 1)
        armed = recorder.arm(where, Inject(flip))
        told = recorder.arm(where, Notify(struck))

        def disarm() -> None:
            armed.disarm()
            told.disarm()

        return armed.fired.is_set, disarm

    return Action(_nothing, on_disk)


def _recorder_faults(around: Surroundings, fault: Fault) -> tuple[RecorderFault, ...]:
    """The recorder's faults that make one of the vocabulary's."""
    match fault:
        case StorageError(on=on, area=area, count=count):
            return _errors(around, on, area, count)
        case ReadOnly(area=area):
            return _errors(around, ("write", "discard"), area, None)
        case SlowDisk(seconds=seconds, on=on, count=count):
            return (RecorderFault.latency(seconds, tuple(on), count=count),)
        case LyingFlushes():
            return (RecorderFault.lying_flush(),)
        case BitRot():
            device, place = _rot_place(around, fault)
            return (RecorderFault.bit_rot(device, place, bit=around.seed % BITS),)
        case _:
            raise FaultError(f"{fault}: no fault of a disk")


def _errors(
    around: Surroundings, on: Sequence[str], area: str, count: int | None
) -> tuple[RecorderFault, ...]:
    if not area:
        return (RecorderFault.error(on=tuple(on), count=count),)
    return tuple(
        RecorderFault.error(
            on=tuple(on), device=e.device, offset=e.offset, length=e.length, count=count
        )
        for e in area_of(around.device, area)
    )


def _rot_place(around: Surroundings, fault: BitRot) -> tuple[str, int]:
    share = fault.percent / 100
    machine = around.device.machine
    if fault.file:
        data = around.device.manifest.data
        try:
            with machine.recorder.disk(data.device) as disk:
                files = ExtReader(disk, data.offset, data.length)
                at = math.floor((files.file_size(fault.file) - 1) * share)
                return data.device, data.offset + files.place_of(fault.file, max(0, at))
        except LayoutError as error:
            raise FaultError(f"{fault}: {error}") from error
    extents = area_of(around.device, fault.area)
    extent = extents[around.seed % len(extents)]
    length = extent.length
    if fault.area.endswith("slot") or fault.area.startswith("slot"):
        # Behind the image a slot holds nothing that anybody reads.
        length = min(length, around.update.image.size_bytes)
    return extent.device, extent.offset + math.floor((length - 1) * share)


def _storage(around: Surroundings, faults: Sequence[RecorderFault]) -> Action:
    machine = around.device.machine
    active: list[ArmedOnDisk] = []

    def strike() -> None:
        active.extend(machine.recorder.inject(one) for one in faults)

    def on_disk(
        where: RecorderTrigger, _: bool, struck: Callback
    ) -> tuple[Callable[[], bool], Callback]:
        armed = [machine.recorder.arm(where, Inject(one)) for one in faults]
        active.extend(armed)
        told = machine.recorder.arm(where, Notify(struck))
        return lambda: all(a.fired.is_set() for a in armed), told.disarm

    def undo() -> None:
        for armed in active:
            armed.disarm()
        active.clear()

    def power_back() -> None:
        # A disk that is broken for good is broken after a power cycle, too.
        lasting = [one for one in faults if one.count is None and one.rot is None]
        if active and any(a.fired.is_set() for a in active):
            active[:] = [machine.recorder.inject(one) for one in lasting]

    return Action(strike, on_disk, undo=undo, power_back=power_back)


# -- the network ---------------------------------------------------------------------------------


def _network(around: Surroundings, fault: NetworkFault, close: Callback = _nothing) -> Action:
    proxy = around.proxy

    def on_stream(at_byte: int, direction: Direction, struck: Callback) -> Callback:
        fired = proxy.arm(evolve(fault, at_byte=at_byte, direction=direction), struck)
        return lambda: proxy.disarm(fired)

    def undo() -> None:
        proxy.restore()
        close()

    return Action(lambda: proxy.strike(fault), on_stream=on_stream, undo=undo)


def _other_server(
    around: Surroundings, fault: ServerAnswers | WrongContent | BadCertificate
) -> Action:
    kind: CertificateKind = fault.kind if isinstance(fault, BadCertificate) else "good"
    times = None if isinstance(fault, BadCertificate) else fault.times
    authority = around.update.authority
    context = server_context(kind, around.server_name(), *authority)
    server = AnswerServer(_answer(around, fault), context).start()
    diverted = NetworkFault("divert", 0, upstream=server.address, connections=times)
    return _network(around, diverted, server.close)


def _answer(around: Surroundings, fault: Fault) -> Answer:
    size = around.update.path.stat().st_size
    match fault:
        case ServerAnswers(status=status, retry_after_s=retry_after_s):
            headers = () if retry_after_s is None else (("Retry-After", str(retry_after_s)),)
            return Answer(status, headers, b"no\n")
        case WrongContent(kind="web-page"):
            return Answer(200, (("Content-Type", "text/html; charset=utf-8"),), PORTAL)
        case WrongContent(kind="truncated"):
            return Answer(200, garbage_bytes=max(1, size // 2), promised_bytes=size - size // 2)
        case _:
            return Answer(200, garbage_bytes=size)


def _link(around: Surroundings, fault: LinkDown) -> Action:
    machine = around.device.machine
    timers: list[threading.Timer] = []

    def pull(left: int) -> None:
        machine.set_link(False)
        if fault.lasts_s is not None:
            begin(plug, left)

    def plug(left: int) -> None:
        machine.set_link(True)
        if left > 1:
            begin(pull, left - 1)

    def begin(action: Callable[[int], None], left: int) -> None:
        assert fault.lasts_s is not None
        timer = threading.Timer(fault.lasts_s, lambda: _soon(lambda: action(left)))
        timer.daemon = True
        timers.append(timer)
        timer.start()

    def undo() -> None:
        for timer in timers:
            timer.cancel()
        timers.clear()
        with contextlib.suppress(ExecutionError):
            machine.set_link(True)

    return Action(lambda: _soon(lambda: pull(fault.times)), undo=undo)


# -- the device's shell --------------------------------------------------------------------------


def _python(code: str, *arguments: str) -> str:
    """A shell command that runs some lines of Python on the device."""
    return f"python3.11 -S -c {shlex.quote(f'exec({code!r})')} {' '.join(arguments)}".strip()


# The interpreter, and not the shell that waits for it.
_UPDATER = "ps w | awk '/[p]ython.*updater.* (install|daemon)/ {print $1}'"
_SPIN = "import os;os.sched_setscheduler(0,os.SCHED_FIFO,os.sched_param(99))\nwhile True: pass"
_FILL = (
    "import os,sys\n"
    "room=os.statvfs('/data')\n"
    "size=room.f_bfree*room.f_frsize-int(sys.argv[1])\n"
    "file=os.open('/data/.fill',os.O_CREAT|os.O_WRONLY,0o600)\n"
    "while size>0:\n"
    " try: os.posix_fallocate(file,0,size);break\n"
    " except OSError: size-=4096\n"
    "os.fsync(file)\n"
)
_MUTE = (
    "import signal,socket\n"
    "silent=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
    "silent.bind(('127.0.0.1',53))\n"
    "signal.pause()"
)
_HOG = (
    "import signal,sys\n"
    "open('/proc/self/oom_score_adj','w').write('-1000')\n"
    "have=[]\n"
    "free=lambda:int([l.split()[1] for l in open('/proc/meminfo') if l.startswith('MemAv')][0])\n"
    "while free()>int(sys.argv[1])*1024:have.append(bytearray(b'x')*(1<<20))\n"
    "signal.pause()"
)


def _script(around: Surroundings, fault: Fault) -> tuple[str, str]:
    """What the device's shell runs for a fault, and what ends it."""
    uut = around.device.uut
    match fault:
        case NameGone(kind=kind):
            # Without a resolv.conf names are asked for at 127.0.0.1 (resolv.conf(5)).
            mute = f"{_python(_MUTE)} & echo $! > /tmp/mute; " if kind == "silent" else ""
            return (
                f"{mute}echo 127.0.0.1 localhost > /tmp/hosts; "
                "mount -o bind /tmp/hosts /etc/hosts; ! grep -q brownout /etc/hosts",
                "umount /etc/hosts; kill $(cat /tmp/mute) 2>/dev/null; true",
            )
        case DataFull(leave_bytes=leave):
            return _python(_FILL, str(leave)), "rm -f /data/.fill; sync"
        case Clock(at=at):
            right = int(datetime.datetime.now(datetime.UTC).timestamp())
            return (
                f"date -s @{int(at.timestamp())} >/dev/null",
                f"date -s @{right} >/dev/null",
            )
        case ProcessKilled(signal=name):
            return f"kill -{name} $({_UPDATER})", ""
        case KernelPanic():
            return "echo c > /proc/sysrq-trigger", ""
        case Hang():
            return (
                f"echo -1 > /proc/sys/kernel/sched_rt_runtime_us; {_python(_SPIN)}",
                "",
            )
        case MemoryPressure(leave_mib=leave):
            return (
                f"{_python(_HOG, str(leave))} & echo $! > /tmp/hog",
                "kill -9 $(cat /tmp/hog) 2>/dev/null; true",
            )
        case SecondCommand(command=command):
            orders = {
                "install": uut.install(around.update.url),
                "commit": uut.commit(),
                "rollback": uut.rollback(),
                "status": uut.status(),
                "resume": uut.resume(),
            }
            return (
                f"{orders[command]} > /tmp/second 2>&1; "
                f'echo "{SECOND_HAND} {command} ended with $?: $(tail -n 1 /tmp/second)" '
                "> /dev/console",
                "",
            )
        case _:
            raise FaultError(f"{fault}: nobody knows how to do this")


@define
class _Shell:
    """A fault that the device's shell does: on the console at once, or over an order line."""

    around: Surroundings
    script: str
    line: OrderLine = field(factory=OrderLine)

    def connect(self) -> None:
        """Have the device fetch its orders, while its console is free."""
        self.around.device.goes_online("a fault that the device does to itself")
        run_on(self.around, self.line.shell_command(self.around.server_name()))
        self.line.wait_for_device()

    def strike(self) -> None:
        """Send the order."""
        self.line.send(self.script)


def run_on(around: Surroundings, script: str) -> int:
    """Run something in the device's shell; its exit code."""
    return around.device.strategy.run(script, SHELL_TIMEOUT_S).code


def _shell(around: Surroundings, fault: Fault) -> Action:
    script, ending = _script(around, fault)
    restarts = isinstance(fault, KernelPanic | Hang)

    def undo() -> None:
        if ending and around.device.machine.get():
            with contextlib.suppress(ConsoleError, ExecutionError):
                run_on(around, ending)

    if fault.trigger is None:

        def at_once() -> None:
            if run_on(around, script) != 0:
                raise InfrastructureError(f"the device could not be made to: {fault}")

        return Action(at_once, undo=undo)
    shell = _Shell(around, script)
    shell.connect()

    def over() -> None:
        shell.line.close()
        undo()

    return Action(shell.strike, undo=over, restarts=restarts)
