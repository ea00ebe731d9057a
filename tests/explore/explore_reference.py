"""A reference for the explorer: tiny journals, and every crash state by plain bookkeeping.

`reference` is written without the engine, without `framework.disk.state`, and without NumPy: it
makes every state of a model's space as bytes and asks the same questions of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from pathlib import Path

from framework.disk import Emmc, LooseDiscard, LyingFlush, SdCard, TornSector
from framework.disk.journal import (
    BaseIdentity,
    DeviceHeader,
    Flag,
    JournalHeader,
    JournalWriter,
    Kind,
)
from framework.disk.models import garbage_bytes
from framework.explore import KnownImage, Layout, MenderVariables, Range, Region, Role, UbootStore

S = 512
DEVICES = ("vda", "vdb")
SECTORS = 24
UNREADABLE = b"unreadable"


@dataclasses.dataclass(frozen=True)
class Op:
    """A step of a script; `delay`: after how many later arrivals it completes (None: never)."""

    kind: str
    device: int
    first: int = 0
    count: int = 1
    fill: int = 0
    fua: bool = False
    delay: int | None = 0


@dataclasses.dataclass
class Written:
    """The operation as the journal has it: `arrived`, `completed` are sequence numbers."""

    op: Op
    number: int
    arrived: int
    completed: int | None = None

    def content(self) -> list[bytes]:
        if self.op.kind == "write":
            return [bytes([self.op.fill]) * S] * self.op.count
        return [bytes(S)] * self.op.count


def base_content(seed: int = 0) -> bytes:
    return b"".join(bytes([0x80 + (i + seed) % 64]) * S for i in range(SECTORS))


def write_journal(folder: Path, script: list[Op]) -> tuple[Path, list[Written]]:
    """A journal as a recorder would have written it."""
    bases = []
    for number, name in enumerate(DEVICES):
        path = folder / f"{name}.img"
        path.write_bytes(base_content(number))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        bases.append(DeviceHeader(name, SECTORS * S, BaseIdentity(path, SECTORS * S, digest)))
    writer = JournalWriter(
        folder / "disk.journal", JournalHeader(tuple(bases), "2026-01-01T00:00:00.000+00:00", 1)
    )
    written: list[Written] = []
    due: list[tuple[int, Written]] = []
    kinds = {"write": Kind.WRITE, "flush": Kind.FLUSH, "discard": Kind.DISCARD, "zero": Kind.ZEROES}

    def complete(before: int) -> None:
        for entry in sorted(due, key=lambda d: d[0]):
            if entry[0] <= before:
                due.remove(entry)
                entry[1].completed, _ = writer.append(Kind.COMPLETE, operation=entry[1].number)

    for number, op in enumerate(script, 1):
        flush = op.kind == "flush"
        sequence, _ = writer.append(
            kinds[op.kind],
            device=op.device,
            flags=Flag.FUA if op.fua else 0,
            operation=number,
            offset=0 if flush else op.first * S,
            length=0 if flush else op.count * S,
            payload=bytes([op.fill]) * (S * op.count) if op.kind == "write" else b"",
        )
        written.append(Written(op, number, sequence))
        if op.delay is not None:
            due.append((number + op.delay, written[-1]))
        complete(number)
    complete(len(script) + 1000)
    writer.append(Kind.CLOSE)
    writer.close()
    return folder / "disk.journal", written


# ---------------------------------------------------------------- a layout over 24 sectors


def layout(images: tuple[KnownImage, ...] = ()) -> Layout:
    """vda: two environment copies, two slots, data; vdb: boot files. Sector 23 is nobody's."""
    return Layout(
        (
            Region("slot a", Role.SLOT, (Range("vda", 4 * S, 6 * S),), images, ((0, S),), None),
            Region("slot b", Role.SLOT, (Range("vda", 10 * S, 6 * S),), images, ((0, S),), None),
            Region("data", Role.DATA, (Range("vda", 16 * S, 7 * S),)),
            Region("boot", Role.BOOT, (Range("vdb", 0, 20 * S),)),
        ),
        UbootStore((Range("vda", 0, 2 * S), Range("vda", 2 * S, 2 * S))),
        MenderVariables({"2": "a", "3": "b"}),
    )


Content = tuple[tuple[bytes, ...], ...]
"""Every sector of every device."""


def facts_of(content: Content, where: Layout, images: dict[str, list[tuple[str, bytes]]]):
    """What a boot can tell, from the bytes; `images`: by slot, smallest first."""
    found = []
    for region in where.all_regions():
        sectors = [
            content[DEVICES.index(r.device)][i]
            for r in region.ranges
            for i in range(r.offset // S, r.end // S)
        ]
        if region.role is not Role.SLOT:
            found.append((region.name, tuple(sectors)))
            continue
        name = next(
            (n for n, data in images[region.name] if b"".join(sectors)[: len(data)] == data), None
        )
        found.append((region.name, name, sectors[0]))
    return tuple(found)


# ---------------------------------------------------------------- the reference


def reference(written: list[Written], model, *, seed: int = 0) -> dict[Content, set[int]]:
    """Every state of a model's space, and the moments at which it is possible."""
    found: dict[Content, set[int]] = {}
    for moment in range(len(written) + 1):
        arrived = written[:moment]
        changing = [w for w in arrived if w.op.kind != "flush"]
        both = (False, True) if arrived and arrived[-1].op.fua else (False,)
        outcomes = (o for inside in both for o in _outcomes(model, arrived, changing, seed, inside))
        for kept, damage in outcomes:
            state = [
                [base_content(d)[i * S : (i + 1) * S] for i in range(SECTORS)]
                for d in range(len(DEVICES))
            ]
            for w in sorted(changing, key=_applied):
                for i, sector in enumerate(w.content()):
                    if i in kept.get(w.number, ()):
                        state[w.op.device][w.op.first + i] = sector
            for device, first, contents in damage:
                state[device][first : first + len(contents)] = contents
            found.setdefault(tuple(map(tuple, state)), set()).add(moment)
    return found


def _applied(w: Written) -> tuple[float, int]:
    return (float("inf") if w.completed is None else w.completed, w.arrived)


def _open(arrived: list[Written], changing: list[Written], lies: int | None, inside: bool):
    """The open operations in the order of application; `inside` the newest write, if it is FUA."""
    barrier = {}
    for device in range(len(DEVICES)):
        flushes = [
            w.arrived
            for w in arrived
            if w.op.kind == "flush" and w.op.device == device and w.completed is not None
        ]
        if lies is not None and len(flushes) > lies:
            barrier[device] = sorted(flushes)[-1 - lies]
    newest = arrived[-1].number if inside else 0

    def durable(w: Written) -> bool:
        if w.completed is None:
            return False
        covered = w.completed < barrier.get(w.op.device, -1)
        return covered or (lies == 0 and w.op.fua and w.number != newest)

    return sorted((w for w in changing if not durable(w)), key=_applied)


def _outcomes(model, arrived, changing, seed, inside):
    """(surviving sectors by operation, damage) for every decision of the model's space."""
    whole = {w.number: range(w.op.count) for w in changing}
    lies = model.flushes if isinstance(model, LyingFlush) else 0
    opened = _open(arrived, changing, lies, inside)
    durable = {w.number: whole[w.number] for w in changing if w not in opened}
    if model.name == "kept":
        yield {n: s for n, s in whole.items() if arrived[n - 1].completed is not None}, ()
    elif model.name == "prefix":
        for i, w in [*enumerate(opened), (len(opened), None)]:
            before = durable | {o.number: whole[o.number] for o in opened[:i]}
            for sectors in range(w.op.count + 1) if w else (0,):
                yield before | ({w.number: range(sectors)} if w else {}), ()
    elif model.name == "reordered":
        keep = -(-len(opened) // 2)
        newest = opened[len(opened) - keep :]
        yield durable | {o.number: whole[o.number] for o in newest}, ()
    elif isinstance(model, SdCard):
        at_stake = []
        for device in range(len(DEVICES)):
            at_stake += [w for w in opened if w.op.device == device][-model.window :]
        rest = durable | {w.number: whole[w.number] for w in opened if w not in at_stake}
        for size in range(len(at_stake) + 1):
            for chosen in itertools.combinations(at_stake, size):
                yield rest | {w.number: whole[w.number] for w in chosen}, ()
    elif isinstance(model, TornSector | Emmc):
        yield from _torn(model, opened, durable, whole, changing, seed)
    elif isinstance(model, LooseDiscard):
        yield from _discards(changing, whole, seed)
    else:
        for size in range(len(opened) + 1):
            for chosen in itertools.combinations(opened, size):
                yield durable | {w.number: whole[w.number] for w in chosen}, ()


def _torn(model, opened, durable, whole, changing, seed):  # noqa: PLR0917
    yield durable | {o.number: whole[o.number] for o in opened}, ()
    unit = 1 if isinstance(model, Emmc) else model.granularity // S
    lost = (model.erase_unit if isinstance(model, Emmc) else model.granularity) // S
    for i, w in enumerate(opened):
        before = durable | {o.number: whole[o.number] for o in opened[:i]}
        parts = _split(w, unit)
        shapes = [[p < cut for p in range(len(parts))] for cut in range(len(parts) + 1)]
        if not isinstance(model, Emmc):
            shapes += [[p >= cut for p in range(len(parts))] for cut in range(len(parts) + 1)]
        for shape in shapes:
            taken = [s for p, new in zip(parts, shape, strict=True) if new for s in p]
            yield before | {w.number: taken}, ()
        if isinstance(model, Emmc) and (model.reliable or w.op.fua):
            continue
        for number, part in enumerate(_split(w, lost)):
            place = (w.op.first + part[0]) // lost * lost
            size = min(lost, SECTORS - place)
            if any(
                o.number in durable
                and w.completed is not None
                and _applied(o) > _applied(w)
                and o.op.device == w.op.device
                and o.op.first < place + size
                and place < o.op.first + o.op.count
                for o in changing
            ):
                continue
            pieces = _split(w, lost)
            earlier = [s for p in pieces[:number] for s in p]
            later = [s for p in pieces[number + 1 :] for s in p]
            for content in _damages(model, w.op.device, place, size, seed):
                yield before | {w.number: earlier}, ((w.op.device, place, content),)
                if not isinstance(model, Emmc):
                    yield before | {w.number: later}, ((w.op.device, place, content),)


def _split(w: Written, unit: int) -> list[list[int]]:
    """A write's sectors (from its start) by the aligned units they lie in."""
    groups: dict[int, list[int]] = {}
    for i in range(w.op.count):
        groups.setdefault((w.op.first + i) // unit, []).append(i)
    return list(groups.values())


def _damages(model, device: int, first: int, count: int, seed: int) -> list[list[bytes]]:
    if isinstance(model, Emmc):
        return [[bytes([model.erased]) * S] * count]
    found = []
    if "garbage" in model.kinds:
        junk = garbage_bytes(seed, device, first * S, count * S)
        found.append([junk[i * S : (i + 1) * S] for i in range(count)])
    if "unreadable" in model.kinds:
        found.append([UNREADABLE] * count)
    return found


def _discards(changing, whole, seed):
    done = [w for w in changing if w.completed is not None]
    discards = [w for w in done if w.op.kind == "discard"]
    for choice in itertools.product(("old", "zeros", "junk"), repeat=len(discards)):
        outcome = {w.number: c for w, c in zip(discards, choice, strict=True)}
        kept = {w.number: whole[w.number] for w in done if outcome.get(w.number) != "old"}
        damage = []
        for w in discards:
            if outcome[w.number] != "junk":
                continue
            pattern = garbage_bytes(seed, w.op.device, 0, 4096)
            for sector in range(w.op.first, w.op.first + w.op.count):
                later = [
                    o
                    for o in done
                    if _applied(o) > _applied(w)
                    and o.number in kept
                    and o.op.device == w.op.device
                    and o.op.first <= sector < o.op.first + o.op.count
                ]
                if not later:
                    at = sector % 8 * S
                    damage.append((w.op.device, sector, [pattern[at : at + S]]))
        yield kept, tuple(damage)
