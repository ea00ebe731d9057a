"""Recorded disks: the block recorder and its journal, cache models, and readers of disk layouts.

Start with `Recorder`; read back with `JournalReader`. FORMAT.md beside this file specifies the
journal. Nothing else of this project is imported here.
"""

from framework.disk.errors import (
    BaseImageError,
    DiskError,
    JournalError,
    LayoutError,
    RecorderError,
    UnreadableSectorError,
)
from framework.disk.journal import SECTOR, Flag, Kind
from framework.disk.lazy import LazyDisk
from framework.disk.models import (
    MODELS,
    CacheModel,
    LyingFlush,
    PrefixCache,
    TornSector,
    VolatileCache,
    WriteThrough,
    model_from,
)
from framework.disk.reader import Frozen, JournalReader, Mark
from framework.disk.recorder import DeviceSpec, NbdEndpoint, Recorder
from framework.disk.state import CutRecord, Decision, Operations, PowerCycle
from framework.disk.triggers import Armed, Arriving, Fault, Freeze, Inject, Trigger

__all__ = [
    "MODELS",
    "SECTOR",
    "Armed",
    "Arriving",
    "BaseImageError",
    "CacheModel",
    "CutRecord",
    "Decision",
    "DeviceSpec",
    "DiskError",
    "Fault",
    "Flag",
    "Freeze",
    "Frozen",
    "Inject",
    "JournalError",
    "JournalReader",
    "Kind",
    "LayoutError",
    "LazyDisk",
    "LyingFlush",
    "Mark",
    "NbdEndpoint",
    "Operations",
    "PowerCycle",
    "PrefixCache",
    "Recorder",
    "RecorderError",
    "TornSector",
    "Trigger",
    "UnreadableSectorError",
    "VolatileCache",
    "WriteThrough",
    "model_from",
]
