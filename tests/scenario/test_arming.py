"""Every fault can have every trigger, and strikes where it was told to.

On a bench without a processor: the recorder, the proxy and the console pump are the real ones, the
test itself is what runs on the device.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_nbd_client import Client, GoneError, NbdError

from framework.console import ConsolePump, SocketTransport
from framework.disk import Armed, CacheModel, CutRecord, DeviceSpec, Freeze, Recorder, Trigger
from framework.faults import (
    FaultError,
    after,
    after_switch,
    bit_flip,
    bit_rot,
    boot_env_write,
    brown_out,
    connection,
    console,
    downloaded,
    flush,
    link_down,
    machine_event,
    operation,
    power_cut,
    read_only,
    slot_write,
    state,
    storage_error,
    stream_byte,
    writes_to,
)
from framework.network import FaultProxy
from framework.scenario.arming import Faults
from framework.scenario.device import Device, Update
from framework.scenario.manifest import Extent, TargetManifest
from framework.targets.qemu import PowerLoss, QmpEvent
from framework.targets.uut import BrownoutUpdater
from framework.verdict import BootEnvironment, DiskSeen, ImageFacts

KIB4 = 4096
MIB = 1 << 20
IMAGE_BYTES = 16 * KIB4
ARTIFACT_BYTES = 100_000
ALL = frozenset({"power-cut", "network", "link", "watchdog", "rtc", "emulated"})
LONG_S = 10.0
ENV_1, ENV_2, SLOT_A, SLOT_B, DATA = (
    Extent("env 1", "vda", 0, 8192),
    Extent("env 2", "vda", 8192, 8192),
    Extent("a", "vda", MIB, MIB),
    Extent("b", "vda", 2 * MIB, MIB),
    Extent("data", "vda", 4 * MIB, MIB),
)


class Bench:
    """What `Machine` asks for, with nothing that runs."""

    def __init__(self, directory: Path) -> None:
        base = directory / "base.img"
        base.write_bytes(bytes(8 * MIB))
        self.recorder = Recorder([DeviceSpec("vda", base)], directory / "run").start()
        self.pump = ConsolePump("bench", owned=True)
        ours, self.console = socket.socketpair()
        self.console.settimeout(LONG_S)
        self.pump.attach(SocketTransport(ours))
        self.last_cut: CutRecord | None = None
        self.power_loss: PowerLoss | None = None
        self.failure: str | None = None
        self.trips: list[str] = []
        self.links: list[bool] = []
        self.link_set = threading.Condition()
        self.listeners: list[Callable[[QmpEvent], None]] = []
        self.clients: list[Client] = []

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.recorder.close()
        self.console.close()
        self.pump.close()

    # -- what a machine's driver has

    def arm_cut(self, trigger: Trigger, model: CacheModel, seed: int, *, inside: bool) -> Armed:
        return self.recorder.arm(trigger, Freeze(inside))

    def trip(self, cause: str, model: CacheModel, seed: int) -> None:
        self.trips.append(cause)

    def get(self) -> bool:
        return False

    def settle(self) -> None:
        pass

    def set_link(self, up: bool) -> None:
        with self.link_set:
            self.links.append(up)
            self.link_set.notify_all()

    def set_clock(self, base: str) -> None:
        return

    def add_event_listener(self, listener: Callable[[QmpEvent], None]) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    # -- what the test does as the device

    def client(self) -> Client:
        made = Client(self.recorder.endpoint("vda").socket, "vda", timeout_s=LONG_S)
        self.clients.append(made)
        # A frozen disk never answers: the device that waits for it is killed.
        self.recorder.on_freeze(lambda _: made.sock.shutdown(socket.SHUT_RDWR))
        return made

    def says(self, line: str) -> None:
        """A line on the console; returns once everybody has heard it."""
        heard = threading.Event()
        forget = self.pump.add_listener(lambda seen: heard.set() if line in seen.text else None)
        self.console.sendall(line.encode() + b"\r\n")
        assert heard.wait(LONG_S)
        forget()

    def happens(self, name: str) -> None:
        for listener in tuple(self.listeners):
            listener(QmpEvent(name, {}, 0, 0.0))

    def power_cycle(self) -> None:
        """Cut, as the driver does when the recorder froze."""
        self.recorder.cut()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with contextlib.closing(Bench(tmp_path)) as made:
        yield made


@pytest.fixture
def server() -> Iterator[tuple[str, int]]:
    """A TCP server that sends everybody as many bytes as an artifact has."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connected, _ = listener.accept()
                with connected, contextlib.suppress(OSError):
                    connected.sendall(bytes(ARTIFACT_BYTES))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(LONG_S)


@pytest.fixture
def faults(bench: Bench, server: tuple[str, int], tmp_path: Path) -> Iterator[Faults]:
    """The vocabulary on a device whose slot a is active."""
    image = ImageFacts("v2", "0" * 64, IMAGE_BYTES)
    manifest = TargetManifest(
        target="bench",
        directory=tmp_path,
        bootloader="uboot",
        slots={"a": SLOT_A, "b": SLOT_B},
        slot_numbers={"a": 2, "b": 3},
        data=DATA,
        environment=(ENV_1, ENV_2),
        environment_paths=(),
        data_repair=None,
        images={"v2": image},
        disks={},
        firmware={},
    )
    strategy: Any = None  # nothing here runs a command
    device = Device(bench, strategy, BrownoutUpdater(), manifest, image)
    device.events.append(DiskSeen("at first", {}, BootEnvironment(2, "a")))
    artifact = tmp_path / "v2.mender"
    artifact.write_bytes(bytes(ARTIFACT_BYTES))
    keys = tmp_path / "none.pem"
    update = Update("v2", image, artifact, "https://updates.brownout.test:1/v2", (keys, keys))
    with FaultProxy(server) as proxy:
        yield Faults(device, update, proxy, seed=3, features=ALL, rig="bench.yaml")


def receive(port: int) -> int:
    """How many bytes a client gets before its stream ends."""
    got = 0
    with (
        contextlib.suppress(ConnectionError),
        socket.create_connection(("127.0.0.1", port), timeout=LONG_S) as client,
    ):
        while chunk := client.recv(65536):
            got += len(chunk)
    return got


def write(client: Client, extent: Extent, at: int = 0, length: int = KIB4) -> None:
    client.write(extent.offset + at, b"\xaa" * length)


def frozen_at(bench: Bench) -> int:
    """The operation at which the recorder stopped the disks."""
    armed = bench.recorder.frozen
    assert armed is not None
    assert armed.fired.wait(LONG_S)
    assert armed.operation is not None
    return armed.operation


# -- a power cut is exact on every trigger of the disk ------------------------------------------


@pytest.mark.parametrize(
    ("trigger", "number"),
    [
        (operation(4), 4),
        (flush(1), 3),
        (flush(2), 6),
        (slot_write(percent=25), 7),
        (writes_to("data"), 5),
        (writes_to("slot b", 2 * KIB4, KIB4), 4),
        (writes_to("passive slot", nth=3), 7),
        (boot_env_write(1), 8),
        (after_switch(operations=2), 10),
    ],
    ids=str,
)
def test_a_power_cut_strikes_at_the_very_operation(
    bench: Bench, faults: Faults, trigger: Any, number: int
) -> None:
    armed = faults.arm(power_cut().when(trigger))
    client = bench.client()
    steps: list[Callable[[], object]] = [
        lambda: write(client, SLOT_A),
        lambda: write(client, SLOT_B, KIB4),
        client.flush,
        lambda: write(client, SLOT_B, 2 * KIB4),
        lambda: write(client, DATA),
        client.flush,
        lambda: write(client, SLOT_B, 3 * KIB4, 2 * KIB4),
        lambda: write(client, ENV_2),
        client.flush,
        client.flush,
    ]
    done = 0
    for step in steps:
        try:
            step()
        except GoneError:
            break
        done += 1
        assert not armed.fired()
    assert frozen_at(bench) == number
    assert done == number - 1
    assert armed.fired()


def test_a_place_in_a_state_counts_from_its_entry(bench: Bench, faults: Faults) -> None:
    armed = faults.arm(power_cut().when(state("Download").at(percent=25)))
    client = bench.client()
    for at in range(6):
        write(client, SLOT_B, at * KIB4)
    assert not armed.fired(), "not in that state yet"
    bench.says("updater: state Download")
    for at in range(3):
        write(client, SLOT_B, at * KIB4)
    with pytest.raises(GoneError):
        write(client, SLOT_B, 3 * KIB4)
    assert frozen_at(bench) == 10


def test_a_cut_on_the_console_or_the_stream_trips_the_machine(bench: Bench, faults: Faults) -> None:
    faults.arm(power_cut().when(console("panic now")))
    faults.arm(power_cut("torn").when(state("Download").leave()))
    faults.arm(power_cut("subset").when(downloaded(percent=50)))
    faults.arm(power_cut("prefix").when(machine_event("WATCHDOG")))
    bench.says("updater: state Download")
    assert bench.trips == []
    bench.says("updater: state ArtifactInstall")
    bench.says("and panic now")
    assert receive(faults.proxy.port) == ARTIFACT_BYTES
    bench.happens("RESET")
    bench.happens("WATCHDOG")
    assert [cause.split("cache: ")[1] for cause in bench.trips] == [
        "torn)",
        "kept)",
        "subset)",
        "prefix)",
    ]
    assert faults.unfired() == []


# -- storage ------------------------------------------------------------------------------------


def test_a_storage_error_strikes_with_the_very_operation(bench: Bench, faults: Faults) -> None:
    armed = faults.arm(
        storage_error("write", area="passive slot", count=1).when(slot_write(percent=25))
    )
    client = bench.client()
    for at in range(3):
        write(client, SLOT_B, at * KIB4)
    assert not armed.fired()
    with pytest.raises(NbdError) as error:
        write(client, SLOT_B, 3 * KIB4)
    assert error.value.code == errno.EIO
    assert armed.fired()
    write(client, SLOT_B, 3 * KIB4)


def test_an_area_that_cannot_be_written_leaves_the_others_alone(
    bench: Bench, faults: Faults
) -> None:
    faults.arm(storage_error("write", area="boot environment"))
    client = bench.client()
    for copy in (ENV_1, ENV_2):
        with pytest.raises(NbdError):
            write(client, copy)
    write(client, SLOT_B)
    write(client, DATA)
    faults.clear()
    write(client, ENV_1)


def test_a_read_only_disk_is_read_only_after_a_power_cycle_too(
    bench: Bench, faults: Faults
) -> None:
    faults.arm(read_only().when(console("worn out")))
    write(bench.client(), DATA)
    bench.says("worn out")
    for _ in range(2):
        client = bench.client()
        with pytest.raises(NbdError):
            write(client, DATA)
        assert client.read(DATA.offset, 512) == b"\xaa" * 512
        bench.power_cycle()
        faults.power_back()
    faults.clear()
    write(bench.client(), DATA)


def test_a_flipped_bit_is_the_one_of_its_place(bench: Bench, faults: Faults) -> None:
    armed = faults.arm(bit_flip().when(slot_write(percent=50)))
    client = bench.client()
    for at in range(0, IMAGE_BYTES, KIB4):
        write(client, SLOT_B, at)
    stored = client.read(SLOT_B.offset, IMAGE_BYTES)
    wrong = [i for i, byte in enumerate(stored) if byte != 0xAA]
    assert wrong == [(IMAGE_BYTES - 1) // 2]
    assert stored[wrong[0]] ^ 0xAA == 1 << 3, "the bit is of the seed"
    assert armed.fired()


def test_rot_strikes_what_is_stored(bench: Bench, faults: Faults) -> None:
    client = bench.client()
    write(client, ENV_2, 0, 8192)
    faults.arm(bit_rot("boot environment", percent=50))  # seed 3: the second of two copies
    stored = client.read(ENV_2.offset, 8192)
    assert [i for i, byte in enumerate(stored) if byte != 0xAA] == [4095]


# -- the network ---------------------------------------------------------------------------------


def test_a_connection_is_lost_at_the_very_byte(faults: Faults) -> None:
    armed = faults.arm(connection("fin").when(stream_byte(54_321)))
    assert receive(faults.proxy.port) == 54_321
    assert armed.fired()


def test_a_share_of_the_artifact_is_a_byte(faults: Faults) -> None:
    faults.arm(connection("fin").when(downloaded(percent=30)))
    assert receive(faults.proxy.port) == 30_000


def test_a_connection_can_be_refused_by_a_write_to_the_disk(bench: Bench, faults: Faults) -> None:
    armed = faults.arm(connection("refuse").when(writes_to("data")))
    assert receive(faults.proxy.port) == ARTIFACT_BYTES
    write(bench.client(), DATA)
    assert armed.fired()
    assert receive(faults.proxy.port) == 0
    faults.clear()
    assert receive(faults.proxy.port) == ARTIFACT_BYTES


def test_a_cable_is_pulled_as_often_as_was_said_and_is_in_at_the_end(
    bench: Bench, faults: Faults
) -> None:
    faults.arm(link_down(lasts_s=0.02, times=3).when(state("Download")))
    bench.says("updater: state Download")
    with bench.link_set:
        assert bench.link_set.wait_for(lambda: len(bench.links) == 6, LONG_S)
    assert bench.links == [False, True] * 3


# -- chains --------------------------------------------------------------------------------------


def test_a_chain_begins_when_its_first_fault_has_struck(bench: Bench, faults: Faults) -> None:
    lost = connection("fin").when(stream_byte(100))
    faults.arm(lost)
    second = faults.arm(power_cut().when(after(lost, writes_to("data"))))
    client = bench.client()
    write(client, DATA)
    assert receive(faults.proxy.port) == 100
    assert not second.fired()
    with pytest.raises(GoneError):
        write(client, DATA)
    assert frozen_at(bench) == 2


def test_what_comes_after_a_cut_is_armed_when_power_is_back(bench: Bench, faults: Faults) -> None:
    cut = power_cut().when(flush())
    faults.arm(cut)
    second = faults.arm(storage_error("flush", count=1).when(after(cut)))
    third = faults.arm(power_cut().when(after(cut, writes_to("data"))))
    client = bench.client()
    write(client, DATA)
    with pytest.raises(GoneError):
        client.flush()
    frozen_at(bench)
    assert not second.fired()
    bench.power_cycle()
    faults.power_back()
    assert second.fired()
    client = bench.client()
    with pytest.raises(NbdError):
        client.flush()
    with pytest.raises(GoneError):
        write(client, DATA)
    frozen_at(bench)
    assert third.fired()


def test_a_chain_behind_a_fault_that_is_not_armed_is_refused(faults: Faults) -> None:
    with pytest.raises(FaultError, match="that fault is not armed"):
        faults.arm(link_down().when(after(power_cut().when(flush()))))
    assert faults.armed == []


def test_a_brown_out_cuts_each_of_the_next_starts(bench: Bench, faults: Faults) -> None:
    faults.arm(brown_out(4).when(console("INIT slot=b")))
    bench.says("INIT slot=b")
    for _ in range(5):
        faults.power_back()
        bench.says("U-Boot 2023.01")
        bench.says("BROWNOUT: booting slot b upgrade_available=1 bootcount=1")
    assert [cause.split(" of ")[0] for cause in bench.trips[1:]] == ["cut 2", "cut 3", "cut 4"]


def test_a_brown_out_that_was_ended_cuts_nothing_more(bench: Bench, faults: Faults) -> None:
    faults.arm(brown_out(4).when(console("INIT slot=b")))
    bench.says("INIT slot=b")
    faults.power_back()
    faults.clear()
    bench.says("U-Boot 2023.01")
    assert len(bench.trips) == 1


# -- what never struck ---------------------------------------------------------------------------


def test_what_never_struck_is_told(bench: Bench, faults: Faults) -> None:
    struck = faults.arm(connection("fin").when(stream_byte(10)))
    waits = faults.arm(power_cut().when(operation(99)))
    receive(faults.proxy.port)
    assert struck.fired()
    assert faults.unfired() == [waits.fault]
    assert "power cut at disk operation 99" in faults.sentence()


@pytest.mark.parametrize("area", ["slot c", "attic"])
def test_an_area_that_does_not_exist_is_refused_with_the_known_ones(
    faults: Faults, area: str
) -> None:
    with pytest.raises(FaultError, match="is no area of the disk; known: boot environment"):
        faults.arm(power_cut().when(writes_to(area)))
