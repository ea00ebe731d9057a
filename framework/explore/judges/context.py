"""What every judge knows of a recording besides the crash state: images, promises, layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

from framework.disk import DiskError, JournalReader, Repair
from framework.explore.describe import layout_from_values
from framework.explore.layout import Layout
from framework.explore.timeline import Timeline, read_timeline
from framework.explore.views import Kinds
from framework.verdict import ImageFacts


class ContextError(DiskError):
    """A recording lacks what a judge needs; the message says what."""


@frozen
class Context:
    """What is known of a recording.

    Attributes:
        journal: everything that happened.
        layout: what a boot depends on.
        timeline: what had been promised by when.
        images: the images that may be in a slot, by artifact name.
        initial: the artifact that was committed when the recording began.
        slots: the slots' regions, by slot name (`a`, `b`).
        repair: how the device mends its data partition before it mounts it; None: not at all.
        views: how files of the data partition look to who reads them (`framework.explore.views`).
    """

    journal: JournalReader
    layout: Layout
    timeline: Timeline
    images: Mapping[str, ImageFacts]
    initial: str
    slots: Mapping[str, str]
    repair: Repair | None = None
    views: Kinds = field(factory=dict)

    @classmethod
    def of(cls, journal: JournalReader, facts: Mapping[str, Any]) -> Context:
        """From a recording's journal and facts.

        Raises ContextError, or LayoutMistakeError, if the facts are malformed.
        """
        try:
            return cls(
                journal=journal,
                layout=layout_from_values(facts["layout"]),
                timeline=read_timeline(journal.marks),
                images={name: ImageFacts(**image) for name, image in facts["images"].items()},
                initial=str(facts["initial"]),
                slots={str(slot): str(region) for slot, region in facts["slots"].items()},
                repair=_repair(facts.get("data_repair")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ContextError(f"the recording's facts are malformed: {error!r}") from error


def _repair(values: Mapping[str, Any] | None) -> Repair | None:
    if values is None:
        return None
    return Repair(int(values["block"]), tuple(int(backup) for backup in values["backups"]))
