"""Write the corpus' seeds: one small valid artifact of every kind; the same bytes every time.

.venv/bin/python tests/fuzz/make_corpus.py tests/fuzz/corpus
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import structured

from updater.artifact import (
    write_artifact,
    write_bootstrap_artifact,
    write_module_artifact,
)
from updater.artifact.compression import SUFFIXES


def main(folder: Path) -> None:
    """Write the seeds into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        image, one, two = scratch / "rootfs.img", scratch / "one.bin", scratch / "two"
        image.write_bytes(bytes(range(256)) * 3)
        one.write_bytes(b"one" * 100)
        two.write_bytes(b"")
        scripts = [scratch / "ArtifactInstall_Enter_10_stop", scratch / "ArtifactCommit_Leave_05"]
        for script in scripts:
            script.write_bytes(b"#!/bin/sh\nexit 0\n")
        for compression in SUFFIXES:
            key = structured.KEY if compression != "none" else None
            common = {"name": "v2", "device_types": ["board", "other"], "key": key}
            write_artifact(
                folder / f"rootfs-{compression}.mender",
                image,
                **common,
                compression=compression,
                group="beta",
                depends={"rootfs-image.version": ["v1", "v0"], "artifact_name": ["v1"]},
            )
            write_module_artifact(
                folder / f"module-{compression}.mender",
                [one, two],
                payload_type="single-file",
                meta_data={"mode": 420, "to": ["/etc", None]},
                scripts=scripts,
                **common,
                compression=compression,
            )
        write_bootstrap_artifact(
            folder / "bootstrap.mender", name="v1", device_types=["board"], key=structured.KEY
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
