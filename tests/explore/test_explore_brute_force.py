"""The explorer finds exactly the states and classes that a plain reference makes one by one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from explore_reference import (
    DEVICES,
    SECTORS,
    UNREADABLE,
    Op,
    S,
    base_content,
    facts_of,
    layout,
    reference,
    write_journal,
)
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from framework.disk import (
    Emmc,
    JournalReader,
    LooseDiscard,
    LyingFlush,
    PrefixCache,
    ReorderedCache,
    SdCard,
    TornPage,
    TornSector,
    UnreadableSectorError,
    VolatileCache,
    WriteThrough,
)
from framework.explore import confirm, explore


def content_of(state, reader):
    with state.disks(reader) as disks:
        found = []
        for name in DEVICES:
            sectors = []
            for i in range(SECTORS):
                try:
                    sectors.append(disks[name].read(i * S, S))
                except UnreadableSectorError:
                    sectors.append(UNREADABLE)
            found.append(tuple(sectors))
        return tuple(found)


def images_of(reader):
    """What the engine takes for images when it is given none: the first and the last content."""
    ends = {}
    with reader.states_at(len(reader.operations))["vda"] as disk:
        for slot, first in (("slot a", 4), ("slot b", 10)):
            initial = base_content()[first * S : (first + 6) * S]
            final = disk.read(first * S, 6 * S)
            ends[slot] = [("initial", initial)]
            if final != initial:
                ends[slot].append(("final", final))
    return ends


PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking takes minutes here
FILLS = (0x00, 0x80, 0x84, 0x11, 0x22)


def operations(
    *, delays=(0,), fua=(False,), kinds=("write", "write", "write", "flush", "zero", "discard")
):
    def build(kind, device, first, count, fill, flagged, delay):  # noqa: PLR0917
        flush = kind == "flush"
        return Op(
            kind,
            device,
            first,
            min(count, SECTORS - first),
            fill,
            flagged and kind == "write",
            0 if flush and delay is None else delay,
        )

    return st.builds(
        build,
        st.sampled_from(kinds),
        st.sampled_from((0, 0, 0, 1)),
        st.integers(0, SECTORS - 1),
        st.integers(1, 5),
        st.sampled_from(FILLS),
        st.sampled_from(fua),
        st.sampled_from(delays),
    )


scripts = st.lists(operations(), max_size=7)
wild = st.lists(operations(delays=(0, 0, 1, 2, 3, None), fua=(False, False, True)), max_size=6)

MODELS = [
    WriteThrough(),
    PrefixCache(),
    VolatileCache(),
    LyingFlush(),
    LyingFlush(flushes=1),
    TornSector(),
    TornSector(granularity=2048),
    TornPage(granularity=4096),
    TornSector(kinds=("mix",)),
    Emmc(erase_unit=2048),
    Emmc(erase_unit=4096, erased=255),
    Emmc(reliable=True),
    ReorderedCache(),
    SdCard(window=2),
    SdCard(window=3),
    LooseDiscard(),
]


def check(script, model, **options):
    """Explore a script's journal, compare with the reference; returns both for more checks."""
    with tempfile.TemporaryDirectory(prefix="brownout-test-") as folder:
        path, written = write_journal(Path(folder), script)
        reader = JournalReader(path)
        where = layout()
        images = images_of(reader)
        truth = reference(written, model)
        classes = {}
        for content, moments in truth.items():
            facts = facts_of(content, where, images)
            mine = classes.setdefault(facts, [0, set()])
            mine[0] += 1
            mine[1] |= moments
        found = explore(reader, where, model, samples=20, **options)
        found = confirm(reader, where, [model], found)
        assert len({one.sha256 for one in found.classes}) <= len(found.classes)
        sampled = any(row.how == "sampled" for row in found.coverage)
        scattered = any("scattered" in row.note for row in found.coverage)
        mine = {}
        for one in found.classes:
            content = content_of(one.representative, reader)
            facts = facts_of(content, where, images)
            assert facts not in mine, "two classes look alike"
            mine[facts] = one
            if not one.exhaustive:
                continue
            for state in (*one.samples, *(s.earliest for s in one.spans)):
                assert facts_of(content_of(state, reader), where, images) == facts
            if not scattered:
                assert content in truth, "a state that the model does not allow"
        exhaustive = {facts for facts, one in mine.items() if one.exhaustive}
        assert exhaustive <= set(classes), "a class that the model does not reach"
        if not sampled:
            assert exhaustive == set(classes)
        if all(op.delay == 0 and not op.fua for op in script):
            check_moments(script, {f: mine[f] for f in exhaustive}, classes)
        return found, mine, truth, classes, sampled, scattered


def check_moments(script, mine, classes):
    """Power can fail so that a class results when the spans say so, and at no other moment.

    The reference lets a flush take effect as it arrives; in truth it may yet be lost until it is
    answered, which the spans know.
    """
    flushes = {number for number, op in enumerate(script, 1) if op.kind == "flush"}
    for facts, one in mine.items():
        told = {
            moment
            for span in one.spans
            for moment in range(span.first_operation, span.last_operation + 1)
        }
        assert told >= classes[facts][1], "a moment at which a class is possible is missing"
        assert told - classes[facts][1] <= flushes, "a class at a moment when it is not possible"


@pytest.mark.parametrize("model", MODELS, ids=str)
@settings(max_examples=20, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck))
@given(script=st.one_of(scripts, wild))
def test_every_class_and_every_state_is_found_and_no_other(model, script):
    found, mine, truth, classes, sampled, scattered = check(script, model)
    assert not sampled
    if not scattered:
        assert found.counts.states == len(truth)
        for facts, (count, _) in classes.items():
            assert mine[facts].count == count


@pytest.mark.parametrize("model", [VolatileCache(), LyingFlush(), LyingFlush(flushes=1)], ids=str)
@settings(max_examples=40, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck))
@given(script=st.one_of(scripts, wild))
def test_the_product_of_regions_equals_full_enumeration(model, script):
    found, _, truth, _, sampled, _ = check(script, model, exhaustive_up_to=0)
    event(f"{'products' if any(r.how == 'classes' for r in found.coverage) else 'nothing open'}")
    assert not sampled
    rows = [r for r in found.coverage if r.how == "classes"]
    if len(found.coverage) == len(rows) == 1:
        assert rows[0].states == len(truth)
