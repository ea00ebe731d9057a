"""What a run leaves for people: result files, the timeline picture, the offline HTML report."""

from framework.report.boards import BoardStatistics
from framework.report.exploration import ExplorationSection, write_exploration_report
from framework.report.html import write_report
from framework.report.picture import CutPoint
from framework.report.results import (
    ConsoleLine,
    FindingRecord,
    Moment,
    OperationRecord,
    RegionRecord,
    ResultError,
    ResultStore,
    ScenarioResult,
    Strike,
    Traffic,
)
from framework.report.story import Span, cause_of, spans_of, state_at

__all__ = [
    "BoardStatistics",
    "ConsoleLine",
    "CutPoint",
    "ExplorationSection",
    "FindingRecord",
    "Moment",
    "OperationRecord",
    "RegionRecord",
    "ResultError",
    "ResultStore",
    "ScenarioResult",
    "Span",
    "Strike",
    "Traffic",
    "cause_of",
    "spans_of",
    "state_at",
    "write_exploration_report",
    "write_report",
]
