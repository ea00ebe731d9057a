"""The block recorder: serves all disks of one machine over NBD and records all that happens.

One server on a unix socket, one export a device, one journal with one total order over all
devices. It can stop the world at an exact operation (a *freeze*), inject faults, cut the power
under a cache model (`models`) and serve the rebuilt state, many power cycles in one journal.
Base images are opened read-only and never change.

Life: `start` (or `with`) → serving → frozen (a trigger fired) → `cut` → serving … → `close`.
A cut also works without a freeze: then all that arrived is carried out first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

from framework.disk import nbd
from framework.disk.errors import BaseImageError, DiskError, RecorderError, UnreadableSectorError
from framework.disk.journal import (
    SECTOR,
    BaseIdentity,
    DeviceHeader,
    Flag,
    JournalHeader,
    JournalWriter,
    Kind,
    mark_payload,
)
from framework.disk.lazy import LazyDisk, SectorMap, StartState, new_map, place, read_range
from framework.disk.models import CacheModel, WriteThrough
from framework.disk.server import Connection, Pending
from framework.disk.state import (
    CutRecord,
    OperationLog,
    PowerCycle,
    Rot,
    apply_operation,
    rebuild,
)
from framework.disk.triggers import (
    Action,
    Armed,
    Arriving,
    Fault,
    Freeze,
    Inject,
    Trigger,
    sector_of,
)

JOURNAL_NAME: Final = "disk.journal"
PREPARE_BYTES: Final = 96 << 20
_SOCKET_NAME: Final = "nbd.sock"
_MAX_SOCKET_PATH: Final = 107
_SHORT_PREFIX: Final = "brownout-"
_HANDSHAKE_TIMEOUT_S: Final = 10.0
_JOIN_TIMEOUT_S: Final = 20.0
_TARGET: Final = {
    Kind.WRITE: "write",
    Kind.FLUSH: "flush",
    Kind.DISCARD: "discard",
    Kind.ZEROES: "discard",
}

FreezeCallback = Callable[[Armed], None]


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device to serve: its export's name, its base image, its size.

    A `size_bytes` beyond the base image's adds zeros. `sha256` is the base's digest if it is
    known (a manifest has it), which saves reading the image.
    """

    name: str
    base: Path
    size_bytes: int | None = None
    sha256: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class NbdEndpoint:
    """Where a device is served."""

    socket: Path
    export: str

    @property
    def uri(self) -> str:
        """As QEMU's tools take it."""
        return f"nbd+unix:///{self.export}?socket={self.socket}"


@dataclasses.dataclass(slots=True)
class _Device:
    name: str
    base: Path
    fd: int
    size_bytes: int
    map: SectorMap
    power_on: SectorMap


@dataclasses.dataclass(slots=True)
class _ActiveFault:
    fault: Fault
    left: int | None
    armed: Armed


@dataclasses.dataclass(slots=True)
class _Client:
    socket: socket.socket
    thread: threading.Thread


class Recorder:
    """Records and serves the disks of one machine; see the module's text. Thread-safe."""

    def __init__(
        self,
        devices: Sequence[DeviceSpec],
        directory: Path,
        *,
        durable_journal: bool = False,
        prepare_bytes: int = PREPARE_BYTES,
        begin: StartState | None = None,
    ) -> None:
        """Nothing is opened before `start`.

        `durable_journal`: fdatasync it at every flush. `prepare_bytes`: how much of the journal is
        kept ready in the page cache for a burst of writes, given back at `close`. `begin`: what
        the disks hold at first, if not their base images; whoever reads the journal needs it too.
        """
        self._begin = begin
        self._extra = b"" if begin is None else begin.over()
        self._prepare_bytes = prepare_bytes
        self._specs = tuple(devices)
        self._directory = Path(directory)
        self._durable = durable_journal
        self._lock = threading.RLock()
        self._cutting = threading.Lock()
        self._devices: list[_Device] = []
        self._journal: JournalWriter | None = None
        self._log = OperationLog()
        self._rots: list[Rot] = []
        self._cuts: list[CutRecord] = []
        self._cycle_first = 1
        self._cycle_sequence = 0
        self._in_flight = 0
        self._armed: list[Armed] = []
        self._faults: list[_ActiveFault] = []
        self._callbacks: list[FreezeCallback] = []
        self._frozen: Armed | None = None
        self._quiet = False
        self._refusing = False
        self._failure: RecorderError | None = None
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._clients: list[_Client] = []
        self._callback_threads: list[threading.Thread] = []
        self._socket_path = self._directory / _SOCKET_NAME
        self._short_directory: Path | None = None
        self._closed = False

    # ---------------------------------------------------------------- life

    def start(self) -> Recorder:
        """Open the bases, create the journal, listen.

        Raises RecorderError (BaseImageError for a base) with nothing left behind.
        """
        if self._journal is not None:
            raise RecorderError("the recorder was started already")
        try:
            headers = self._open_devices()
            self._directory.mkdir(parents=True, exist_ok=True)
            header = JournalHeader(
                headers, datetime.now(UTC).isoformat(timespec="milliseconds"), time.monotonic_ns()
            )
            self._journal = JournalWriter(self.journal_path, header, durable=self._durable)
            self._listen()
        except OSError as error:
            self._release()
            raise RecorderError(
                f"recorder in {self._directory}: {error}", self._directory
            ) from error
        except RecorderError:
            self._release()
            raise
        self._acceptor = threading.Thread(target=self._accept, name="nbd-accept", daemon=True)
        self._acceptor.start()
        return self

    def close(self) -> None:
        """Drop the clients, finish the journal, remove the socket. Raises what `check` raises."""
        if self._closed:
            return
        with self._cutting:
            self._closed = True
            self._refusing = True
            if self._listener is not None:
                self._listener.shutdown(socket.SHUT_RDWR)
                self._listener.close()
            if self._acceptor is not None:
                self._acceptor.join(_JOIN_TIMEOUT_S)
            self._drop_clients()
            with self._lock:
                if self._journal is not None and self._journal.failure is None:
                    self._guard(lambda journal: journal.append(Kind.CLOSE))
            self._release()
        for thread in self._callback_threads:
            if thread is not threading.current_thread():
                thread.join(_JOIN_TIMEOUT_S)
        self.check()

    def check(self) -> None:
        """Raise RecorderError if recording failed (a full disk, a callback's error)."""
        if self._journal is not None and self._journal.failure is not None:
            raise self._journal.failure
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Recorder:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close()
        except RecorderError as failure:
            if error is not None:
                error.add_note(f"and the recorder failed: {failure}")

    # ---------------------------------------------------------------- facts

    @property
    def journal_path(self) -> Path:
        """The journal's file."""
        return self._directory / JOURNAL_NAME

    @property
    def operations(self) -> int:
        """How many mutating operations were recorded, over all devices and power cycles."""
        return len(self._log)

    @property
    def power_cycle(self) -> int:
        """The power cycle that is going on, from 0."""
        return len(self._cuts)

    @property
    def frozen(self) -> Armed | None:
        """What froze the disks, None while they are served."""
        return self._frozen

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices' names, in the journal's order."""
        return tuple(spec.name for spec in self._specs)

    def endpoint(self, device: str) -> NbdEndpoint:
        """Where `device` is served. The path is short enough for a unix socket."""
        self._index(device)
        return NbdEndpoint(self._socket_path, device)

    def disk(self, device: str) -> LazyDisk:
        """The present content of a device, as its guest would read it. Close it after use."""
        index = self._index(device)
        with self._lock:
            self._guard(JournalWriter.flush)
            found = self._devices[index]
            return LazyDisk(device, found.map.copy(), found.base, self.journal_path, self._extra)

    # ---------------------------------------------------------------- marks, arms, cuts

    def mark(self, source: str, text: str) -> int:
        """Put an event of another source into the order of events; returns its sequence."""
        with self._lock:
            journal = self._require()
            sequence, _ = journal.append(Kind.MARK, payload=mark_payload(source, text))
            journal.flush()
            return sequence

    def on_freeze(self, callback: FreezeCallback) -> None:
        """Have `callback(armed)` called on a thread of its own once a freeze is complete."""
        self._callbacks.append(callback)

    def arm(
        self,
        trigger: Trigger,
        action: Action | None = None,
        since: Literal["now", "power-on"] = "now",
    ) -> Armed:
        """Arm a trigger; `action` is Freeze() unless given. Counts start `since` then.

        Raises RecorderError for an unknown device, and if it would have fired already.
        """
        for device in trigger.devices:
            self._index(device)
        with self._lock:
            self._require()
            if isinstance(action, Inject):
                self._check_fault(action.fault)
            armed = Armed(trigger, action or Freeze(), self._disarm)
            if since == "power-on":
                self._replay(armed)
            self._armed.append(armed)
            return armed

    def inject(self, fault: Fault) -> Armed:
        """Start a fault now; `disarm()` of what is returned stops it."""
        with self._lock:
            self._require()
            self._check_fault(fault)
            armed = Armed(Trigger.operation(1), Inject(fault), self._disarm)
            self._start_fault(armed, fault, None)
            return armed

    def freeze(self) -> Armed:
        """Freeze now: what arrived is carried out, nothing is answered after it."""
        with self._lock:
            self._require()
            armed = Armed(Trigger.operation(1), Freeze(), self._disarm)
            if self._frozen is not None:
                return self._frozen
            self._begin_freeze(armed, None)
            return armed

    def cut(self, model: CacheModel | None = None, seed: int = 0) -> CutRecord:
        """Cut the power: drop the clients, rebuild the disks under a model, serve those.

        Arms and faults are cleared; on the medium, rot and unreadable sectors stay. The machine
        must be dead or be killed now: a client that lives on only sees its connection end.
        """
        model = model or WriteThrough()
        with self._cutting:
            self._require()
            self._refusing = True
            try:
                self._drop_clients()
                with self._lock:
                    record = self._cut(model, seed)
                    self._armed.clear()
                    self._faults.clear()
                    self._frozen = None
                    self._quiet = False
            finally:
                self._refusing = self._closed
        return record

    def _cut(self, model: CacheModel, seed: int) -> CutRecord:
        journal = self._require()
        last = len(self._log)
        operations = self._log.table(self._cycle_first, last)
        sizes = tuple(d.size_bytes for d in self._devices)
        decision = model.decide(PowerCycle(operations, self.devices, sizes), seed)
        index = len(self._cuts)
        meta = {
            "model": model.name,
            "parameters": model.parameters(),
            "seed": seed,
            "operation": last,
        }
        payload, garbage_at = decision.to_payload(meta)
        now = time.monotonic_ns()
        sequence, position = journal.append(
            Kind.CUT, operation=last, length=index, payload=payload, time_ns=now
        )
        journal.flush()
        record = CutRecord(
            index,
            last,
            model.name,
            model.parameters(),
            seed,
            decision,
            sequence,
            now,
            position + garbage_at,
        )
        in_flight = bool((operations.completed < 0).any())
        harmed = decision.dropped or decision.partial or decision.garbage or decision.unreadable
        if harmed or in_flight:
            rots = [r for r in self._rots if r.cycle == index]
            start = [d.power_on for d in self._devices]
            maps = rebuild(start, operations, rots, decision, record.garbage_position)
            for device, sectors in zip(self._devices, maps, strict=True):
                device.map = sectors
        for device in self._devices:
            device.power_on = device.map.copy()
        self._cuts.append(record)
        self._cycle_first = last + 1
        return record

    # ---------------------------------------------------------------- for the connections

    @property
    def silent(self) -> bool:
        """Nothing is answered any more: frozen, or power is being cut."""
        return self._quiet or self._refusing

    def export_names(self) -> list[str]:
        """All exports."""
        return list(self.devices)

    def export_size(self, name: str) -> int | None:
        """An export's size in bytes, None if there is none of that name."""
        return next((d.size_bytes for d in self._devices if d.name == name), None)

    def register(self, device: int, request: Pending, fua: bool, payload: memoryview) -> bool:
        """Record an arrival; False if it is refused for good (frozen)."""
        kind = request.kind
        assert kind is not None
        with self._lock:
            if self._quiet or self._refusing:
                return False
            journal = self._journal
            if journal is None or journal.failure is not None:
                request.error = nbd.EIO
                return True
            stored: bytes | memoryview = payload
            flags = Flag.FUA if fua else Flag.NONE
            if self._armed or self._faults:
                name = self._devices[device].name
                arriving = Arriving(
                    len(self._log) + 1, kind, name, request.offset, request.length, fua
                )
                try:
                    # The copy with the content lives no longer than the buffer.
                    seen = dataclasses.replace(arriving, content=payload) if self._armed else None
                    freezing = None if seen is None else self._fire(seen, arriving)
                    if freezing is not None:
                        inside = isinstance(freezing.action, Freeze) and freezing.action.inside
                        if inside:
                            self._arrive(device, request, flags, payload)
                        self._begin_freeze(freezing, arriving)
                        return False
                except RecorderError:
                    request.error = nbd.EIO
                    return True
                flips = self._afflict(arriving, request)
                if flips:
                    stored = _flipped(payload, request.offset, flips)
                    flags |= Flag.CORRUPTED
            self._arrive(device, request, flags, stored)
            self._in_flight += 1
            return True

    def _arrive(
        self, device: int, request: Pending, flags: Flag, payload: bytes | memoryview
    ) -> None:
        """Record an operation's arrival and number it."""
        kind = request.kind
        assert kind is not None
        now = time.monotonic_ns()
        sequence, position = self._require().append(
            kind,
            device=device,
            flags=flags,
            operation=len(self._log) + 1,
            offset=request.offset,
            length=request.length,
            payload=payload,
            time_ns=now,
        )
        if kind is Kind.WRITE:
            request.position = position
        request.number = self._log.arrive(
            (kind, device, request.offset, request.length, flags, request.position),
            sequence=sequence,
            time_ns=now,
            cycle=len(self._cuts),
        )

    def register_read(self, device: int, request: Pending) -> None:
        """Note a read's arrival: faults may concern it."""
        if not self._faults:
            return
        name = self._devices[device].name
        with self._lock:
            for active in list(self._faults):
                if active.fault.hits("read", name, request.offset, request.length):
                    self._spend(active)
                    request.error = active.fault.error_code or request.error
                    if active.fault.latency_s:
                        request.due = time.monotonic() + active.fault.latency_s
                    self._append_mark(
                        "fault", f"{active.fault} hit read {name} {request.offset}+{request.length}"
                    )

    def commit(self) -> None:
        """Have what was registered in the journal; raises RecorderError."""
        with self._lock:
            journal = self._require()
            journal.flush()
            if self._durable:
                journal.sync()

    def settle(self) -> None:
        """Have late records in the journal, too, if there are any."""
        journal = self._journal
        if journal is not None and journal.dirty:
            with self._lock:
                self._guard(JournalWriter.flush)

    def prepare(self) -> bool:
        """Use an idle moment to prepare the journal for a burst; whether there is more to do."""
        with self._lock:
            journal = self._journal
            return journal is not None and journal.prepare(self._prepare_bytes)

    def complete(self, device: int, requests: list[Pending]) -> None:
        """Let operations take effect and record their completion."""
        with self._lock:
            journal = self._journal
            sectors = self._devices[device].map
            for request in requests:
                self._in_flight -= 1
                if journal is None or journal.failure is not None:
                    request.error = request.error or nbd.EIO
                    continue
                now = time.monotonic_ns()
                sequence, _ = journal.append(
                    Kind.COMPLETE,
                    device=device,
                    flags=request.flags,
                    operation=request.number,
                    error=request.error,
                    time_ns=now,
                )
                self._log.complete(request.number, sequence, now, request.error, request.flags)
                if not request.error:
                    assert request.kind is not None
                    apply_operation(
                        sectors, request.kind, request.offset, request.length, request.position
                    )
            if self._quiet and self._in_flight == 0:
                self._finish_freeze()

    def read(self, device: int, offset: int, length: int) -> bytes | int:
        """Read, or the NBD error."""
        found = self._devices[device]
        journal = self._journal
        if journal is None:
            return nbd.EIO
        try:
            return read_range(
                found.map,
                (found.fd, journal.fd),
                offset,
                length,
                found.name,
                extra=self._extra,
            )
        except UnreadableSectorError:
            return nbd.EIO
        except (OSError, DiskError) as error:
            self._fail(f"device {found.name}: can't read {length} bytes at {offset}: {error}")
            return nbd.EIO

    # ---------------------------------------------------------------- triggers and faults

    def _fire(self, seen: Arriving, arriving: Arriving) -> Armed | None:
        """Let the armed triggers see an operation; the one that freezes on it, if any."""
        freezing: Armed | None = None
        for armed in list(self._armed):
            if not armed.counter.feed(seen):
                continue
            self._armed.remove(armed)
            if isinstance(armed.action, Inject):
                self._start_fault(armed, armed.action.fault, arriving)
            else:
                freezing = freezing or armed
        return freezing

    def _begin_freeze(self, armed: Armed, arriving: Arriving | None) -> None:
        journal = self._require()
        number = len(self._log) + 1 if arriving is None else arriving.operation
        armed.operation = number
        armed.at = arriving
        self._quiet = True
        self._frozen = armed
        if arriving is None:
            journal.append(Kind.FREEZE, operation=number)
        else:
            journal.append(
                Kind.FREEZE,
                device=self._index(arriving.device),
                flags=Flag.FUA if arriving.fua else 0,
                operation=number,
                offset=arriving.offset,
                length=arriving.length,
                error=arriving.kind,
                payload=str(armed.trigger).encode(),
            )
        if self._in_flight == 0:
            self._finish_freeze()

    def _finish_freeze(self) -> None:
        armed = self._frozen
        if armed is None or armed.fired.is_set():
            return
        self._guard(JournalWriter.flush)
        armed.fired.set()
        for callback in self._callbacks:
            thread = threading.Thread(
                target=self._call, args=(callback, armed), name="on-freeze", daemon=True
            )
            self._callback_threads.append(thread)
            thread.start()

    def _call(self, callback: FreezeCallback, armed: Armed) -> None:
        try:
            callback(armed)
        except Exception as error:  # noqa: BLE001 - it is the caller's code: kept for check()
            self._fail(f"an on_freeze callback failed: {type(error).__name__}: {error}")

    def _start_fault(self, armed: Armed, fault: Fault, arriving: Arriving | None) -> None:
        armed.operation = len(self._log) + 1
        armed.at = arriving
        journal = self._require()
        when = f"from {arriving}" if arriving else "now"
        journal.append(Kind.MARK, payload=mark_payload("fault", f"{fault} {when}"))
        if fault.rot is not None:
            assert fault.device is not None
            self._rot(self._index(fault.device), *fault.rot)
        else:
            self._faults.append(_ActiveFault(fault, fault.count, armed))
        journal.flush()
        armed.fired.set()

    def _rot(self, device: int, offset: int, bit: int) -> None:
        journal = self._require()
        journal.flush()
        found = self._devices[device]
        where = sector_of(offset)
        try:
            old = read_range(
                found.map,
                (found.fd, journal.fd),
                where,
                SECTOR,
                found.name,
                extra=self._extra,
            )
        except UnreadableSectorError:
            return  # nothing there that could rot
        content = _flipped(memoryview(old), where, [(offset, bit)])
        now = time.monotonic_ns()
        sequence, position = journal.append(
            Kind.ROT,
            device=device,
            operation=len(self._log),
            offset=where,
            length=SECTOR,
            payload=content,
            time_ns=now,
        )
        place(found.map, where, SECTOR, position)
        self._rots.append(
            Rot(sequence, now, len(self._log), device, where, SECTOR, position, len(self._cuts))
        )

    def _check_fault(self, fault: Fault) -> None:
        if fault.device is None:
            return
        size = self._devices[self._index(fault.device)].size_bytes
        if not 0 <= fault.offset < size:
            raise RecorderError(f"fault {fault}: beyond the end of {fault.device} ({size} bytes)")

    def _afflict(self, arriving: Arriving, request: Pending) -> list[tuple[int, int]]:
        """Apply the active faults to an operation; the bits to flip in its payload."""
        flips: list[tuple[int, int]] = []
        target = _TARGET[arriving.kind]
        for active in list(self._faults):
            fault = active.fault
            if not fault.hits(target, arriving.device, arriving.offset, arriving.length):
                continue
            self._spend(active)
            if fault.error_code:
                request.error = fault.error_code
            if fault.latency_s:
                request.due = time.monotonic() + fault.latency_s
            if fault.lies:
                request.flags |= Flag.LYING
            if fault.flip is not None:
                flips.append(fault.flip)
        return flips

    def _spend(self, active: _ActiveFault) -> None:
        if active.left is not None:
            active.left -= 1
            if active.left <= 0:
                self._faults.remove(active)

    def _disarm(self, armed: Armed) -> None:
        with self._lock:
            self._armed = [a for a in self._armed if a is not armed]
            self._faults = [f for f in self._faults if f.armed is not armed]

    def _replay(self, armed: Armed) -> None:
        """Feed a counter what this power cycle saw already."""
        past = self._log.table(self._cycle_first, len(self._log))
        for i, number in enumerate(past.number.tolist()):
            arriving = Arriving(
                number,
                Kind(int(past.kind[i])),
                self._devices[int(past.device[i])].name,
                int(past.offset[i]),
                int(past.length[i]),
            )
            if armed.counter.feed(arriving):
                raise RecorderError(f"trigger {armed.trigger}: happened already, at {arriving}")

    # ---------------------------------------------------------------- server

    def _listen(self) -> None:
        path = self._socket_path
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
            _sweep_short_directories()
            self._short_directory = Path(tempfile.mkdtemp(prefix=f"{_SHORT_PREFIX}{os.getpid()}-"))
            path = self._socket_path = self._short_directory / _SOCKET_NAME
        if path.is_socket():
            _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(path))
            listener.listen(16)
        except OSError as error:
            listener.close()
            raise RecorderError(f"socket {path}: {error.strerror}", path) from error
        self._listener = listener

    def _accept(self) -> None:
        listener = self._listener
        assert listener is not None
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return  # closed
            thread = threading.Thread(target=self._serve, args=(sock,), name="nbd", daemon=True)
            client = _Client(sock, thread)
            with self._lock:  # so that a cut either refuses this client or drops it
                if self.silent:
                    sock.close()
                    continue
                self._clients = [c for c in self._clients if c.thread.is_alive()]
                self._clients.append(client)
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        name = "?"
        try:
            sock.settimeout(_HANDSHAKE_TIMEOUT_S)
            chosen = nbd.negotiate(sock, self)
            if chosen is None:
                return
            name = chosen
            sock.settimeout(None)
            index = self._index(name)
            self._note(f"client of {name} connected")
            connection = Connection(sock, self, index, self._devices[index].size_bytes)
            reason = connection.serve()
            if self._quiet and not self._refusing:
                connection.wait_until_dropped()
            self._note(f"client of {name} {reason}")
        except (nbd.ProtocolError, OSError) as error:
            self._note(f"client refused: {error}")
        except RecorderError as error:
            self._fail(f"device {name}: {error}")
        except Exception as error:  # noqa: BLE001 - a thread's error must not get lost: check()
            self._fail(f"serving {name}: {type(error).__name__}: {error}")
        finally:
            sock.close()

    def _note(self, text: str) -> None:
        with self._lock:
            self._append_mark("nbd", text)
            self._guard(JournalWriter.flush)

    def _append_mark(self, source: str, text: str) -> None:
        payload = mark_payload(source, text)
        self._guard(lambda journal: journal.append(Kind.MARK, payload=payload))

    def _drop_clients(self) -> None:
        with self._lock:
            clients, self._clients = self._clients, []
        for client in clients:
            try:
                client.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # gone already
        deadline = time.monotonic() + _JOIN_TIMEOUT_S
        for client in clients:
            client.thread.join(max(0.1, deadline - time.monotonic()))
            if client.thread.is_alive():
                raise RecorderError(f"a client's thread did not end within {_JOIN_TIMEOUT_S:g} s")

    # ---------------------------------------------------------------- small things

    def _open_devices(self) -> tuple[DeviceHeader, ...]:
        if not self._specs:
            raise RecorderError("a recorder needs at least one device")
        headers = []
        for spec in self._specs:
            if any(d.name == spec.name for d in self._devices):
                raise RecorderError(f"device {spec.name} is given twice")
            device, header = _open_device(spec)
            if self._begin is not None:
                device.map = self._begin.maps[spec.name].copy()
                device.power_on = device.map.copy()
            self._devices.append(device)
            headers.append(header)
        return tuple(headers)

    def _index(self, device: str) -> int:
        for index, spec in enumerate(self._specs):
            if spec.name == device:
                return index
        raise RecorderError(f"no device {device!r}; there are {', '.join(self.devices)}")

    def _require(self) -> JournalWriter:
        if self._journal is None or self._closed:
            raise RecorderError("the recorder is not running: start() it first")
        if self._journal.failure is not None:
            raise self._journal.failure
        return self._journal

    def _guard(self, action: Callable[[JournalWriter], object]) -> None:
        """Do something with the journal whose failure `check` will tell."""
        if self._journal is None:
            return
        try:
            action(self._journal)
        except RecorderError as error:
            self._failure = self._failure or error

    def _fail(self, message: str) -> None:
        self._failure = self._failure or RecorderError(message)

    def _release(self) -> None:
        if self._journal is not None:
            self._journal.close()
        if self._listener is not None:
            self._listener.close()
            self._socket_path.unlink(missing_ok=True)
        if self._short_directory is not None:
            shutil.rmtree(self._short_directory, ignore_errors=True)
        for device in self._devices:
            if device.fd >= 0:
                os.close(device.fd)
                device.fd = -1


def _open_device(spec: DeviceSpec) -> tuple[_Device, DeviceHeader]:
    base = Path(spec.base)
    where = f"device {spec.name}: base image {base}"
    try:
        fd = os.open(base, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise BaseImageError(f"{where}: {error.strerror}", base) from error
    try:
        if not base.is_file():
            raise BaseImageError(f"{where}: not a regular file", base)
        stat = os.fstat(fd)
        size = stat.st_size if spec.size_bytes is None else spec.size_bytes
        if size <= 0 or size % SECTOR or stat.st_size % SECTOR:
            raise BaseImageError(
                f"{where}: {stat.st_size} bytes for a device of {size}: not a multiple of {SECTOR}",
                base,
            )
        if size < stat.st_size:
            raise BaseImageError(
                f"{where}: {stat.st_size} bytes are more than the device's {size}", base
            )
        digest = spec.sha256 or file_sha256(base)
    except BaseException:
        os.close(fd)
        raise
    sectors = new_map(size, stat.st_size)
    identity = BaseIdentity(base.resolve(), stat.st_size, digest)
    return (
        _Device(spec.name, base, fd, size, sectors, sectors.copy()),
        DeviceHeader(spec.name, size, identity),
    )


_digests: dict[tuple[int, int, int, int], str] = {}


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file; remembered while the file doesn't change."""
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if key not in _digests:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[key]


def _flipped(payload: memoryview, offset: int, flips: list[tuple[int, int]]) -> bytes:
    changed = bytearray(payload)
    for where, bit in flips:
        changed[where - offset] ^= 1 << bit
    return bytes(changed)


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on; raises RecorderError if somebody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise RecorderError(f"socket {path} is in use: is another recorder running there?", path)


def _sweep_short_directories() -> None:
    """Remove the short socket directories of recorders that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_SHORT_PREFIX}*-*"):
        owner = path.name.removeprefix(_SHORT_PREFIX).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(path, ignore_errors=True)
