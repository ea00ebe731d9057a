"""What an Allure report needs besides results: environment, categories, the last one's history.

allure-pytest writes the results. Names and forms of these files: Allure's documentation, "How it
works": Environment, Defect categories, History, and executor.json. A history that can't be read is
left out: a report without a trend is better than none.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

HISTORY_FILES: Final = (
    "history.json",
    "history-trend.json",
    "duration-trend.json",
    "retry-trend.json",
    "categories-trend.json",
)
CATEGORIES: Final = (
    {
        "name": "Product: an invariant broke",
        "matchedStatuses": ["failed"],
        "messageRegex": r"(?s).*VIOLATION\(.*",
    },
    {
        "name": "Product: bricked",
        "matchedStatuses": ["failed"],
        "messageRegex": r"(?s).*BRICKED.*",
    },
    {
        "name": "Product: not as expected",
        "matchedStatuses": ["failed"],
        "messageRegex": r"(?s)^(?!.*(VIOLATION\(|BRICKED)).*",
    },
    {
        "name": "Infrastructure: the rig was lost",
        "matchedStatuses": ["broken"],
        "messageRegex": r"(?s).*InfrastructureError.*",
    },
    {
        "name": "Scenario: proves nothing",
        "matchedStatuses": ["broken"],
        "messageRegex": r"(?s)^(?!.*InfrastructureError).*",
    },
)
"""What a failure is, by Allure's status and the message: every one is in exactly one of them."""


def leave_context(
    directory: Path, environment: Mapping[str, str], history: Path | None = None
) -> None:
    """Write environment, categories and executor into a folder of Allure results.

    `history` is the folder of that name of the last report; nothing is done without results.
    """
    if not directory.is_dir():
        return
    lines = "".join(f"{name}={_property(value)}\n" for name, value in environment.items())
    (directory / "environment.properties").write_text(lines, encoding="utf-8")
    (directory / "categories.json").write_text(json.dumps(CATEGORIES, indent=1), encoding="utf-8")
    name = environment.get("rig", "")
    executor: dict[str, object] = {"name": "brownout", "type": "brownout", "buildName": name}
    if history is not None:
        order = _copy_history(history, directory / "history") + 1
        executor |= {"buildOrder": order, "buildName": f"{name} #{order}"}
    (directory / "executor.json").write_text(json.dumps(executor, indent=1), encoding="utf-8")


def _property(value: str) -> str:
    """A value in a properties file: a backslash begins an escape, a line end ends the value."""
    return value.replace("\\", "\\\\").replace("\n", " ")


def _copy_history(source: Path, target: Path) -> int:
    """Take the last report's history over; the number of its last build."""
    target.mkdir(exist_ok=True)
    last = 0
    for name in HISTORY_FILES:
        found = _readable(source / name)
        if found is None:
            continue
        shutil.copyfile(source / name, target / name)
        if name == "history-trend.json" and isinstance(found, list):
            orders = [each.get("buildOrder", 0) for each in found if isinstance(each, dict)]
            last = max((order for order in orders if isinstance(order, int)), default=0)
    return last


def _readable(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
