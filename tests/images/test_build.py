"""Whole builds: same bytes, no privileges, killed in the middle, side by side, versions gone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from images import Places, Progress, TargetImages, build_target, read_manifest
from images import builder as builder_module
from images.builder import REPOSITORY
from images.cli import main
from images.errors import ImageError, ImageTooLargeError, PackageGoneError
from images.locks import LOCK_DIR
from images.recipe import load_recipe
from images.store import TEMPORARY, sha256_file

pytestmark = pytest.mark.slow

NOBODY = 65534
LIBRARIES = ("_cffi", "cffi", "cryptography", "markdown_it", "mdurl", "pygments", "rich")
"""What the builder imports: the checkout's own may lie where only root may look."""
FILES = ("u-boot.bin", "seed.img", "rootfs-v1.img", "disk.img")


def digests(images: TargetImages) -> dict[str, str]:
    return {name: sha256_file(images.path(name)) for name in FILES}


def with_own_trees(places: Places, root: Path) -> Places:
    """Places below `root`, with the same keys and client; packages are linked, trees are not."""
    build, cache = root / "build", root / "cache"
    shutil.copytree(places.build / "keys", build / "keys")
    (cache / "debs").mkdir(parents=True)
    for deb in (places.cache / "debs").glob("*.deb"):
        (cache / "debs" / deb.name).symlink_to(deb)
    return replace(places, build=build, cache=cache)


def test_a_second_call_finds_everything_done(
    built: Callable[..., TargetImages],
) -> None:
    first = built("qemu-arm64")
    inode = first.disk().stat().st_ino
    second = built("qemu-arm64")
    assert second.manifest == first.manifest
    assert second.disk().stat().st_ino == inode


def test_a_file_changed_behind_its_back_is_made_again(
    built: Callable[..., TargetImages],
) -> None:
    images = built("qemu-arm64")
    good = images.manifest["files"]["u-boot.bin"]["sha256"]
    with images.path("u-boot.bin").open("r+b") as file:
        file.write(b"garbage")
    assert sha256_file(built("qemu-arm64").path("u-boot.bin")) == good


def test_the_manifest_tells_the_truth(built: Callable[..., TargetImages]) -> None:
    images = built("qemu-arm64", "v2")
    manifest = read_manifest("qemu-arm64", images.directory.parent)
    assert manifest == images.manifest
    for name, facts in manifest["files"].items():
        assert images.path(name).stat().st_size == facts["size"]
        assert sha256_file(images.path(name)) == facts["sha256"]
    assert manifest["layout"]["size"] == images.disk().stat().st_size
    slots = {p["name"]: p for p in manifest["layout"]["partitions"]}
    for variant in manifest["variants"].values():
        assert variant["size"] <= slots["rootfs-a"]["size"] == slots["rootfs-b"]["size"]
        assert variant["sha256"] == manifest["files"][variant["file"]]["sha256"]


def test_versions_differ_by_more_than_four_megabytes(built: Callable[..., TargetImages]) -> None:
    images = built("qemu-arm64", "v2")
    one, two = images.rootfs("v1").read_bytes(), images.rootfs("v2").read_bytes()
    step = 4096
    different = sum(one[i : i + step] != two[i : i + step] for i in range(0, len(one), step))
    assert different * step > 4 << 20


def test_another_directory_and_another_day_give_the_same_bytes(
    built: Callable[..., TargetImages], places: Places, tmp_path: Path
) -> None:
    first = built("qemu-arm64")
    other = with_own_trees(places, tmp_path / "somewhere" / "else")
    second = build_target("qemu-arm64", places=other)
    assert digests(second) == digests(first)
    assert second.manifest["files"] == {
        name: facts for name, facts in first.manifest["files"].items() if name in FILES
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become someone else")
def test_an_ordinary_user_builds_the_same_bytes(
    built: Callable[..., TargetImages], places: Places, tmp_path: Path
) -> None:
    first = built("qemu-arm64")
    # pytest's own directories are closed to others, so this one lives beside them.
    root = Path("/tmp") / f"brownout-nobody-{os.getpid()}"
    root.mkdir()
    try:
        shutil.copytree(REPOSITORY / "images", root / "images", symlinks=True)
        shutil.copytree(places.updater, root / "updater")
        shutil.copytree(places.build / "keys", root / "build" / "keys")
        (root / ".cache" / "debs").mkdir(parents=True)
        recipe = load_recipe("qemu-arm64")
        wanted = {package["sha256"] for package in first.manifest["packages"]}
        for digest in wanted:
            source = places.cache / "debs" / f"{digest}.deb"
            shutil.copyfile(source, root / ".cache" / "debs" / source.name)
        command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        # The virtual environment's interpreter may lie where only root may look.
        python = shutil.which("python3.11", path="/usr/bin:/usr/local/bin")
        if python is None:
            pytest.skip("there is no Python 3.11 that every user can run")
        command += [python, "-m", "images", "build", recipe.target]
        libraries = root / "libraries"
        libraries.mkdir()
        for installed in Path(sysconfig.get_path("purelib")).iterdir():
            if installed.name.lower().startswith(LIBRARIES):
                copy = shutil.copytree if installed.is_dir() else shutil.copyfile
                copy(installed, libraries / installed.name)
        for path in (root, *root.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        env = {"PATH": "/usr/bin:/bin", "HOME": str(root), "PYTHONPATH": f"{root}:{libraries}"}
        done = subprocess.run(
            [*command], cwd=root, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        output = root / "build" / recipe.target
        assert {name: sha256_file(output / name) for name in FILES} == digests(first)
    finally:
        shutil.rmtree(root)


def _start_build(places: Places, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "images", "build", "qemu-arm64", *more]
    command += ["--build-dir", str(places.build), "--cache-dir", str(places.cache)]
    command += ["--updater-dir", str(places.updater)]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_builds_killed_at_any_moment_leave_nothing_broken(
    built: Callable[..., TargetImages], places: Places, tmp_path: Path
) -> None:
    good = digests(built("qemu-arm64"))
    own = with_own_trees(places, tmp_path)
    output = own.build / "qemu-arm64"
    for delay in (0.7, 2.0, 5.0, 8.0, 10.0):
        process = _start_build(own)
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for name in FILES:
            if (output / name).exists():
                assert sha256_file(output / name) == good[name], f"killed after {delay} s"
    images = build_target("qemu-arm64", places=own)
    assert digests(images) == good
    left = [p for p in (*output.rglob("*"), *own.cache.rglob("*")) if TEMPORARY in p.name]
    assert left == []


def test_what_a_build_left_that_was_killed_after_its_last_rename_is_swept(
    built: Callable[..., TargetImages], places: Places
) -> None:
    built("qemu-arm64")
    left = places.cache / "trees" / f"work{TEMPORARY}left"
    left.mkdir()
    build_target("qemu-arm64", ["v1+never-fsync"], places=places)
    assert not left.exists()


def test_two_builds_at_once_agree(
    built: Callable[..., TargetImages], places: Places, tmp_path: Path
) -> None:
    good = digests(built("qemu-arm64"))
    own = with_own_trees(places, tmp_path)
    running = [_start_build(own), _start_build(own, "--variant", "v2")]
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert {n: sha256_file(own.build / "qemu-arm64" / n) for n in FILES} == good
    assert "v2" in read_manifest("qemu-arm64", own.build)["variants"]


@pytest.fixture
def lock_with_a_lost_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The committed lock, but with a version of the smallest package that no archive has."""
    folder = tmp_path / "locks"
    shutil.copytree(LOCK_DIR, folder)
    path = folder / "arm64.lock"
    lines = path.read_text().splitlines()
    changed = [
        "libuuid1 0.0-lost " + "00" * 32 if line.startswith("libuuid1 ") else line for line in lines
    ]
    path.write_text("\n".join(changed) + "\n")
    monkeypatch.setattr(builder_module, "LOCK_DIR", folder)
    yield path


def test_a_lost_version_is_one_line_with_an_offer(
    lock_with_a_lost_version: Path,
    places: Places,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = with_own_trees(places, tmp_path)
    arguments = ["build", "qemu-arm64", "--build-dir", str(own.build)]
    arguments += ["--cache-dir", str(own.cache), "--updater-dir", str(own.updater)]
    assert main(arguments) == 1
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("images: error")]
    (line,) = errors
    assert "no longer has libuuid1=0.0-lost (arm64): build with --relock" in line
    with pytest.raises(PackageGoneError):
        build_target("qemu-arm64", places=own)


def test_a_lost_version_can_be_replaced_without_touching_the_lock(
    lock_with_a_lost_version: Path, places: Places, tmp_path: Path
) -> None:
    own = with_own_trees(places, tmp_path)
    before = lock_with_a_lost_version.read_bytes()
    notes: list[Progress] = []
    images = build_target("qemu-arm64", places=own, progress=notes.append, relock_if_gone=True)
    assert any("no longer has libuuid1" in note.step for note in notes)
    assert lock_with_a_lost_version.read_bytes() == before
    versions = {p["name"]: p["version"] for p in images.manifest["packages"]}
    assert versions["libuuid1"] != "0.0-lost"
    # The next build uses the replacement at once, and says so.
    notes.clear()
    build_target("qemu-arm64", places=own, progress=notes.append, relock_if_gone=True)
    assert any("committed versions have gone" in note.step for note in notes)


@pytest.mark.night
def test_relock_writes_the_lock(
    lock_with_a_lost_version: Path, places: Places, tmp_path: Path
) -> None:
    own = with_own_trees(places, tmp_path)
    build_target("qemu-arm64", places=own, relock=True)
    assert "0.0-lost" not in lock_with_a_lost_version.read_text()


@pytest.mark.parametrize(
    ("change", "error", "cause"),
    [
        ({"packages": ()}, ImageError, "bin/busybox"),
        ({"slot_mib": 40}, ImageTooLargeError, "raise slot_mib"),
        ({"root_modules": ("no_such",)}, ImageError, "the kernel has no module no_such"),
        ({"without": "libexpat1"}, ImageError, "needs libexpat.so.1"),
    ],
)
def test_a_recipe_that_gives_a_broken_image_is_refused(
    *,
    change: dict[str, Any],
    error: type[ImageError],
    cause: str,
    places: Places,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = load_recipe("qemu-arm64")
    if "without" in change:
        change = {"packages": tuple(p for p in recipe.packages if p != change["without"])}
    monkeypatch.setattr(builder_module, "load_recipe", lambda name: replace(recipe, **change))
    own = with_own_trees(places, tmp_path)
    with pytest.raises(error, match=cause) as caught:
        build_target("qemu-arm64", places=own)
    assert "\n" not in str(caught.value)
    assert not list((own.build / "qemu-arm64").glob("rootfs-*"))


def test_an_image_without_a_client_is_refused(places: Places, tmp_path: Path) -> None:
    own = replace(places, build=tmp_path / "build", updater=tmp_path)
    with pytest.raises(ImageError, match=r"there is no update client in .*cli\.py is missing"):
        build_target("qemu-arm64", places=own)
