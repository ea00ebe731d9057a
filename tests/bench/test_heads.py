"""Each kind of power head, through labgrid's own driver for it, switches a contact."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_desk import Desk, RunningBench, free_port, wait_for_port

from framework.targets.bench.heads import HEADS, Addresses
from framework.targets.errors import RigError


def driver_for(head: str, at: Addresses, number: int) -> Any:
    from labgrid import Target
    from labgrid.factory import target_factory
    from labgrid.protocol import PowerProtocol

    kind = HEADS[head]
    arguments = {
        key: value.replace('{{ "', "").replace('" }}', "") if isinstance(value, str) else value
        for key, value in kind.arguments(at, number).items()
    }
    target = Target("head")
    target_factory.make_resource(target, kind.resource, None, arguments)
    drivers = {
        "NetworkPowerPort": ["NetworkPowerDriver"],
        "ModbusTCPCoil": ["ModbusCoilDriver", "DigitalOutputPowerDriver"],
    }[kind.resource]
    for name in drivers:
        target_factory.make_driver(target, name, None, {})
    return target.get_driver(PowerProtocol)


def switches(power: Any, board: Any) -> None:
    for on in (True, True, False, True, False):
        (power.on if on else power.off)()
        assert board.on is on
        assert power.get() is on


@pytest.mark.parametrize("head", ["rest", "simplerest", "shelly_gen1", "shelly_gen2"])
def test_http_heads_switch_and_tell(desk: Desk, head: str) -> None:
    other, board = desk.board(), desk.board()
    at = Addresses(desk.http.server_address[1], 0, 0, "")
    switches(driver_for(head, at, board.number), board)
    assert not other.on


def test_modbus_coils_switch_and_tell(desk: Desk) -> None:
    from framework.targets.bench.modbus_head import serve_modbus

    other, board = desk.board(), desk.board()
    port = free_port()
    server = serve_modbus(desk.boards, port)  # type: ignore[arg-type]
    try:
        switches(driver_for("modbus", Addresses(0, port, 0, ""), board.number), board)
        assert not other.on
    finally:
        server.stop()


def test_a_plug_answers_whoever_subscribes_after_it_has_told(desk: Desk, tmp_path: Path) -> None:
    """labgrid's driver asks at once, and may have its subscription only after the answer."""
    import paho.mqtt.client as mqtt
    from paho.mqtt.enums import CallbackAPIVersion

    from framework.targets.bench.stack import MQTT_PORT, find_peer
    from framework.targets.bench.tasmota_head import TasmotaPlug

    try:
        broker = find_peer("mosquitto")
    except RigError as error:
        pytest.skip(str(error))
    at, board = f"127.77.{os.getpid() % 250}.9", desk.board()
    configuration = tmp_path / "mosquitto.conf"
    configuration.write_text(f"listener {MQTT_PORT} {at}\nallow_anonymous true\n")
    running = subprocess.Popen([broker, "-c", configuration], stderr=subprocess.DEVNULL)
    try:
        wait_for_port(MQTT_PORT, at)
        plug = TasmotaPlug(board, at)  # type: ignore[arg-type]
        late = mqtt.Client(CallbackAPIVersion.VERSION2)
        told: queue.Queue[bytes] = queue.Queue()
        late.on_message = lambda _client, _data, message: told.put(message.payload)
        late.connect(at)
        late.loop_start()
        late.publish(f"cmnd/plug{board.number}/POWER", "ON").wait_for_publish(10)
        deadline = time.monotonic() + 10
        while not board.on and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        late.subscribe(f"stat/plug{board.number}/POWER")
        assert told.get(timeout=10) == b"ON"
        late.disconnect()
        late.loop_stop()
        plug.close()
    finally:
        running.kill()
        running.wait()


@pytest.mark.parametrize("request_line", ["GET /rest/9", "GET /nothing", "PUT /rest/1 2"])
def test_a_wrong_request_is_refused(desk: Desk, request_line: str) -> None:
    desk.board()
    method, path, *body = request_line.split()
    status, _ = desk.http.answer(method, path, body[0] if body else "")
    assert status in (400, 404)


def facts(bench: RunningBench) -> list[dict[str, Any]]:
    import requests

    told: list[dict[str, Any]] = requests.get(f"{bench.control}/control", timeout=10).json()
    return told


def eventually(true: Callable[[], bool], what: Any) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def client(place: str, *arguments: str) -> str:
    """labgrid's own client."""
    return subprocess.run(
        [Path(sys.executable).with_name("labgrid-client"), "-p", place, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


@pytest.mark.emulated
def test_every_kind_of_head_switches_a_machine_by_way_of_the_coordinator(
    bench_up: Callable[..., RunningBench], monkeypatch: pytest.MonkeyPatch
) -> None:
    from framework.targets.places import Places

    kinds = list(HEADS)
    bench = bench_up("--boards", str(len(kinds)))
    monkeypatch.setenv("LG_COORDINATOR", bench.coordinator)
    places = Places()
    switched: list[str] = []
    for number, place in enumerate(bench.places):
        if place["head"] == "modbus":
            continue  # labgrid-client's `power` knows no coil: see the test above
        places.acquire(place["name"])
        client(place["name"], "power", "on")
        # Its Tasmota driver knows no state at first, and then does not wait for another.
        eventually(lambda n=number: facts(bench)[n]["machine"], place)  # type: ignore[misc]
        assert "is on" in client(place["name"], "power", "get")
        client(place["name"], "power", "off")
        eventually(lambda n=number: not facts(bench)[n]["machine"], place)  # type: ignore[misc]
        places.free(place["name"])
        switched.append(place["head"])
    assert len(switched) >= 6
    assert not any(place.acquired for place in places.all())


@pytest.mark.emulated
def test_ctrl_c_leaves_nothing(bench_up: Callable[..., RunningBench]) -> None:
    from framework.targets.rundir import base_directory

    bench = bench_up("--boards", "2", "--head", "apc", "--head", "tasmota")
    told = facts(bench)
    mine = [p for p in base_directory().iterdir() if f"m-{bench.process.pid}-" in p.name]
    assert mine
    children = _descendants(bench.process.pid)
    assert len(children) >= 4
    assert bench.end() == 0
    deadline = time.monotonic() + 5
    while any(map(_lives, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_lives, children))
    assert not os.path.lexists(told[0]["serial"])
    assert not any(path.exists() for path in mine)


def test_a_head_that_does_not_exist_is_one_line(tmp_path: Any) -> None:
    program = Path(sys.executable).with_name("brownout")
    ended = subprocess.run(
        [program, "bench", "up", "--head", "dc-motor"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("brownout: dc-motor: known heads: rest,")
    assert len(ended.stderr.splitlines()) == 1


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _descendants(pid: int) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found += [int(process.name), *_descendants(int(process.name))]
    return found
