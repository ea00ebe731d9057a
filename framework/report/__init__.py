"""What a run leaves for people: result files, the timeline picture, the offline HTML report."""

from framework.report.exploration import ExplorationSection, write_exploration_report
from framework.report.html import write_report
from framework.report.picture import CutPoint
from framework.report.results import (
    FindingRecord,
    Moment,
    OperationRecord,
    RegionRecord,
    ResultError,
    ResultStore,
    ScenarioResult,
)

__all__ = [
    "CutPoint",
    "ExplorationSection",
    "FindingRecord",
    "Moment",
    "OperationRecord",
    "RegionRecord",
    "ResultError",
    "ResultStore",
    "ScenarioResult",
    "write_exploration_report",
    "write_report",
]
