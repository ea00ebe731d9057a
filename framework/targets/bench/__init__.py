"""The virtual bench: what stands on a lab's desk, with emulated boards behind it.

Serial ports that outlive the power of what they are plugged into, power heads that speak their
makers' protocols, and labgrid's own exporter and coordinator in front. Whoever runs tests on it
takes the way that they take to real boards; only the boards are QEMU's, on recorded disks, so that
a power cut is one.
"""

from framework.targets.bench.board import BenchBoard, BenchOptions
from framework.targets.bench.heads import HEADS
from framework.targets.bench.serial_port import Line, VirtualSerialPort
from framework.targets.bench.stack import VirtualBench

__all__ = ["HEADS", "BenchBoard", "BenchOptions", "Line", "VirtualBench", "VirtualSerialPort"]
