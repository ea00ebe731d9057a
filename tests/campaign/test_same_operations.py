"""The simulated and the emulated rig do the same to the disk, at the updater's level.

The same update on both; both journals are the recorder's. Of each the writes are kept that mean
something to the updater: to the passive slot (its head zeroed, its body, its head), to a copy of
the boot environment, a state on the record; and whether a flush lay between two of them. What the
kernel writes besides, and how it cuts large writes, is left out. A difference fails.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from simulated_bugs import SwitchesFirst

from framework.disk import JournalReader
from framework.disk.journal import Kind
from framework.network import FaultProxy
from framework.scenario.bench import Bench, open_bench_on
from framework.scenario.manifest import Extent
from updater.device.client import Client
from updater.device.model import State
from updater.device.slot_writer import HEAD_BYTES, SlotWriter

RIGS = Path(__file__).parents[2] / "rigs"
STATES = [str(state) for state in State if state not in (State.IDLE, State.SYNC)]


def outline(rig: str, client: Any = None) -> list[str]:
    """Install, restart and commit on a rig; what was done to its disk."""
    with contextlib.closing(open_bench_on(RIGS / f"{rig}.yaml", ["v1", "v2"])) as bench:
        if client is not None:
            bench.machine.make_client = client  # type: ignore[attr-defined]
        with FaultProxy((bench.server.host, bench.server.port)) as proxy:
            update = bench.update("v2", proxy.port)
            device = bench.device("v1", lambda text: None, lambda text: contextlib.nullcontext())
            with contextlib.closing(device):
                assert device.boot().ready
                first = bench.machine.recorder.operations
                assert device.update(update).exit_code == 0
                assert device.running is not None
                bench.machine.recorder.commit()
                return _outline(bench, first)


def _outline(bench: Bench, first: int) -> list[str]:
    path = bench.machine.recorder.journal_path
    manifest = bench.manifest("v1")
    records = {name: bench.uut.record(name) for name in STATES}
    done: list[str] = []
    flushed = False
    with JournalReader(path) as reader, path.open("rb") as journal:
        found = reader.operations
        for row in range(first, len(found)):
            kind = Kind(int(found.kind[row]))
            if kind is Kind.FLUSH:
                flushed = True
                continue
            if kind is not Kind.WRITE:
                continue
            journal.seek(int(found.position[row]))
            offset, length = int(found.offset[row]), int(found.length[row])
            content = journal.read(length)
            for word in _words(manifest, records, offset, content):
                if word in done and word.startswith("record"):
                    continue
                if done and done[-1] == word:
                    continue
                if flushed and done:
                    done.append("flush")
                if done[-2:-1] == [word]:
                    done.pop()  # the kernel's own flush, in the middle of the same work
                    continue
                done.append(word)
                flushed = False
    return _renamed(done)


def _renamed(done: list[str]) -> list[str]:
    """The copies by the order in which they are written: which is older at first is chance."""
    copies: dict[str, str] = {}
    for word in done:
        if word.startswith("environment"):
            copies.setdefault(word, f"environment, {'the other' if copies else 'one copy'}")
    return [copies.get(word, word) for word in done]


def _words(manifest: Any, records: Any, offset: int, content: bytes) -> list[str]:
    slot: Extent = manifest.slots["b"]
    if slot.offset <= offset < slot.offset + slot.length:
        if offset - slot.offset >= HEAD_BYTES:
            return ["slot body"]
        return ["slot head" if content.strip(b"\0") else "slot head zeroed"]
    for number, copy in enumerate(manifest.environment, 1):
        if copy.offset <= offset < copy.offset + copy.length:
            return [f"environment copy {number}"]
    return [f"record {name}" for name, pattern in records.items() if pattern.search(content)]


def test_the_simulated_rig_does_what_an_update_has_to() -> None:
    done = [word for word in outline("simulated") if word != "flush"]
    assert done == [
        "record Download",
        "slot head zeroed",
        "slot body",
        "slot head",
        "record ArtifactInstall",
        "environment, one copy",
        "record ArtifactReboot",
        "environment, the other",
        "record ArtifactVerifyReboot",
        "record ArtifactCommit",
        "environment, one copy",
        "record Cleanup",
    ]


@pytest.mark.emulated
def test_the_emulated_rig_does_the_same() -> None:
    assert outline("simulated") == outline("qemu-arm64")


class NeverInvalidates(Client):
    """Leaves the old head in the slot while the rest is written."""

    def fill_slot(self, payload: Any) -> None:
        invalidate = SlotWriter.invalidate
        SlotWriter.invalidate = lambda self: None  # type: ignore[method-assign]
        try:
            super().fill_slot(payload)
        finally:
            SlotWriter.invalidate = invalidate  # type: ignore[method-assign]


class NeverSyncsTheBody(Client):
    """Writes the head before the body is durable."""

    def fill_slot(self, payload: Any) -> None:
        sync = SlotWriter.sync
        SlotWriter.sync = lambda self: None  # type: ignore[method-assign]
        try:
            super().fill_slot(payload)
        finally:
            SlotWriter.sync = sync  # type: ignore[method-assign]


@pytest.mark.parametrize("bug", [SwitchesFirst, NeverInvalidates, NeverSyncsTheBody])
def test_an_updater_that_does_something_else_is_seen(bug: Any) -> None:
    assert outline("simulated", bug) != outline("simulated")
