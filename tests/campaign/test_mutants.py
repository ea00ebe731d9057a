"""The mutation score's runner: it kills what is broken, and ends what never ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIENT = "updater.device.client"
STATES = "updater.device.states"
PROGRAM = """
import json, sys
sys.path.insert(0, {root!r})
sys.path.insert(0, {root!r} + "/tests/mutation")
import state_machine as runner
for name in runner.PRELOADED:
    __import__(name)
module, old, new = json.load(sys.stdin)
source = (runner.ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
assert source.count(old) == 1, old
mutant = runner.Mutant(module, "by hand", source.replace(old, new), "", "")
runner.LIFETIME_S = 1.0
surveyed = runner.survey(6)
lines = runner.Statements(module).of(mutant) if old != new else None
trial = runner.try_it(
    mutant,
    [
        (number, surveyed.given[number], surveyed.digests[number])
        for number, reached in enumerate(surveyed.reached)
        if lines is None or reached & lines
    ],
)
print(json.dumps([runner.FATES.get(trial.fate, ""), trial.why, sorted(lines or [])]))
"""


@pytest.mark.parametrize(
    ("module", "old", "new", "fate", "why"),
    [
        (CLIENT, "class NoObserver:\n", "class NoObserver:\n", "survived", ""),
        (CLIENT, "self.ports.health.run()\n        if not", "if not", "killed", "VIOLATION"),
        (
            STATES,
            "{Event.DONE: State.CLEANUP, Event.FAILED: State.ROLLBACK}",
            "{Event.DONE: State.FAILURE, Event.FAILED: State.ROLLBACK}",
            "killed",
            "VIOLATION(7)",
        ),
        (CLIENT, "state = TABLE[state].after[event]", "state = state", "killed", "signal"),
        (
            CLIENT,
            "def proving(self, update: Update) -> None:",
            "def _(self) -> None:",
            "killed",
            "",
        ),
        (CLIENT, '; reboot to start it")\n        if', '; restart")\n        if', "differs", ""),
    ],
)
def test_what_becomes_of_a_mutant(module: str, old: str, new: str, fate: str, why: str) -> None:
    # In a process of its own: the client may not be loaded before the mutant is.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(root=str(ROOT))],
        input=json.dumps([module, old, new]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, told, _ = json.loads(done.stdout.splitlines()[-1])
    assert (found, why in told) == (fate, True), told
