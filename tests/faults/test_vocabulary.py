"""A fault with its trigger is a sentence; what makes no sense is refused before anything runs."""

from collections.abc import Callable

import pytest

from framework import faults
from framework.disk import TornSector
from framework.faults import (
    Fault,
    FaultError,
    Trigger,
    after,
    after_switch,
    bad_certificate,
    bit_flip,
    bit_rot,
    boot_env_write,
    brown_out,
    captive_portal,
    clock,
    clock_battery,
    connection,
    console,
    ctrl_c,
    data_full,
    downloaded,
    flush,
    hang,
    kernel_panic,
    link_down,
    lying_flushes,
    machine_event,
    memory_pressure,
    name_gone,
    now,
    on_record,
    operation,
    power_cut,
    process_killed,
    read_only,
    second_command,
    server_answers,
    slot_write,
    slow_disk,
    slow_network,
    state,
    storage_error,
    stream_byte,
    writes_to,
    wrong_content,
)
from framework.scenario.arming import missing_features
from framework.scenario.watching import check_features

SENTENCES = [
    (
        power_cut("torn").when(slot_write(percent=50)),
        "power cut when 50 % of the image is written (cache: torn)",
    ),
    (
        power_cut().when(boot_env_write(2, after="ArtifactCommit")),
        "power cut inside boot-environment write 2 in ArtifactCommit (cache: kept)",
    ),
    (
        power_cut(TornSector(kinds=("garbage",))).when(boot_env_write()),
        "power cut inside boot-environment write 1 (cache: torn, garbage)",
    ),
    (
        power_cut().when(after_switch(operations=5)),
        "power cut 5 disk operations after the switch (cache: kept)",
    ),
    (
        power_cut().when(state("ArtifactInstall")),
        "power cut when the updater enters ArtifactInstall (cache: kept)",
    ),
    (
        power_cut().when(state("Download").leave()),
        "power cut when the updater leaves Download (cache: kept)",
    ),
    (
        power_cut().when(state("Download").at(percent=50)),
        "power cut in Download, when 50 % of the image is written (cache: kept)",
    ),
    (
        power_cut().when(state("ArtifactCommit").at(operations=3)),
        "power cut 3 disk operations after the updater entered ArtifactCommit (cache: kept)",
    ),
    (
        power_cut().when(console("U-Boot")),
        'power cut when the console says "U-Boot" (cache: kept)',
    ),
    (power_cut().when(operation(9)), "power cut at disk operation 9 (cache: kept)"),
    (power_cut().when(flush(2)), "power cut at flush 2 (cache: kept)"),
    (
        power_cut().when(on_record("Cleanup")),
        "power cut inside the write that records Cleanup (cache: kept)",
    ),
    (
        power_cut().when(writes_to("data", 4096, 512, nth=2)),
        "power cut at write 2 to the data at byte 4096 (cache: kept)",
    ),
    (
        power_cut().when(machine_event("RESET", 2)),
        "power cut when the machine reports RESET for the 2. time (cache: kept)",
    ),
    (
        brown_out(3, "subset").when(console("x")),
        'brown-out of 3 cuts when the console says "x" (cache: subset)',
    ),
    (
        connection("stall", lasts_s=6).when(downloaded(percent=40)),
        "network silent for 6 s when 40 % of the artifact is downloaded",
    ),
    (
        connection("fin", times=2).when(stream_byte(300, "up")),
        "connection closed at byte 300 towards the server, 2 times",
    ),
    (connection("black-hole", lasts_s=5), "network swallowing everything for 5 s"),
    (
        connection("duplicate").when(stream_byte(7)),
        "a byte sent twice at byte 7 towards the device",
    ),
    (
        slow_network(bytes_per_s=2048, latency_s=0.5, lasts_s=3),
        "network slow (2 KiB/s, 0.5 s late) for 3 s",
    ),
    (link_down(lasts_s=2, times=3).when(now()), "cable pulled for 2 s at once, 3 times"),
    (
        server_answers(429, retry_after_s=3, times=2),
        "server answering 429 with Retry-After 3, 2 times",
    ),
    (server_answers(404, times=None), "server answering 404, always"),
    (wrong_content("garbage"), "server sending garbage"),
    (captive_portal(times=2), "captive portal answering, 2 times"),
    (bad_certificate("expired"), "server certificate expired"),
    (name_gone("silent"), "DNS gone (silent)"),
    (
        bit_flip().when(slot_write(percent=70)),
        "disk flips a bit when 70 % of the image is written",
    ),
    (
        storage_error("read", "flush", area="data", count=2).when(flush()),
        "EIO on read/flush of the data 2 times at flush 1",
    ),
    (slow_disk(0.5, count=9), "write slow by 0.5 s, 9 times"),
    (read_only(), "the disk turning read-only"),
    (lying_flushes(), "disk lying about flushes"),
    (bit_rot(file="/x"), "a bit of file /x rots"),
    (bit_rot("boot environment"), "a bit of the boot environment rots"),
    (data_full(2048), "data partition full but for 2 KiB"),
    (
        process_killed("TERM").when(state("Download")),
        "updater gets SIGTERM when the updater enters Download",
    ),
    (kernel_panic(), "kernel panic"),
    (hang(), "system hangs"),
    (memory_pressure(8), "memory gone but for 8 MiB"),
    (clock("2003-01-01T10:00:00"), "clock set to 2003-01-01 10:00:00"),
    (clock_battery(), "clock battery dead (starts at 1970-01-01)"),
    (ctrl_c(3), "Ctrl-C 3 times"),
    (second_command("commit"), "a second hand runs commit"),
    (
        ctrl_c().when(after(power_cut().when(flush()), state("Download"))),
        "Ctrl-C when the updater enters Download, after [power cut at flush 1 (cache: kept)]",
    ),
]


@pytest.mark.parametrize(("fault", "sentence"), SENTENCES, ids=[s for _, s in SENTENCES])
def test_a_fault_reads_as_a_sentence(fault: Fault, sentence: str) -> None:
    assert str(fault) == sentence


def test_every_fault_and_trigger_has_a_sentence_here() -> None:
    said = {type(fault) for fault, _ in SENTENCES}
    triggers = {type(fault.trigger) for fault, _ in SENTENCES if fault.trigger}
    exported = [getattr(faults, name) for name in faults.__all__]
    classes = [thing for thing in exported if isinstance(thing, type)]
    families = {c for c in classes if issubclass(c, Fault) and c is not Fault}
    kinds = {c for c in classes if issubclass(c, Trigger) and c is not Trigger}
    bases = {c for c in kinds if c.__name__ in ("DiskTrigger", "StreamTrigger")}
    assert families - said == set()
    assert kinds - bases - triggers == set()


def test_every_fault_has_a_family() -> None:
    known = {"power", "network", "storage", "guest", "clock", "operator"}
    assert {fault.family for fault, _ in SENTENCES} == known


def test_faults_are_values() -> None:
    one = power_cut("torn").when(flush(2))
    assert one == power_cut("torn").when(flush(2))
    assert hash(one) == hash(power_cut("torn").when(flush(2)))
    assert power_cut("torn").trigger is None, "when() must not change what it is called on"


def test_a_fault_refuses_a_trigger_that_it_cannot_have() -> None:
    with pytest.raises(FaultError, match="a place in the slot"):
        bit_flip().when(state("Download"))
    with pytest.raises(FaultError, match="over when it is left"):
        state("Download").leave().at(percent=5)
    with pytest.raises(FaultError, match="over when it is left"):
        state("Download").at(percent=5).leave()
    with pytest.raises(FaultError, match="a percent or a number"):
        state("Download").at()


def test_an_unknown_cache_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(FaultError, match="'wet' is no cache model; known: kept, prefix"):
        power_cut("wet")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: slot_write(percent=-1),
        lambda: downloaded(percent=101),
        lambda: state("x").at(percent=101),
        lambda: boot_env_write(0),
        lambda: operation(0),
        lambda: flush(0),
        lambda: writes_to("data", -1),
        lambda: writes_to(""),
        lambda: stream_byte(-1),
        lambda: machine_event(""),
        lambda: brown_out(1),
        lambda: connection("gone"),  # type: ignore[arg-type]
        lambda: connection("stall", lasts_s=0),
        lambda: connection("fin", times=0),
        lambda: slow_network(bytes_per_s=0),
        lambda: link_down(lasts_s=-1),
        lambda: server_answers(200),
        lambda: server_answers(503, times=0),
        lambda: server_answers(503, retry_after_s=-1),
        lambda: wrong_content("right"),  # type: ignore[arg-type]
        lambda: bad_certificate("good"),  # type: ignore[arg-type]
        lambda: storage_error("erase"),  # type: ignore[arg-type]
        lambda: storage_error("write", count=0),
        lambda: slow_disk(0),
        lambda: bit_rot(percent=101),
        lambda: data_full(-1),
        lambda: process_killed("HUP"),  # type: ignore[arg-type]
        lambda: memory_pressure(0),
        lambda: clock("yesterday"),
        lambda: ctrl_c(0),
        lambda: second_command("setup"),  # type: ignore[arg-type]
    ],
)
def test_a_value_out_of_its_range_is_refused_where_it_is_written(
    make: Callable[[], object],
) -> None:
    with pytest.raises((ValueError, FaultError)):
        make()


@pytest.mark.parametrize(
    ("fault", "needs"),
    [
        (power_cut().when(console("x")), {"power-cut"}),
        (connection("fin").when(slot_write(percent=1)), {"network", "power-cut"}),
        (link_down(), {"link"}),
        (hang(), {"linux", "network", "watchdog"}),
        (clock_battery(), {"rtc"}),
        (ctrl_c(), set()),
        (clock("2003-01-01").when(state("x").at(percent=1)), {"linux", "power-cut"}),
        (ctrl_c().when(machine_event("RESET")), {"emulated"}),
        (ctrl_c().when(after(link_down(), flush())), {"link", "power-cut"}),
    ],
    # A set has another text in every process.
    ids=lambda value: str(value) if isinstance(value, Fault) else "needs",
)
def test_a_fault_knows_the_features_that_it_needs(fault: Fault, needs: set[str]) -> None:
    assert fault.features() == needs
    assert missing_features([fault, 7, "text"], frozenset()) == needs
    assert missing_features([fault], frozenset(needs)) == frozenset()


def test_a_rig_that_lacks_a_feature_refuses_the_fault_by_its_name() -> None:
    check_features(hang(), frozenset({"linux", "network", "watchdog"}), "bench.yaml")
    with pytest.raises(
        FaultError, match=r"system hangs: needs the feature watchdog, which the rig bench.yaml"
    ):
        check_features(hang(), frozenset({"linux", "network"}), "bench.yaml")
