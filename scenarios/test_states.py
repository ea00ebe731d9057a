"""The power goes before, during and after each of the updater's states, there and back.

*Before* is the moment at which a state is on the updater's record and nothing of it is done,
*during* an operation on the disk in the middle of its work, and *after* the write with which the
next state goes on the record: all of its work is done, and nobody may know. A state that writes
nothing to the disk between the two records has no *during*: before and after are all there is.

In managed mode the daemon on the device works off a deployment of a real management server, and
proves the new system itself; what the server was told is judged, too.
"""

import allure
import pytest
from attrs import frozen

from framework.faults import (
    Trigger,
    boot_env_write,
    console,
    disk_operation,
    on_record,
    slot_write,
    state,
)
from framework.scenario.arming import Faults
from framework.scenario.device import Device, Update

pytestmark = [
    allure.feature("Power"),
    allure.story("Cut at each state"),
    pytest.mark.lg_feature("power-cut"),
]


@frozen
class Work:
    """A state: where its work touches the disk (None: nowhere), and what ends it."""

    state: str
    during: Trigger | None
    after: Trigger
    managed_during: Trigger | None = None
    """In managed mode, where that differs: the daemon syncs the deployment's log in each state."""


def in_state(name: str) -> Trigger:
    """Inside the first disk operation of the state."""
    return disk_operation(1, after=name)


# In the middle of the transaction that ends an update.
CLEANUP = Work("Cleanup", disk_operation(4, after="Cleanup"), state("Idle"))

FORWARD = (
    Work("Download", slot_write(percent=50), on_record("ArtifactInstall")),
    Work(
        "ArtifactInstall",
        boot_env_write(1, after="ArtifactInstall"),
        on_record("ArtifactReboot"),
    ),
    # The restart is in this state: the bootloader's own write, too.
    Work(
        "ArtifactReboot",
        boot_env_write(1, after="ArtifactReboot"),
        on_record("ArtifactVerifyReboot"),
    ),
    Work(
        "ArtifactVerifyReboot",
        None,
        on_record("ArtifactCommit"),
        managed_during=in_state("ArtifactVerifyReboot"),
    ),
    Work("ArtifactCommit", boot_env_write(1, after="ArtifactCommit"), on_record("Cleanup")),
    CLEANUP,
)
BACK = (
    Work(
        "ArtifactRollback",
        boot_env_write(1, after="ArtifactRollback"),
        on_record("ArtifactRollbackReboot"),
    ),
    # The data partition is synced and unmounted before the restart.
    Work(
        "ArtifactRollbackReboot",
        in_state("ArtifactRollbackReboot"),
        on_record("ArtifactVerifyRollbackReboot"),
    ),
    # These two do nothing for a root file system image without scripts.
    Work("ArtifactVerifyRollbackReboot", None, on_record("ArtifactFailure")),
    Work("ArtifactFailure", None, on_record("Cleanup")),
    CLEANUP,
)

STANDALONE, MANAGED = "standalone", "managed"
SMOKE = {
    (STANDALONE, "ArtifactInstall", "after"),
    (MANAGED, "ArtifactCommit", "during"),
}


def cuts(works: tuple[Work, ...]) -> list[object]:
    """All cuts at these states, in both modes, as parameters of a test."""
    found: list[object] = []
    for mode in (STANDALONE, MANAGED):
        for work in works:
            during = work.managed_during if mode == MANAGED else None
            moments = {
                "before": state(work.state),
                "during": during or work.during,
                "after": work.after,
            }
            for moment, trigger in moments.items():
                if trigger is None:
                    continue
                marks = [pytest.mark.managed] if mode == MANAGED else []
                if (mode, work.state, moment) in SMOKE and works is FORWARD:
                    marks.append(pytest.mark.smoke)
                name = f"{mode}-{moment}-{work.state}"
                found.append(pytest.param(trigger, id=name, marks=marks))
    return found


@pytest.mark.parametrize("moment", cuts(FORWARD))
def test_cut_at_each_state_of_an_update(
    device: Device, update: Update, faults: Faults, moment: Trigger
) -> None:
    """Power cut before, during or after a state on the way forward."""
    faults.power_cut(model="subset").when(moment)
    device.update(update)
    device.restore()
    device.retry(update)


@pytest.mark.update("unhealthy")
@pytest.mark.parametrize("moment", cuts(BACK))
def test_cut_at_each_state_of_the_way_back(
    device: Device, update: Update, faults: Faults, moment: Trigger
) -> None:
    """Power cut before, during or after a state, while the device leaves an unhealthy system."""
    faults.power_cut(model="subset").when(moment)
    device.update(update)
    device.restore()
    assert device.running is not None
    assert device.running.version == device.base.name, f"{device.running.version} runs"


@pytest.mark.managed
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(state("Sync"), id="before-Sync"),
        pytest.param(on_record("Download"), id="after-Sync"),
        # The second time there is something to tell, and that it was told goes on the record.
        pytest.param(disk_operation(1, after="Sync", entry=2), id="during-Sync"),
        pytest.param(console("updater: asking again"), id="in-Idle"),
    ],
)
def test_cut_while_the_daemon_asks_for_work(
    device: Device, update: Update, faults: Faults, moment: Trigger
) -> None:
    """Power cut while nothing is in progress yet: asking the server, and idle after it."""
    faults.power_cut(model="subset").when(moment)
    device.update(update)
    device.restore()
    device.retry(update)
