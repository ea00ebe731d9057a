"""A simulated fleet: many devices in one process, the real device API over TLS, for load and demos.

Each device has a key of its own, authenticates, sends an inventory, polls, downloads what it is
offered (checking the length), reports its way through the update and polls again. Nothing is
short-cut: every request is HTTP over TLS as a device's is. aiohttp is the client, because one
process must drive thousands of connections; latencies are measured around each request.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import ssl
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from updater.server.errors import ServerError

_TIMEOUT_S = 60.0
_API = "/api/devices"


@dataclass
class Figures:
    """What a run measured: seconds of each kind of request, and errors by kind."""

    seconds: dict[str, array[float]] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    elapsed_s: float = 0.0

    def note(self, kind: str, seconds: float) -> None:
        """Add one request."""
        self.seconds.setdefault(kind, array("d")).append(seconds)

    def percentile(self, kind: str, percent: float) -> float:
        """Return a percentile in seconds; 0 when there was no such request."""
        values = sorted(self.seconds.get(kind, ()))
        return values[min(int(len(values) * percent / 100), len(values) - 1)] if values else 0.0

    def count(self, kind: str) -> int:
        """Return how many requests of this kind were answered."""
        return len(self.seconds.get(kind, ()))

    def lines(self) -> list[str]:
        """Return a table for people."""
        rows = [f"{'request':12} {'count':>8} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8}"]
        for kind in self.seconds:
            p50, p99, top = (1000 * self.percentile(kind, p) for p in (50, 99, 100))
            rows.append(f"{kind:12} {self.count(kind):8} {p50:8.1f} {p99:8.1f} {top:8.1f}")
        rows.append(f"errors: {sum(self.errors.values())} {dict(self.errors) or ''}".rstrip())
        return rows


class SimulatedDevice:
    """One device of the fleet."""

    def __init__(self, number: int, device_type: str, artifact_name: str, seed: int = 0) -> None:
        self.number = number
        self.name = f"simulated-{seed}-{number}"
        raw = random.Random(f"{seed}/{number}").randbytes(32)  # noqa: S311
        self._key = ed25519.Ed25519PrivateKey.from_private_bytes(raw)
        self.device_type = device_type
        self.artifact_name = artifact_name
        self.token = ""

    @property
    def public_pem(self) -> str:
        """The device's public key."""
        return (
            self._key.public_key()
            .public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
            .decode()
        )

    def auth_request(self) -> tuple[bytes, dict[str, str]]:
        """Return the body and headers of an auth request."""
        body = json.dumps(
            {"id_data": json.dumps({"name": self.name}), "pubkey": self.public_pem}
        ).encode()
        body += b"\n"
        signature = base64.b64encode(self._key.sign(body)).decode()
        return body, {"X-MEN-Signature": signature, "Content-Type": "application/json"}

    def inventory(self) -> list[dict[str, str]]:
        """Return the inventory's attributes."""
        values = {
            "device_type": self.device_type,
            "artifact_name": self.artifact_name,
            "kernel": f"6.1.{self.number % 7}",
            "site": f"site-{self.number % 100}",
        }
        return [{"name": name, "value": value} for name, value in values.items()]

    def provides(self) -> dict[str, Any]:
        """Return the body of a poll."""
        return {
            "device_provides": {
                "artifact_name": self.artifact_name,
                "device_type": self.device_type,
            },
            "update_control_map": False,
        }


class Fleet:
    """Devices that share one client session; `figures` collects what they meet."""

    def __init__(
        self, session: aiohttp.ClientSession, devices: Sequence[SimulatedDevice], figures: Figures
    ) -> None:
        self._session = session
        self.devices = devices
        self.figures = figures

    async def authenticate(self, device: SimulatedDevice) -> bool:
        """Ask for a token; False while the device is not accepted."""
        body, headers = device.auth_request()
        status, text = await self._call(
            "auth", "POST", "/v1/authentication/auth_requests", data=body, headers=headers
        )
        if status == 200:
            device.token = text.decode()
        return status == 200

    async def send_inventory(self, device: SimulatedDevice) -> bool:
        """Send the inventory."""
        status, _ = await self._call(
            "inventory",
            "PUT",
            "/v1/inventory/device/attributes",
            json=device.inventory(),
            headers=_bearer(device),
        )
        return status == 200

    async def poll(self, device: SimulatedDevice) -> dict[str, Any] | None:
        """Ask for an update."""
        status, text = await self._call(
            "poll",
            "POST",
            "/v2/deployments/device/deployments/next",
            json=device.provides(),
            headers=_bearer(device),
        )
        return json.loads(text) if status == 200 else None

    async def update(self, device: SimulatedDevice, offer: dict[str, Any], fails: bool) -> None:
        """Go through an update to its end."""
        path = f"/v1/deployments/device/deployments/{offer['id']}"

        async def report(status: str, substate: str = "") -> int:
            body = {"status": status, **({"substate": substate} if substate else {})}
            code, _ = await self._call(
                "report", "PUT", f"{path}/status", json=body, headers=_bearer(device)
            )
            return code

        if await report("downloading") == 409:
            return
        await self._call("download", "GET", offer["artifact"]["source"]["uri"], absolute=True)
        for status in ("installing", "rebooting"):
            if await report(status) == 409:
                return
        if fails:
            message = {"timestamp": "2026-01-01T00:00:00Z", "level": "error", "message": "planned"}
            await self._call(
                "log", "PUT", f"{path}/log", json={"messages": [message]}, headers=_bearer(device)
            )
            await report("failure", "simulated failure")
        elif await report("success") == 204:
            device.artifact_name = offer["artifact"]["artifact_name"]

    async def _call(
        self, kind: str, method: str, path: str, *, absolute: bool = False, **options: Any
    ) -> tuple[int, bytes]:
        started = time.perf_counter()
        url = path if absolute else _API + path
        try:
            async with self._session.request(method, url, **options) as response:
                size = 0
                text = b""
                async for piece in response.content.iter_any():
                    size += len(piece)
                    if kind != "download":
                        text += piece
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.figures.errors[f"{kind}: {type(error).__name__}"] += 1
            return 0, b""
        self.figures.note(kind, time.perf_counter() - started)
        self.figures.statuses[f"{kind} {status}"] += 1
        if status >= 500 or (status >= 400 and status not in (401, 409)):
            self.figures.errors[f"{kind}: HTTP {status}"] += 1
        return status, text


def _bearer(device: SimulatedDevice) -> dict[str, str]:
    return {"Authorization": f"Bearer {device.token}"}


@asynccontextmanager
async def open_fleet(
    url: str, ca: Path, devices: Sequence[SimulatedDevice], connections: int
) -> AsyncIterator[Fleet]:
    """Open a session of at most `connections` TLS connections for `devices`."""
    try:
        context = ssl.create_default_context(cafile=str(ca))
    except OSError as error:
        raise ServerError(f"{ca}: not a usable authority: {error}") from error
    connector = aiohttp.TCPConnector(limit=connections, ssl=context, keepalive_timeout=60)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        yield Fleet(session, devices, Figures())


async def each(fleet: Fleet, action: Any, concurrency: int) -> list[Any]:
    """Run `action(device)` for every device, so many at a time; return the results in order."""
    results: list[Any] = [None] * len(fleet.devices)
    waiting = iter(enumerate(fleet.devices))

    async def worker() -> None:
        for index, device in waiting:
            results[index] = await action(device)

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    fleet.figures.elapsed_s += time.perf_counter() - started
    return results


async def run(
    url: str,
    ca: Path,
    *,
    devices: int,
    device_type: str,
    artifact_name: str,
    rounds: int,
    pause_s: float,
    connections: int,
    fail_percent: float,
    seed: int,
    say: Any,
) -> Figures:
    """Bring a fleet up and let it poll for `rounds`; return the figures."""
    fleet_devices = [
        SimulatedDevice(number, device_type, artifact_name, seed) for number in range(devices)
    ]
    chance = random.Random(seed)  # noqa: S311
    doomed = {d.number for d in fleet_devices if chance.random() * 100 < fail_percent}
    async with open_fleet(url, ca, fleet_devices, connections) as fleet:

        async def arrive(device: SimulatedDevice) -> bool:
            return await fleet.authenticate(device) and await fleet.send_inventory(device)

        here = await each(fleet, arrive, connections)
        say(f"{sum(here)} of {devices} devices are accepted")
        if not any(here):
            say("accept them on the web page or by `updater server fleet accept`, then run again")
            return fleet.figures
        fleet.devices = [d for d, accepted in zip(fleet_devices, here, strict=True) if accepted]

        async def turn(device: SimulatedDevice) -> None:
            if offer := await fleet.poll(device):
                await fleet.update(device, offer, device.number in doomed)

        for number in range(rounds):
            await each(fleet, turn, connections)
            updated = sum(d.artifact_name != artifact_name for d in fleet.devices)
            say(f"round {number + 1}: {updated} devices run something newer")
            if number + 1 < rounds:
                await asyncio.sleep(pause_s)
        return fleet.figures
