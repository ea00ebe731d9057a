"""Recorded disks: the block recorder and its journal, cache models, and readers of disk layouts.

Start with `Recorder`; read back with `JournalReader`. FORMAT.md beside this file specifies the
journal. Nothing else of this project is imported here.
"""

from framework.disk.digest import Comparison, compare_with_image, region_sha256
from framework.disk.errors import (
    BaseImageError,
    DiskError,
    JournalError,
    LayoutError,
    RecorderError,
    UnreadableSectorError,
)
from framework.disk.ext4check import Ext4Check, Ext4Image, check_ext4
from framework.disk.files import FileSystem, open_file_system
from framework.disk.gpt import Partition, PartitionTable, read_gpt
from framework.disk.grubenv import (
    GrubEnvironment,
    GrubEnvironments,
    parse_grub_environment,
    parse_grub_environments,
    read_grub_environments,
)
from framework.disk.journal import SECTOR, Flag, Kind
from framework.disk.lazy import LazyDisk, StartState
from framework.disk.models import (
    MODELS,
    CacheModel,
    Emmc,
    LooseDiscard,
    LyingFlush,
    PrefixCache,
    ReorderedCache,
    SdCard,
    TornPage,
    TornSector,
    VolatileCache,
    WriteThrough,
    model_from,
)
from framework.disk.reader import Frozen, JournalReader, Mark
from framework.disk.recorder import DeviceSpec, NbdEndpoint, Recorder
from framework.disk.state import CutRecord, Decision, Operations, PowerCycle
from framework.disk.triggers import Armed, Arriving, Fault, Freeze, Inject, Notify, Trigger
from framework.disk.ubootenv import (
    EnvironmentCopy,
    UbootEnvironment,
    build_copy,
    parse_copy,
    parse_environment,
    read_environment,
)

__all__ = [
    "MODELS",
    "SECTOR",
    "Armed",
    "Arriving",
    "BaseImageError",
    "CacheModel",
    "Comparison",
    "CutRecord",
    "Decision",
    "DeviceSpec",
    "DiskError",
    "Emmc",
    "EnvironmentCopy",
    "Ext4Check",
    "Ext4Image",
    "Fault",
    "FileSystem",
    "Flag",
    "Freeze",
    "Frozen",
    "GrubEnvironment",
    "GrubEnvironments",
    "Inject",
    "JournalError",
    "JournalReader",
    "Kind",
    "LayoutError",
    "LazyDisk",
    "LooseDiscard",
    "LyingFlush",
    "Mark",
    "NbdEndpoint",
    "Notify",
    "Operations",
    "Partition",
    "PartitionTable",
    "PowerCycle",
    "PrefixCache",
    "Recorder",
    "RecorderError",
    "ReorderedCache",
    "SdCard",
    "StartState",
    "TornPage",
    "TornSector",
    "Trigger",
    "UbootEnvironment",
    "UnreadableSectorError",
    "VolatileCache",
    "WriteThrough",
    "build_copy",
    "check_ext4",
    "compare_with_image",
    "model_from",
    "open_file_system",
    "parse_copy",
    "parse_environment",
    "parse_grub_environment",
    "parse_grub_environments",
    "read_environment",
    "read_gpt",
    "read_grub_environments",
    "region_sha256",
]
