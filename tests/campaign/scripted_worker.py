"""A worker that speaks as the real one does, and whose outcomes stand in a script.

The script is a JSON file: by the composition's index, what its runs come to in turn (the last for
ever): a verdict, `die`, or `unusable`. Which run it is, is counted in the folder beside it, so that
it holds over all processes. What is done is written to `done`, one line a run.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path


def main(script: Path) -> None:
    plan = json.loads(script.read_text())
    for line in sys.stdin:
        job = json.loads(line)
        index = re.search(r"/(\d+)\.", job["title"])[1]
        counter = script.with_name(f"count-{index}")
        turn = int(counter.read_text()) if counter.exists() else 0
        counter.write_text(str(turn + 1))
        outcomes = plan.get(index, plan["else"])
        outcome = outcomes[min(turn, len(outcomes) - 1)]
        tell({"say": f"run {index}"})
        if outcome == "die":
            os._exit(3)
        if outcome == "unusable":
            tell({"unusable": "the rig burnt down"})
            continue
        if outcome.startswith("slow "):
            time.sleep(float(outcome.split()[1]))
            outcome = "PASS"
        with script.with_name("done").open("a") as done:
            done.write(f"{index} {job['rig']} {os.getpid()}\n")
        fault = (job["composition"]["faults"] or [{"fault": "nothing"}])[0]["fault"]
        violated = [int(n) for n in re.findall(r"\d", outcome)]
        tell(
            {
                "done": {
                    "verdict": outcome,
                    "violated": violated,
                    "evidence": f"because of {index}" if violated else "",
                    "strikes": [{"state": "Download", "fault": fault, "trigger": "state"}],
                    "unfired": [],
                    "steps": [],
                    "symptoms": {"runs": "v1"},
                    "seconds": 10.0,
                    "boots": 2,
                    "boots_s": 4.0,
                    "work_s": 5.0,
                    "bundle": "",
                }
            }
        )


def tell(message: object) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
