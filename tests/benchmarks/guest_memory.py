"""Peak resident memory of `updater install` on the emulated device. Prints MiB.

    pytest -s tests/benchmarks/guest_memory.py --lg-env rigs/qemu-arm64.yaml

The kernel's VmHWM of the installing process, over TLS, zstd-compressed, signed; the goal is at
most 34 MiB, which is what mender-client 3.4 showed.
"""

from framework.scenario.device import Device, Update

PROGRAM = (
    "import sys; from updater.cli import main; code = main(['install', sys.argv[1]]); "
    "print([line.split() for line in open('/proc/self/status') if line.startswith('VmHWM')], code)"
)


def test_the_peak_memory_of_an_install(device: Device, update: Update) -> None:
    """Install once and print what the kernel says."""
    result = device.strategy.run(f'python3 -c "{PROGRAM}" {update.url}', 300.0)
    peak = next(line for line in result.lines if "VmHWM" in line)
    print(f"\npeak resident memory of an install: {int(peak.split(chr(39))[3]) / 1024:.1f} MiB")
    assert peak.endswith(" 0"), result.text
