"""labgrid's places, through labgrid's own client: reserve, lock, free, and mark as sick.

A board that failed its check carries the tag `health=quarantine` and the reason as its place's
comment, so that every user of the coordinator sees it; a reservation that asks for `health=ok`
passes it by. It is released by a check that passes, or by a person (`brownout rig release`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from attrs import field, frozen

from framework.targets.errors import InfrastructureError, RigError

__all__ = ["HEALTHY", "QUARANTINED", "Place", "Places", "parse_places"]

HEALTHY, QUARANTINED = "ok", "quarantine"
_PATIENCE_S = 60.0
_TOKEN = re.compile(r"^export LG_TOKEN=(\S+)", re.MULTILINE)


@frozen
class Place:
    """A place: its name, who has it (empty: nobody), its tags and its comment."""

    name: str
    acquired: str = ""
    tags: Mapping[str, str] = field(factory=dict)
    comment: str = ""

    @property
    def quarantined(self) -> bool:
        """Whether a check found it sick."""
        return self.tags.get("health") == QUARANTINED


def parse_places(text: str) -> list[Place]:
    """Read `labgrid-client -v places`: a line a place, indented ones about it."""
    places: list[Place] = []
    facts: dict[str, str] = {}
    name = ""

    def keep() -> None:
        if name:
            tags = dict(
                pair.split("=", 1) for pair in facts.get("tags", "").split(", ") if "=" in pair
            )
            acquired = facts.get("acquired", "")
            owner = "" if acquired in ("", "None", "no") else acquired
            places.append(Place(name, owner, tags, facts.get("comment", "")))

    for line in text.splitlines():
        if match := re.match(r"^Place '([^']+)'", line):
            keep()
            name, facts = match[1], {}
        elif match := re.match(r"^\s+(\w+): (.*)$", line):
            facts.setdefault(match[1], match[2].strip())
    keep()
    return places


@frozen
class Places:
    """A coordinator's places. Every method raises InfrastructureError if it does not answer."""

    coordinator: str = field(factory=lambda: os.environ.get("LG_COORDINATOR", "127.0.0.1:20408"))

    def all(self) -> list[Place]:
        """What there is."""
        return parse_places(self._client("-v", "places"))

    def find(self, name: str) -> Place:
        """One place, by its name, or `+` for the one that LG_TOKEN has reserved."""
        if name == "+":
            found = parse_places(self._client("-p", "+", "show"))
            if found:
                return found[0]
        for place in self.all():
            if place.name == name:
                return place
        raise RigError(f"{self.coordinator} has no place {name!r}")

    def reserve(self, tags: Mapping[str, str], patience_s: float) -> str:
        """Reserve a place with these tags, and wait for it; its token."""
        pairs = [f"{key}={value}" for key, value in tags.items()]
        told = self._client("reserve", "--wait", "--shell", *pairs, patience_s=patience_s)
        match = _TOKEN.search(told)
        if match is None:
            raise InfrastructureError("the coordinator gave no reservation", evidence=told)
        return match[1]

    def cancel(self, token: str) -> None:
        """Give a reservation back."""
        self._client("cancel-reservation", token)

    def lock(self, token: str) -> None:
        """Acquire the place that a token has reserved."""
        self._client("-p", "+", "lock", token=token)

    def free(self, name: str, *, kick: bool = False) -> None:
        """Release a place; with `kick`, whoever has it."""
        self._client("-p", name, "unlock", *(["--kick"] if kick else []))

    def quarantine(self, name: str, reason: str) -> None:
        """Mark a place as sick, for every user of the coordinator."""
        self._client("-p", name, "set-tags", f"health={QUARANTINED}")
        self._client("-p", name, "set-comment", f"quarantine: {' '.join(reason.split())[:200]}")

    def heal(self, name: str) -> None:
        """Mark a place as well."""
        self._client("-p", name, "set-tags", f"health={HEALTHY}")
        self._client("-p", name, "set-comment", "")

    def _client(self, *arguments: str, token: str = "", patience_s: float = _PATIENCE_S) -> str:
        environment = {**os.environ, "LG_COORDINATOR": self.coordinator}
        if token:
            environment["LG_TOKEN"] = token
        environment.pop("LG_PLACE", None)
        try:
            ended = subprocess.run(
                [_program(), *arguments],
                env=environment,
                capture_output=True,
                text=True,
                timeout=patience_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise InfrastructureError(
                f"labgrid-client {arguments[0]} had not ended after {patience_s:g} s"
            ) from error
        if ended.returncode != 0:
            said = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
            last = said[-1] if said else f"exit code {ended.returncode}"
            raise InfrastructureError(f"labgrid-client {' '.join(arguments)}: {last}")
        return ended.stdout


def _program() -> str:
    beside = Path(sys.executable).with_name("labgrid-client")
    found = str(beside) if beside.exists() else shutil.which("labgrid-client")
    if found is None:
        raise RigError("labgrid-client is not installed in this Python's environment")
    return found
