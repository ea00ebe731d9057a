"""A whole fleet updates from one management server: how fast, how evenly, and whether all arrive.

Run it as `python tests/benchmarks/server_fleet.py [--devices 10000]`. The database is filled with
accepted devices that have keys of their own; one process then is all of them: each authenticates,
sends its inventory, polls, downloads its update over TLS, reports its way through it (five
reports) and polls again. The server is a process of its own whose CPU time is read from /proc, so
"a core" is a core of the server's. Ends with an error if a device did not get there.
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from server import cpu_seconds, fill

from updater.artifact import write_artifact
from updater.server import accounts
from updater.server.database import Database
from updater.server.settings import load_settings
from updater.server.setup import initialise
from updater.server.simulate import Figures, Fleet, SimulatedDevice, each, open_fleet

ARTIFACT_BYTES = 64 * 1024


def api_token(folder: Path) -> str:
    """A token of the first admin."""
    database = Database(load_settings(folder).database_url)
    admin = database.read_now(lambda s: accounts.require_user(s, "admin").id)
    token = database.write_now(
        lambda s: accounts.grant(s, admin, accounts.TOKEN, "bench", time.time(), 1e6)
    )
    database.close()
    return token


async def rollout(
    port: int, ca: Path, pid: int, token: str, artifact: Path, *, count: int, connections: int
) -> bool:
    """Bring the fleet up, update it, poll once more; print each part's figures."""
    devices = [SimulatedDevice(number, "simulated", "v1") for number in range(count)]
    url = f"https://localhost:{port}"
    async with open_fleet(url, ca, devices, connections) as fleet:

        async def arrive(device: SimulatedDevice) -> bool:
            return await fleet.authenticate(device) and await fleet.send_inventory(device)

        async def turn(device: SimulatedDevice) -> None:
            if offer := await fleet.poll(device):
                await fleet.update(device, offer, False)

        await part("arriving", fleet, arrive, connections, pid)
        await part("idle polls", fleet, fleet.poll, connections, pid)
        context = ssl.create_default_context(cafile=str(ca))
        headers = {"Authorization": f"Bearer {token}"}
        with httpx.Client(
            base_url=f"{url}/api/management/v1", verify=context, headers=headers, timeout=120
        ) as api:
            answer = await asyncio.to_thread(api.post, "/artifacts", content=artifact.read_bytes())
            answer.raise_for_status()
            body = {"name": "v2", "artifact_name": "v2", "target": {"all": True}}
            made = await asyncio.to_thread(api.post, "/deployments", json=body)
            made.raise_for_status()
            await part("updating", fleet, turn, connections, pid)
            await part("idle polls", fleet, fleet.poll, connections, pid)
            shown = await asyncio.to_thread(api.get, f"/deployments/{made.json()['id']}")
    print(f"\nthe server says: {shown.json()['status']} {shown.json()['counts']}")
    return bool(shown.json()["counts"] == {"success": count})


async def part(name: str, fleet: Fleet, action: object, connections: int, pid: int) -> None:
    """Run one part of it for every device."""
    fleet.figures = Figures()
    before = cpu_seconds(pid)
    await each(fleet, action, connections)
    figures, cpu = fleet.figures, cpu_seconds(pid) - before
    requests = sum(map(figures.count, figures.seconds))
    took = figures.elapsed_s
    print(f"\n{name}: {len(fleet.devices)} devices, {requests} requests in {took:.0f} s")
    print(f"{requests / took:.0f} requests/s, {requests / cpu:.0f} requests/s/core")
    print("\n".join(figures.lines()), flush=True)


def main() -> int:
    """Run it; return 1 if a device did not get there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "server"
        initialise(folder, ["localhost"], 0, "127.0.0.1")
        fill(folder, options.devices, options.devices)
        image = Path(name) / "image"
        image.write_bytes(bytes(ARTIFACT_BYTES))
        artifact = Path(name) / "v2.mender"
        write_artifact(
            artifact, image, name="v2", device_types=["simulated"], compression="none", key=None
        )
        token = api_token(folder)
        command = [sys.executable, "-m", "updater.cli", "server", "run", str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = int(server.stdout.readline().rsplit(":", 1)[1])
            try:
                arrived = asyncio.run(
                    rollout(
                        port, folder / "ca.pem", server.pid, token, artifact,
                        count=options.devices, connections=options.connections,
                    )
                )  # fmt: skip
            finally:
                server.terminate()
                server.wait(timeout=60)
    return 0 if arrived else 1


if __name__ == "__main__":
    raise SystemExit(main())
