"""Record once, cut everywhere: crash states of a recording, enumerated and classed.

`explore` finds them, `Layout` says what a boot can depend on, `states` holds what is found.
Imports `framework.disk` and `framework.verdict` only; no updater is known here.
"""

from framework.explore.confirm import DisagreementError, confirm
from framework.explore.engine import Progress, explore
from framework.explore.layout import (
    EnvironmentReading,
    GrubStore,
    KnownImage,
    Layout,
    LayoutMistakeError,
    MenderVariables,
    Range,
    RaucGrubVariables,
    RaucUbootVariables,
    Region,
    Role,
    Store,
    UbootStore,
    Vocabulary,
    gpt_region,
)
from framework.explore.states import (
    Counts,
    Coverage,
    CrashClass,
    CrashState,
    Disks,
    Exploration,
    Outside,
    RegionFact,
    Span,
)

__all__ = [
    "Counts",
    "Coverage",
    "CrashClass",
    "CrashState",
    "DisagreementError",
    "Disks",
    "EnvironmentReading",
    "Exploration",
    "GrubStore",
    "KnownImage",
    "Layout",
    "LayoutMistakeError",
    "MenderVariables",
    "Outside",
    "Progress",
    "Range",
    "RaucGrubVariables",
    "RaucUbootVariables",
    "Region",
    "RegionFact",
    "Role",
    "Span",
    "Store",
    "UbootStore",
    "Vocabulary",
    "confirm",
    "explore",
    "gpt_region",
]
