"""What every run stands on, whoever does it: a pristine device that is up, and faults on it.

The pytest fixtures are thin layers over these two, and a campaign uses them without pytest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from framework.network import FaultProxy, ProxyEvent
from framework.scenario.arming import Faults
from framework.scenario.bench import Bench
from framework.scenario.device import Device, Update
from framework.targets.errors import InfrastructureError


@contextlib.contextmanager
def staged_device(
    bench: Bench,
    proxy: FaultProxy,
    base: str,
    *,
    say: Callable[[str], None] = lambda text: None,
    step: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    managed: bool = False,
    prepare: Callable[[Device], object] = lambda device: None,
) -> Iterator[Device]:
    """A device with a pristine disk whose slot a holds `base`, started and ready; off afterwards.

    `prepare` gets it while it is still off.

    Raises:
        InfrastructureError: the pristine device did not become ready.
    """
    device = bench.device(base, say=say, step=step, managed=managed)

    def heard(event: ProxyEvent) -> None:
        device.used_network = True
        device.note("network", event.text)

    proxy.on_event = heard
    prepare(device)
    with contextlib.closing(device):
        device.look("at the beginning")
        boot = device.boot()
        if not boot.ready:
            raise InfrastructureError(
                "the pristine device did not become ready", evidence=boot.evidence
            )
        yield device


@contextlib.contextmanager
def staged_faults(  # noqa: PLR0917 - the fields of `Faults`
    device: Device,
    update: Update,
    proxy: FaultProxy,
    seed: int,
    features: frozenset[str],
    rig: str,
) -> Iterator[Faults]:
    """The vocabulary of faults on a device; all gone afterwards."""
    faults = Faults(device, update, proxy, seed, features, rig)
    device.before_retry = faults.clear
    try:
        yield faults
    finally:
        faults.clear()
