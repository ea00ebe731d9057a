"""How many crash states a second the explorer goes through, and against what.

    python tests/benchmarks/explore.py [--update-mib N] [--disk-mib N] [--model NAME ...] [--json]

A synthetic recording is written first: an update of N MiB of random bytes into the passive slot
(1 MiB writes, a flush every 8 MiB, the head last), then the switch (two environment copies, each
with a flush), the restart, a commit, and file system traffic on the data partition, with the marks
of what was promised. Then, each in a process of its own and so without a warm cache of anything but
the page cache:

* *whole process*: from starting Python to its end: imports, reading and checking the journal,
  hashing, learning the images (SHA-256 of every candidate), enumeration, classes, and the static
  oracle's verdict on every class in every phase in which it is possible;
* *indexed*: the same without what comes before the enumeration: enumeration, classes, verdicts.

A *state* that counts is a distinct content of the disk, in the space of at least one of the models,
whose class was judged; beside it, *visited*: the (moment, decision) pairs, of which several may
lead to the same content (each model's prefixes are the same states). What a product of regions
stands for without being visited is counted in neither. *Naive*, in the same run: copy the disk,
let the writes before a cut point take effect, hash it with SHA-256, for a few cut points; the
ratio is to that, so that a naive state is judged by nothing and found in no class.

Medians over the rounds, on one core; the largest resident memory of any round, as the kernel gives
it, which counts the mapped journal. Exit code 0; 1 if a goal is missed by the states visited
(500,000/s whole process, 2,000,000/s indexed: what earlier figures counted) or 2 GiB of memory; 2
if it can't run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from framework.disk import MODELS, DiskError, JournalReader, model_from
from framework.disk.journal import (
    BaseIdentity,
    DeviceHeader,
    JournalHeader,
    JournalWriter,
    Kind,
    mark_payload,
)
from framework.disk.ubootenv import build_copy
from framework.explore import (
    KnownImage,
    Layout,
    MenderVariables,
    Range,
    Region,
    Role,
    UbootStore,
    explore,
    gpt_region,
)
from framework.explore.bulk import BulkOracle, judge_all
from framework.explore.judges.context import Context
from framework.explore.timeline import SOURCE, Promise, Restarted, read_timeline, to_mark
from framework.verdict import (
    BootSeen,
    CommitReached,
    Committed,
    ImageFacts,
    InstallEnded,
    InstallStarted,
)

MIB = 1 << 20
ENVIRONMENT = 16384
WHOLE_GOAL = 500_000
INDEXED_GOAL = 2_000_000
MEMORY_GOAL = 2 << 30
DEFAULT_MODELS = ("kept", "prefix", "torn", "torn-page", "emmc", "subset", "sd")


def layout(disk: int, update: int, images: tuple[KnownImage, ...]) -> Layout:
    """An A/B disk: table, two environment copies, two slots, data to the end."""
    slots = [2 * MIB, 2 * MIB + update]
    data = slots[1] + update
    return Layout(
        (
            gpt_region("vda", disk),
            Region("slot a", Role.SLOT, (Range("vda", slots[0], update),), images, magic=None),
            Region("slot b", Role.SLOT, (Range("vda", slots[1], update),), images, magic=None),
            Region("data", Role.DATA, (Range("vda", data, disk - data - MIB),)),
        ),
        UbootStore((Range("vda", MIB, ENVIRONMENT), Range("vda", MIB + ENVIRONMENT, ENVIRONMENT))),
        MenderVariables({"2": "a", "3": "b"}),
    )


class Script:
    """Writes operations, each answered at once."""

    def __init__(self, writer: JournalWriter) -> None:
        self.writer = writer
        self.count = 0

    def put(self, kind: Kind, offset: int = 0, payload: bytes = b"") -> None:
        """One operation of vda."""
        self.count += 1
        self.writer.append(
            kind,
            device=0,
            operation=self.count,
            offset=offset,
            length=len(payload),
            payload=payload,
        )
        self.writer.append(Kind.COMPLETE, operation=self.count)
        self.writer.flush()


def record(folder: Path, disk: int, update: int) -> tuple[Path, tuple[KnownImage, ...]]:
    """Write base image and journal; returns the journal and the two images."""
    rng = random.Random(1)
    base = folder / "base.img"
    old, new = (b"".join(rng.randbytes(MIB) for _ in range(update // MIB)) for _ in range(2))
    where = layout(disk, update, ())
    slot_a, slot_b = (where.region(n).ranges[0].offset for n in ("slot a", "slot b"))
    data = where.region("data").ranges[0].offset

    def environment(flags: int, part: str, trial: str) -> bytes:
        variables = {"mender_boot_part": part, "upgrade_available": trial, "bootcount": "0"}
        return build_copy(variables, ENVIRONMENT, flags=flags)

    with base.open("wb") as file:
        file.truncate(disk)
        for at, content in (
            (slot_a, old),
            (slot_b, old),
            (MIB, environment(1, "2", "0") + environment(0, "2", "0")),
        ):
            file.seek(at)
            file.write(content)
    images = tuple(
        KnownImage(name, hashlib.sha256(content).hexdigest(), update)
        for name, content in (("old", old), ("new", new))
    )
    digest = hashlib.sha256(base.read_bytes()).hexdigest() if disk <= 256 * MIB else "unknown"
    header = JournalHeader(
        (DeviceHeader("vda", disk, BaseIdentity(base, disk, digest)),),
        "2026-01-01T00:00:00.000+00:00",
        1,
    )
    writer = JournalWriter(folder / "disk.journal", header)
    script = Script(writer)

    def traffic(count: int) -> None:
        for _ in range(count):
            for _ in range(rng.randrange(1, 6)):
                script.put(Kind.WRITE, data + rng.randrange(512) * 4096, rng.randbytes(4096))
            script.put(Kind.FLUSH)

    def promise(event: Promise) -> None:
        writer.append(Kind.MARK, payload=mark_payload(SOURCE, to_mark(event)))

    promise(BootSeen(True, "old", "a"))
    traffic(10)
    promise(InstallStarted("new"))
    for at in range(MIB, update, MIB):
        script.put(Kind.WRITE, slot_b + at, new[at : at + MIB])
        if at % (8 * MIB) == 0:
            script.put(Kind.FLUSH)
    script.put(Kind.WRITE, slot_b, new[:MIB])
    script.put(Kind.FLUSH)
    for flags, trial in ((2, "1"), (3, "0")):
        traffic(5)
        if trial == "0":
            promise(Restarted())
            promise(CommitReached("new"))
        for copy in (1, 0):
            script.put(
                Kind.WRITE,
                MIB + copy * ENVIRONMENT,
                environment(flags, "3", trial),
            )
            script.put(Kind.FLUSH)
        promise(InstallEnded("new", 0) if trial == "1" else Committed("new", "b"))
    promise(BootSeen(True, "new", "b"))
    traffic(10)
    writer.append(Kind.CLOSE)
    writer.close()
    return folder / "disk.journal", images


CHILD = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
import explore as benchmark
from pathlib import Path
request = json.loads(sys.argv[2])
print(json.dumps(benchmark.child(request)))
"""


def child(request: dict) -> dict:
    """What a measured process does."""
    images = tuple(KnownImage(*i) for i in request["images"])
    models = [model_from(name) for name in request["models"]]
    reader = JournalReader(Path(request["journal"]))
    where = layout(request["disk"], request["update"], images)
    found = explore(reader, where, models, samples=1000)
    begun = time.perf_counter()
    facts = {i.name: ImageFacts(i.name, i.sha256, i.size_bytes, healthy=True) for i in images}
    slots = {"a": "slot a", "b": "slot b"}
    context = Context(reader, where, read_timeline(reader.marks), facts, "old", slots)
    broken = judge_all(BulkOracle(context), found.classes)
    judged = time.perf_counter() - begun
    counts = found.counts
    return {
        "visited": counts.points,
        "states": counts.states,
        "product": str(counts.product_states),
        "classes": counts.classes,
        "violated": broken,
        "index_s": counts.index_seconds,
        "judge_s": judged,
        "indexed_s": counts.seconds + judged,
        "cpu_s": time.process_time(),
        **memory(),
    }


def memory() -> dict[str, int]:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {"rss": int(fields["VmHWM"].split()[0]) << 10}


def naive(journal: Path, points: int = 3) -> float:
    """States a second by copying, writing and hashing."""
    reader = JournalReader(journal)
    total = len(reader.operations)
    begun = time.perf_counter()
    for at in range(1, points + 1):
        with reader.states_at(total * at // points)["vda"] as disk:
            digest = hashlib.sha256()
            for chunk in disk.chunks():
                digest.update(bytearray(chunk))
    return points / (time.perf_counter() - begun)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update-mib", type=int, default=64)
    parser.add_argument("--disk-mib", type=int, default=256)
    parser.add_argument("--model", action="append", choices=sorted(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    models = options.model or list(DEFAULT_MODELS)
    disk, update = options.disk_mib * MIB, options.update_mib * MIB
    if disk < 2 * update + 8 * MIB:
        print(f"a disk of {options.disk_mib} MiB is too small for two slots", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="brownout-bench-") as folder:
            journal, images = record(Path(folder), disk, update)
            request = {
                "journal": str(journal),
                "disk": disk,
                "update": update,
                "images": [(i.name, i.sha256, i.size_bytes) for i in images],
            }
            rows = [
                measure(request | {"models": m}, options.rounds)
                for m in [[name] for name in models] + [models]
            ]
            slow = naive(journal)
    except (DiskError, OSError, subprocess.SubprocessError) as error:
        print(f"can't measure: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps({"naive_per_s": slow, "rows": rows}, indent=2))
    else:
        show(rows, slow)
    whole = rows[-1]
    good = (
        whole["visited_whole_per_s"] >= WHOLE_GOAL
        and whole["visited_indexed_per_s"] >= INDEXED_GOAL
        and whole["rss"] <= MEMORY_GOAL
    )
    return 0 if good else 1


def measure(request: dict, rounds: int) -> dict:
    """Medians over rounds of one set of models."""
    whole, results = [], []
    for _ in range(rounds):
        begun = time.perf_counter()
        out = subprocess.run(
            [sys.executable, "-c", CHILD, str(Path(__file__).parent), json.dumps(request)],
            capture_output=True,
            text=True,
            check=True,
            timeout=900,
        )
        whole.append(time.perf_counter() - begun)
        results.append(json.loads(out.stdout))
    seconds = statistics.median(whole)
    indexed = statistics.median(r["indexed_s"] for r in results)
    first = results[0]
    return {
        "models": "+".join(request["models"]),
        **first,
        "index_s": statistics.median(r["index_s"] for r in results),
        "judge_s": statistics.median(r["judge_s"] for r in results),
        "cpu_s": statistics.median(r["cpu_s"] for r in results),
        "whole_s": seconds,
        "indexed_s": indexed,
        "whole_per_s": first["states"] / seconds,
        "indexed_per_s": first["states"] / indexed,
        "visited_whole_per_s": first["visited"] / seconds,
        "visited_indexed_per_s": first["visited"] / indexed,
        "rss": max(r["rss"] for r in results),
    }


def show(rows: list[dict], slow: float) -> None:
    """A table."""
    load = os.getloadavg()[0]
    print(f"naive copy and hash: {slow:.2f} states/s; load {load:.1f} on {os.cpu_count()} cores")
    for row in rows:
        print(
            f"{row['models']}: {row['states']:,} states ({row['visited']:,} visited), "
            f"{row['classes']:,} classes, {row['violated']} violated\n"
            f"  whole   {row['whole_s']:6.2f} s = {row['whole_per_s']:>10,.0f} states/s "
            f"({row['whole_per_s'] / slow:,.0f} x naive), "
            f"{row['visited_whole_per_s']:,.0f} visited/s"
            f"; {row['cpu_s']:.2f} s of CPU\n"
            f"  indexed {row['indexed_s']:6.2f} s = {row['indexed_per_s']:>10,.0f} states/s "
            f"({row['indexed_per_s'] / slow:,.0f} x naive), {row['visited_indexed_per_s']:,.0f} "
            f"visited/s; index {row['index_s']:.2f} s, verdicts {row['judge_s']:.2f} s\n"
            f"  memory  {row['rss'] / MIB:,.0f} MiB at the most, mapped files among it"
        )


if __name__ == "__main__":
    sys.exit(main())
