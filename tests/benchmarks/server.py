"""What a poll costs the management server, and whether that stays flat as the fleet grows.

Run it as `python tests/benchmarks/server.py [--sizes 1000,10000,100000]`. For each size the
database is filled with that many accepted devices (keys, inventory, a finished deployment's
history each) and one running deployment for another group; then a sample of simulated devices
polls over TLS, with connections kept and with a new one each time. The server is a process of its
own, and its CPU time is read from /proc, so polls/s per core are of the server alone, whatever
else runs on the machine. Ratios compare sizes within one run; absolute figures are of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from updater.server import fleet as fleets
from updater.server.database import Database
from updater.server.identity import parse_identity, parse_key
from updater.server.models import Assignment, Attribute, Deployment, Device, DeviceKey
from updater.server.settings import load_settings
from updater.server.setup import initialise
from updater.server.simulate import Figures, SimulatedDevice, each, open_fleet

SAMPLE = 500
_TICKS = os.sysconf("SC_CLK_TCK")


def fill(folder: Path, total: int, known: int = SAMPLE) -> None:
    """Fill the database with `total` accepted devices; the first `known` can authenticate."""
    database = Database(load_settings(folder).database_url)
    now = time.time()
    sample = [SimulatedDevice(n, "simulated", "v1") for n in range(min(known, total))]

    def job(session) -> None:  # type: ignore[no-untyped-def]
        done = Deployment(
            id="done", name="done", artifact_name="v0", status="finished",
            target={"kind": "all", "devices": [], "group": "", "conditions": []},
            plan={"phases": [{}], "window": None}, open_phase=0, created_at=now,
            created_by="bench", starts_at=now, ends_at=now + 1e6, device_count=total,
        )  # fmt: skip
        session.add(done)
        session.flush()
        for start in range(0, total, 5000):
            rows, keys, attributes, assignments = [], [], [], []
            for number in range(start, min(start + 5000, total)):
                name = f'{{"name":"simulated-0-{number}"}}'
                identity = parse_identity(name)
                device_id = f"device-{number}"
                key = parse_key(sample[number].public_pem) if number < len(sample) else None
                rows.append(
                    {"id": device_id, "identity_hash": identity.digest, "identity": identity.text,
                     "status": fleets.ACCEPTED, "created_at": now, "artifact_name": "v1",
                     "device_type": "simulated"}
                )  # fmt: skip
                keys.append(
                    {"id": f"key-{number}", "device_id": device_id, "pem": key.pem if key else "",
                     "key_hash": key.digest if key else str(number), "status": fleets.ACCEPTED,
                     "created_at": now}
                )  # fmt: skip
                attributes += [
                    {"device_id": device_id, "name": n, "position": 0, "value": v, "is_list": False}
                    for n, v in (("device_type", "simulated"), ("artifact_name", "v1"),
                                 ("kernel", f"6.1.{number % 7}"), ("site", f"site-{number % 100}"))
                ]  # fmt: skip
                assignments.append(
                    {"deployment_id": "done", "device_id": device_id, "phase": 0, "open": False,
                     "status": "success", "attempts": 0, "not_before": 0.0, "changed_at": now}
                )  # fmt: skip
            for table, values in (
                (Device, rows), (DeviceKey, keys), (Attribute, attributes),
                (Assignment, assignments),
            ):  # fmt: skip
                session.execute(table.__table__.insert(), values)

    database.write_now(job)
    database.close()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


async def measure(
    port: int, ca: Path, pid: int, *, seconds: float, keep: bool
) -> tuple[Figures, float]:
    """Poll for some seconds; return the figures and the server's CPU seconds."""
    devices = [SimulatedDevice(n, "simulated", "v1") for n in range(SAMPLE)]
    async with open_fleet(f"https://localhost:{port}", ca, devices, 16) as fleet:
        await each(fleet, fleet.authenticate, 16)
        assert all(d.token for d in devices), "the sample was not accepted"
        if not keep:
            fleet._session.headers["Connection"] = "close"  # type: ignore[index]
        fleet.figures = Figures()
        before, end = cpu_seconds(pid), time.perf_counter() + seconds
        while time.perf_counter() < end:
            await each(fleet, fleet.poll, 16)
        return fleet.figures, cpu_seconds(pid) - before


def main() -> None:
    """Print one row a size and kind of connection."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sizes", default="1000,10000,100000")
    parser.add_argument("--seconds", type=float, default=8.0)
    options = parser.parse_args()
    print("devices  connection  polls/s  polls/s/core  ms CPU/poll  p50 ms  p99 ms  errors  ratio")
    first: dict[bool, float] = {}
    for size in (int(text) for text in options.sizes.split(",")):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "server"
            initialise(folder, ["localhost"], 0, "127.0.0.1")
            fill(folder, size)
            command = [sys.executable, "-m", "updater.cli", "server", "run", str(folder)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
                assert server.stdout is not None
                port = int(server.stdout.readline().rsplit(":", 1)[1])
                try:
                    for keep in (True, False):
                        figures, cpu = asyncio.run(
                            measure(
                                port,
                                folder / "ca.pem",
                                server.pid,
                                seconds=options.seconds,
                                keep=keep,
                            )
                        )
                        count = figures.count("poll")
                        each_ms = 1000 * cpu / count
                        ratio = each_ms / first.setdefault(keep, each_ms)
                        p50, p99 = (1000 * figures.percentile("poll", p) for p in (50, 99))
                        print(
                            f"{size:7}  {'kept' if keep else 'new':10}  "
                            f"{count / figures.elapsed_s:7.0f}  {count / cpu:12.0f}  "
                            f"{each_ms:11.2f}  {p50:6.1f}  {p99:6.1f}  "
                            f"{sum(figures.errors.values()):6}  {ratio:5.2f}",
                            flush=True,
                        )
                finally:
                    server.terminate()
                    server.wait(timeout=30)


if __name__ == "__main__":
    main()
