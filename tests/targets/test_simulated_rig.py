"""The simulated rig: power, console and witnesses as on any other, without a machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from framework.console import ConsoleLost
from framework.disk import Trigger, model_from
from framework.scenario.inspect import check_other_data
from framework.scenario.manifest import Extent
from framework.targets.errors import RigError
from framework.targets.rig import check_rig, load_rig
from framework.targets.simulated.device import DATA_BYTES, DATA_OFFSET
from framework.targets.strategy import Fate
from images.keys import ensure_keys
from updater.artifact import write_artifact
from updater.artifact.signature import load_private_key

RIG = Path(__file__).parents[2] / "rigs" / "simulated.yaml"
CANARY = (
    "dd if=/dev/urandom of=/data/canary bs=4096 count=16 conv=fsync 2>/dev/null"
    " && sync && sha256sum /data/canary"
)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Any]:
    """The rig's strategy, with a pristine device that is switched off."""
    check_rig(RIG)
    target = load_rig(RIG).get_target()
    assert target is not None
    made = target.get_strategy()
    made.transition("off")
    folder = tmp_path / "simulated"
    made.power.make_stock(folder, ["v2"])
    keys = ensure_keys(tmp_path / "keys")
    (folder / "artifacts").mkdir()
    write_artifact(
        folder / "artifacts" / "v2.mender",
        folder / "v2.img",
        name="v2",
        device_types=["simulated"],
        key=load_private_key(keys.artifact_key),
    )
    made.power.fresh({"vda": folder / "disk-v1.img"})
    yield made
    made.power.close()


def test_a_cut_comes_at_the_very_operation_and_the_device_starts_again(rig: Any) -> None:
    assert rig.boot().ready
    machine = rig.power
    before = machine.recorder.operations
    machine.arm_cut(Trigger.operation(5), model_from("prefix"), 1)
    with pytest.raises(ConsoleLost, match="power was cut before operation 5"):
        rig.run("updater install https://x/v2.mender")
    assert not machine.get()
    assert machine.last_cut.operation == before + 4
    assert rig.boot().ready
    assert rig.run("updater install https://x/v2.mender").code == 0
    rig.run("sync; reboot -f")
    outcome = rig.await_boot()
    assert outcome.fate is Fate.READY
    assert outcome.boot.version == "v2"


def test_what_a_listener_pulls_takes_effect_at_that_line(rig: Any) -> None:
    rig.boot()
    machine = rig.power

    def heard(line: Any) -> None:
        if "state ArtifactInstall" in line.text:
            machine.trip("pulled", model_from("kept"), 0)

    forget = machine.pump.add_listener(heard)
    with pytest.raises(ConsoleLost, match="pulled"):
        rig.run("updater install https://x/v2.mender")
    forget()
    assert "ArtifactReboot" not in machine.pump.tail(4000)


def test_an_interrupt_is_the_clients_own_signal(rig: Any) -> None:
    rig.boot()
    machine = rig.power
    machine.send(b"\x03")  # nothing runs that it could stop
    forget = machine.pump.add_listener(
        lambda line: machine.send(b"\x03") if "state Download" in line.text else None
    )
    done = rig.run("trap : INT; updater install https://x/v2.mender; exit $?")
    forget()
    assert done.code == 130
    assert rig.run("updater install https://x/v2.mender").code == 0


def test_a_command_that_there_is_not_is_not_found(rig: Any) -> None:
    rig.boot()
    assert rig.run("cat /etc/passwd").code == 127


def test_an_image_that_there_is_not_is_one_clear_line(tmp_path: Path, rig: Any) -> None:
    with pytest.raises(RigError, match="no image 'v9'; there are v1, v2"):
        rig.power.make_stock(tmp_path, ["v9"])


def damage_nothing(machine: Any) -> None:
    return


def change_the_file(machine: Any) -> None:
    machine.leave_file("canary", b"other")


def lose_the_file(machine: Any) -> None:
    machine.device.data.remove("canary")
    machine.device.data.sync_directory()


def lose_the_partition(machine: Any) -> None:
    for offset in (DATA_OFFSET, DATA_OFFSET + 4096):
        machine.device.drive.write(offset, bytes(4096))


@pytest.mark.parametrize(
    ("damage", "clean", "intact"),
    [
        (damage_nothing, True, True),
        (change_the_file, True, False),
        (lose_the_file, True, False),
        (lose_the_partition, False, False),
    ],
)
def test_lost_data_is_seen_from_outside(
    rig: Any, damage: Callable[[Any], None], clean: bool, intact: bool
) -> None:
    rig.boot()
    digest = rig.run(CANARY).lines[-1].split()[0]
    machine = rig.power
    damage(machine)
    data = Extent("data", "vda", DATA_OFFSET, DATA_BYTES)
    seen = check_other_data(machine.recorder.disk, data, machine.read_data, "/canary", digest)
    assert (seen.clean, seen.intact) == (clean, intact), seen.detail
    assert len(digest) == len(hashlib.sha256().hexdigest())
