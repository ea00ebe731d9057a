"""A fault with its trigger is a sentence; what makes no sense is refused before anything runs."""

import pytest

from framework.disk import TornSector
from framework.faults import (
    BitFlip,
    FaultError,
    NetworkDrop,
    PowerCut,
    after_switch,
    boot_env_write,
    console,
    downloaded,
    slot_write,
    state,
)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (
            PowerCut("torn").when(slot_write(percent=50)),
            "power cut when 50 % of the image is written (cache: torn)",
        ),
        (
            PowerCut().when(boot_env_write(2, after="ArtifactCommit")),
            "power cut inside boot-environment write 2 in ArtifactCommit (cache: kept)",
        ),
        (
            PowerCut(TornSector(kinds=("garbage",))).when(boot_env_write()),
            "power cut inside boot-environment write 1 (cache: torn, garbage)",
        ),
        (
            PowerCut().when(after_switch(operations=5)),
            "power cut 5 disk operations after the switch (cache: kept)",
        ),
        (
            PowerCut().when(state("ArtifactInstall")),
            "power cut when the updater enters ArtifactInstall (cache: kept)",
        ),
        (
            PowerCut().when(console("U-Boot")),
            'power cut when the console says "U-Boot" (cache: kept)',
        ),
        (
            NetworkDrop("stall", lasts_s=6).when(downloaded(percent=40)),
            "network silent for 6 s when 40 % of the artifact is downloaded",
        ),
        (
            NetworkDrop("fin", times=2).when(downloaded(percent=40)),
            "connection closed when 40 % of the artifact is downloaded, 2 times",
        ),
        (
            BitFlip().when(slot_write(percent=70)),
            "disk flips a bit when 70 % of the image is written",
        ),
    ],
)
def test_a_fault_reads_as_a_sentence(fault: object, sentence: str) -> None:
    assert str(fault) == sentence


def test_a_fault_refuses_a_trigger_that_it_cannot_have() -> None:
    with pytest.raises(FaultError, match="a place in the slot"):
        BitFlip().when(state("Download"))
    with pytest.raises(FaultError, match="over when it is left"):
        state("Download").leave().at(percent=5)
    with pytest.raises(FaultError, match="a percent or a number"):
        state("Download").at()


def test_an_unknown_cache_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(FaultError, match="'wet' is no cache model; known: kept, prefix"):
        PowerCut("wet")  # type: ignore[arg-type]


@pytest.mark.parametrize("percent", [-1, 101])
def test_a_share_is_a_share(percent: float) -> None:
    with pytest.raises(ValueError, match="percent"):
        slot_write(percent=percent)


def test_writes_are_counted_from_one() -> None:
    with pytest.raises(ValueError, match="nth"):
        boot_env_write(0)
