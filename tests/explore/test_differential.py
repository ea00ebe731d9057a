"""A live power cut and the explored state agree, bit for bit and in verdict."""

from __future__ import annotations

import random

import pytest
import tiny_ab
from disk_nbd_client import FUA, Client
from explore_plain import class_of

from framework.disk import MODELS, DeviceSpec, JournalReader, Kind, Recorder, Trigger, model_from
from framework.explore.judges.static import StaticOracle
from framework.explore.states import CrashState, Disks

POINTS = 216


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return JournalReader(tiny_ab.run(tmp_path_factory.mktemp("recorded")))


def replay(journal: JournalReader, client: Client, last: int) -> None:
    """Send operations 1 to `last` again, as they were sent."""
    operations = journal.operations
    with journal.path.open("rb") as file:
        for row in range(last):
            kind, offset = operations.kind[row], int(operations.offset[row])
            length = int(operations.length[row])
            if kind == Kind.WRITE:
                file.seek(int(operations.position[row]))
                fua = bool(operations.flags[row] & FUA)
                client.write(offset, file.read(length), fua=fua)
            elif kind == Kind.FLUSH:
                client.flush()
            elif kind == Kind.ZEROES:
                client.zero(offset, length)
            else:
                client.discard(offset, length)


@pytest.mark.parametrize("share", range(4))
def test_live_cut_and_explored_state_agree_at_random_points(recorded, tmp_path, share):
    context = tiny_ab.context(recorded)
    oracle = StaticOracle(context)
    rng = random.Random(share)
    names = sorted(MODELS)
    verdicts = set()
    for index in range(share, POINTS, 4):
        model = model_from(names[index // 4 % len(names)])
        point = rng.randrange(1, len(recorded.operations))
        seed = rng.getrandbits(32)
        _, cycle = recorded.power_cycle_at(point)
        state = CrashState(point, model.decide(cycle, seed), model.name, seed)
        spec = DeviceSpec("vda", recorded.base_paths["vda"])
        with Recorder([spec], tmp_path / f"{index}", prepare_bytes=0) as recorder:
            armed = recorder.arm(Trigger.operation(point + 1))
            endpoint = recorder.endpoint("vda")
            with Client(endpoint.socket, endpoint.export) as client:
                replay(recorded, client, point)
                client.send(1, 0, bytes(512))  # the operation that is refused
                assert armed.fired.wait(10)
                cut = recorder.cut(model, seed)
            assert cut.decision == state.decision, model
            with recorder.disk("vda") as live, state.disks(recorded) as disks:
                explored = disks["vda"]
                assert live.unreadable() == explored.unreadable()
                assert _content(live) == _content(explored), (model, point, seed)
                there = class_of(Disks({"vda": live}), context.layout, state, recorded)
                here = class_of(disks, context.layout, state, recorded)
                assert context.layout.boot({"vda": live}) == context.layout.boot(disks)
            assert there.facts == here.facts
            phase = context.timeline.phase_at(here.spans[0].first_sequence)
            mine = oracle.judge(here, phase)
            verdicts.add(str(mine))
            assert oracle.judge(there, phase) == mine
    assert verdicts


def _content(disk) -> bytes:
    """Everything that can be read, holes as zeros."""
    holes = disk.unreadable()
    data, at = bytearray(disk.size_bytes), 0
    for hole, length in [*holes, (disk.size_bytes, 0)]:
        data[at:hole] = disk.read(at, hole - at)
        at = hole + length
    return bytes(data)
