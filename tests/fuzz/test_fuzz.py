"""The fuzzer runs, gets past the checksums, and finds bugs that are planted for it."""

from __future__ import annotations

import importlib.util
import random
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import structured  # noqa: E402

from updater.artifact import ArtifactError, ArtifactReader, ArtifactSignatureError  # noqa: E402
from updater.artifact.errors import ArtifactIntegrityError  # noqa: E402
from updater.artifact.tar import Memory  # noqa: E402

needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is missing: it has wheels for x86-64 Linux only (pip install atheris)",
)
CORPUS = HERE / "corpus"
REPOSITORY = HERE.parent.parent
SHORT_RUN_S = 5
PLANTED_RUN_S = 60


def fuzz(
    *options: str, package_root: Path = REPOSITORY, folder: Path, seeds: Path = CORPUS
) -> tuple[int, str]:
    """Run the fuzz target on `package_root`'s `updater`; return exit code and what it printed."""
    done = subprocess.run(
        [
            # A shell between: a process counts the peak memory of what it was started from as its
            # own (getrusage(2)), and that of pytest can be above the fuzzer's limit.
            *("sh", "-c", '"$@"; exit $?', "sh"),
            sys.executable,
            "-c",
            RUN,
            str(package_root),
            str(HERE),
            *options,
            str(folder),
            str(CORPUS),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=PLANTED_RUN_S + 60,
    )
    return done.returncode, done.stdout + done.stderr


# The package to fuzz comes first on the path, before the one that is installed.
RUN = """
import sys
package_root, here, *options = sys.argv[1:]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path[:0] = [package_root, here]
sys.argv = ["fuzz_artifact", *options]
import fuzz_artifact
from updater.artifact import reader
assert reader.__file__.startswith(package_root), reader.__file__
fuzz_artifact.main()
"""


@needs_atheris
def test_a_short_run_finds_nothing(tmp_path: Path) -> None:
    code, text = fuzz(f"-max_total_time={SHORT_RUN_S}", folder=tmp_path)
    assert code == 0, text[-3000:]
    assert re.search(r"Done \d{3,} runs", text), text[-1000:]
    assert not list(tmp_path.glob("crash-*"))


# Every one is a check that someone could forget; the fuzzer must notice each.
PLANTED = {
    "a payload's checksum is not compared": (
        "reader.py",
        "self._check(path, checksum)",
        "self._unread.discard(path)",
    ),
    "a traceback instead of a refusal": (
        "metadata.py",
        "    except (ValueError, RecursionError) as error:",
        "    except RecursionError as error:",
    ),
}


@needs_atheris
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(tmp_path: Path, name: str) -> None:
    file, right, wrong = PLANTED[name]
    package = tmp_path / "planted" / "updater"
    shutil.copytree(
        REPOSITORY / "updater", package, ignore=shutil.ignore_patterns("__pycache__", "server")
    )
    source = package / "artifact" / file
    text = source.read_text()
    assert text.count(right) == 1, f"{right!r} is not in {file} once: plant the bug anew"
    source.write_text(text.replace(right, wrong))
    folder, seeds = tmp_path / "found", tmp_path / "seeds"
    folder.mkdir()
    seeds.mkdir()
    shutil.copy(CORPUS / "module-gzip.mender", seeds)
    limit = f"-max_total_time={PLANTED_RUN_S}"
    code, output = fuzz(limit, "-seed=1", package_root=package.parent, folder=folder, seeds=seeds)
    assert code != 0, f"not found within {PLANTED_RUN_S} s: {output[-1000:]}"
    assert "Uncaught Python exception" in output, output[-2000:]


def test_every_kind_of_seed_is_in_the_corpus() -> None:
    kinds = set()
    for path in CORPUS.glob("*.mender"):
        with tarfile.open(path) as archive:
            kinds.add((path.name.split("-")[0].split(".")[0], archive.getnames()[-1]))
    assert {kind for kind, _ in kinds} == {"rootfs", "module", "bootstrap"}
    for suffix in ("", ".gz", ".xz", ".zst"):
        assert ("module", f"data/0000.tar{suffix}") in kinds


def test_the_mutator_gets_past_checksums_and_signatures() -> None:
    """Many mutations are refused for what a text behind the checksums says; of raw ones, none."""
    draw = random.Random(1)

    def mutate_bytes(data: bytes, limit: int) -> bytes:
        changed = bytearray(data or b"x")
        changed[draw.randrange(len(changed))] = draw.randrange(256)
        return bytes(changed[:limit])

    behind = {"structured": 0, "raw": 0}
    for path in sorted(CORPUS.glob("module-*.mender")):
        whole = path.read_bytes()
        for seed in range(150):
            structured_data = structured.mutate(whole, 1 << 16, seed, mutate_bytes)
            behind["structured"] += refused_behind_checksums(structured_data)
            behind["raw"] += refused_behind_checksums(mutate_bytes(whole, 1 << 16))
    assert behind["structured"] > 60, behind
    assert behind["raw"] == 0, behind


def refused_behind_checksums(data: bytes) -> bool:
    try:
        ArtifactReader(Memory(data), [structured.KEY.public_key()])
    except (ArtifactIntegrityError, ArtifactSignatureError):
        return False
    except ArtifactError as error:
        return re.match("header|type-info|meta-data|script|malformed", str(error)) is not None
    return False
