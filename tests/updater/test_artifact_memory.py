"""Reading an artifact takes the same memory whatever its size, measured in fresh processes.

The measure is VmHWM of /proc/self/status: `ru_maxrss` would begin with what the parent, pytest,
had when it forked.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from updater.artifact import write_artifact, write_module_artifact

PROGRAM = """\
import sys
from updater.artifact import ArtifactReader
with open(sys.argv[1], "rb", buffering=0) as stream:
    reader = ArtifactReader(stream)
    for file in reader.files():
        for piece in file:
            pass
assert reader.complete
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""
ALLOWED_GROWTH_MIB = 3.0


def peak_mib(path: Path, program: str = PROGRAM) -> float:
    """Peak resident memory of a process that reads the whole artifact."""
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], check=True, capture_output=True, text=True
    )
    return int(done.stdout) / 1024


def sparse(path: Path, mebibytes: int) -> Path:
    with path.open("wb") as file:
        file.truncate(mebibytes << 20)
    return path


@pytest.mark.parametrize(
    ("compression", "sizes_mib"),
    [("zstd", (64, 1024)), ("gzip", (8, 128)), ("xz", (8, 64)), ("none", (8, 64))],
)
def test_memory_does_not_grow_with_the_artifact(
    tmp_path: Path, compression: str, sizes_mib: tuple[int, int]
) -> None:
    peaks = []
    for mebibytes in sizes_mib:
        image = sparse(tmp_path / "rootfs.img", mebibytes)
        artifact = tmp_path / "artifact.mender"
        level = None if compression == "none" else 1
        write_artifact(
            artifact, image, name="v", device_types=["b"], compression=compression, level=level
        )
        peaks.append(peak_mib(artifact))
    assert peaks[1] - peaks[0] < ALLOWED_GROWTH_MIB, f"peak RSS in MiB: {peaks}"
    print(f"{compression}: peak RSS in MiB for {sizes_mib} MiB: {peaks}")


def test_a_thousand_payload_files_take_no_more_memory_than_one(tmp_path: Path) -> None:
    peaks = []
    for count in (1, 1000):
        folder = tmp_path / str(count)
        folder.mkdir()
        files = [sparse(folder / f"file-{number}", 0) for number in range(count)]
        files[0].write_bytes(bytes(5 << 20))
        artifact = tmp_path / "artifact.mender"
        write_module_artifact(
            artifact, files, payload_type="directory", name="v", device_types=["b"], level=1
        )
        peaks.append(peak_mib(artifact))
    assert peaks[1] - peaks[0] < ALLOWED_GROWTH_MIB, f"peak RSS in MiB: {peaks}"


def test_the_measurement_sees_a_reader_that_keeps_what_it_reads(tmp_path: Path) -> None:
    """The planted bug: a consumer that collects the pieces."""
    image = sparse(tmp_path / "rootfs.img", 32)
    artifact = tmp_path / "artifact.mender"
    write_artifact(artifact, image, name="v", device_types=["b"], level=1)
    honest = peak_mib(artifact)
    hoarder = PROGRAM.replace("            pass", "            kept.append(bytes(piece))")
    hoarder = hoarder.replace("import sys", "import sys; kept = []")
    assert peak_mib(artifact, hoarder) - honest > 30 > ALLOWED_GROWTH_MIB
