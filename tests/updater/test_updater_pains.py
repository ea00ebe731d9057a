"""The table of complaints names tests that exist, and leaves none of the fifteen out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ROW = re.compile(r"^\| (\d+) \| .* \| .* \| (.*) \|$", re.MULTILINE)
NAME = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_complaint_is_answered_by_tests_that_exist() -> None:
    text = (REPOSITORY / "updater" / "PAINS.md").read_text(encoding="utf-8")
    rows = ROW.findall(text)
    assert [int(number) for number, _ in rows] == list(range(1, 16))
    for number, tests in rows:
        named = NAME.findall(tests)
        assert named, f"complaint {number} names no test"
        assert tests.count("`") == 2 * len(named), f"complaint {number}: an unreadable name"
        for file, name in named:
            places = [REPOSITORY / "tests" / "updater" / file, REPOSITORY / "scenarios" / file]
            found = [place for place in places if place.is_file()]
            assert found, f"complaint {number}: there is no {file}"
            assert name in functions(found[0]), f"complaint {number}: {file} has no {name}"
