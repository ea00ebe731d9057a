"""Cut the power at every event of an update and judge what the device makes of it.

Used by the tests directly, and run as a program under a planted bug: then it must report a
violation (`python updater_judge.py DIRECTORY [PLANT]`, exit 1 and the invariant's number).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from pathlib import Path

from updater_world import CACHE_MODELS, PowerCutError, World, world_artifact

from updater.device.errors import UpdaterError

MAX_BOOTS = 6


class ViolationError(AssertionError):
    """A numbered invariant of the design does not hold."""

    def __init__(self, invariant: int, text: str) -> None:
        super().__init__(f"invariant {invariant}: {text}")


def operate(world: World, verb: str, *arguments: str) -> tuple[bool, str]:
    """Run one operation; return whether a reboot is asked for, and the console's text."""
    client = world.client()
    console = io.StringIO()
    with contextlib.redirect_stderr(console):
        try:
            getattr(client, verb)(*arguments)
        except UpdaterError as error:
            console.write(f"updater: error: {error}\n")
        except PowerCutError:
            console.write("(power lost)\n")
    return client.reboot_needed, console.getvalue()


def settle(world: World, second_cut: int = 0) -> str:
    """Boot until nothing is in progress; `second_cut` strikes in the first boot's resume."""
    said = ""
    for boot in range(MAX_BOOTS):
        world.restart()
        world.running_image()
        if boot == 0:
            world.power.cut_at = world.power.events + second_cut if second_cut else 0
        reboot, text = operate(world, "resume")
        said += text
        if world.power.off or reboot:
            continue
        if world.store.update() is None:
            return said
        if "error" not in text:
            raise ViolationError(8, f"resume neither ends nor goes on: {text!r}")
    raise ViolationError(8, f"not settled after {MAX_BOOTS} boots: {said!r}")


def judge(world: World, said: str) -> None:
    """Check the settled device against the invariants."""
    image = world.running_image()
    values = world.environment.values
    slot = "a" if values["mender_boot_part"] == "2" else "b"
    if slot != world.running or values["upgrade_available"] != "0":
        raise ViolationError(1, f"slot {world.running} runs, the environment says {values}")
    committed = "committed v2" in said
    if image == "v2" and not world.healthy:
        raise ViolationError(4, "an unhealthy system was kept")
    if committed and not world.healthy:
        raise ViolationError(4, "an unhealthy system was committed")
    if committed and image != "v2":
        raise ViolationError(3, "a committed system was lost")
    outcome = world.store.last_outcome()
    if outcome is not None and (outcome.result == "committed") != (image == "v2"):
        raise ViolationError(7, f"{image} runs, but the record says {outcome}")
    if outcome is not None and image == "v1" and not outcome.cause:
        raise ViolationError(7, "a failure without a cause")


def converge(world: World) -> None:
    """After all that, the same update must simply work (invariant 6)."""
    if world.running_image() == "v2" or not world.healthy:
        return
    _, text = operate(world, "install", "v2.mender")
    text += settle(world)
    if world.running_image() != "v2" or "committed v2" not in text:
        raise ViolationError(6, f"the next try fails: {text!r}")


def run_once(world: World, cut_at: int, second_cut: int = 0) -> bool:
    """One update with one or two cuts; False when `cut_at` was never reached."""
    world.power.cut_at = cut_at
    _, said = operate(world, "install", "v2.mender")
    reached = world.power.off
    said += settle(world, second_cut)
    judge(world, said)
    world.restart()
    judge(world, said)
    converge(world)
    return reached


def cut_everywhere(directory: Path, artifact: Path, *, healthy: bool) -> int:
    """Cut in every event of install, under every cache model; return how many there are."""
    for cut_at in range(1, 200):
        reached = False
        for number, model in enumerate(CACHE_MODELS * 2):
            world = World(directory / f"{cut_at}-{number}", artifact, cut_at * 31 + number, model)
            world.healthy = healthy
            reached = run_once(world, cut_at) or reached
        if not reached:
            return cut_at - 1
    raise AssertionError("an install has no end")


def flip_a_bit(directory: Path, artifact: Path) -> None:
    """A drive that stores one bit wrongly: the image must never be started."""
    world = World(directory / "flip", artifact)
    world.disks["b"].flips.add(1_234_567)
    run_once(world, 0)


def main(arguments: list[str]) -> int:
    """Judge the client, with the named bug planted; print the first violation."""
    directory = Path(arguments[0])
    if len(arguments) > 1:
        importlib.import_module(f"images.planted.{arguments[1]}")
    artifact = world_artifact(directory)
    try:
        flip_a_bit(directory / "f", artifact)
        for healthy in (True, False):
            cut_everywhere(directory / f"h{healthy:d}", artifact, healthy=healthy)
    except AssertionError as violation:
        sys.stdout.write(f"{violation}\n")
        return 1
    sys.stdout.write("no violation\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
