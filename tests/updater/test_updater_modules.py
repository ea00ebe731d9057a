"""Update modules: the v3 protocol as third-party modules use it, and the ones that we ship."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from updater_artifacts import DEVICE_TYPE, image_bytes
from updater_judge import operate, settle
from updater_world import World, world_artifact

from updater.artifact import write_module_artifact

# Written after the public protocol text, in the shape in which such modules are: it logs each call,
# where it runs, and what it finds; $WORLD/answers may hold `call=answer` lines, $WORLD/fail a call.
LOGGING = """\
#!/bin/sh
log() { echo "$@" >> "$WORLD/calls"; }
case $1 in
    NeedsArtifactReboot|SupportsRollback|ProvidePayloadFileSizes)
        sed -n "s/^$1=//p" "$WORLD/answers" 2>/dev/null
        ;;
    Download*)
        if [ -e "$WORLD/stream" ]; then
            while line=$(cat stream-next); [ -n "$line" ]; do
                file=${line%% *}
                log "$line $(sha256sum < "$file" | cut -c1-8)"
            done
        fi
        ;;
esac
log "$1 $([ "$2" = "$PWD" ] && echo here) $(ls files 2>/dev/null | tr '\\n' ' ')"
[ "$(cat "$WORLD/fail" 2>/dev/null)" != "$1" ] || { echo "$1 went wrong" >&2; exit 1; }
exit 0
"""
BIG = image_bytes(700_000, 4)


@pytest.fixture(scope="module")
def logging_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("module")
    world_artifact(directory)
    (directory / "modules").mkdir()
    module = directory / "modules" / "logging"
    module.write_text(LOGGING)
    module.chmod(0o755)
    (directory / "one").write_bytes(BIG)
    (directory / "two").write_bytes(b"second")
    write_module_artifact(
        directory / "v2.mender",
        [directory / "one", directory / "two"],
        payload_type="logging",
        name="v2",
        group="stable",
        device_types=[DEVICE_TYPE],
        meta_data={"colour": "blue"},
        compression="gzip",
    )
    return directory / "v2.mender"


def calls(world: World) -> list[str]:
    path = world.directory / "calls"
    return [line.rstrip() for line in path.read_text().splitlines()] if path.exists() else []


def update(world: World, deployment: str = "", **answers: str) -> str:
    text = "".join(f"{question}={answer}\n" for question, answer in answers.items())
    (world.directory / "answers").write_text(text)
    _, said = operate(world, "install", "v2.mender", deployment)
    return said + (settle(world) if world.client().ports.store.update() else "")


STORED = "one two"


def test_a_module_that_does_not_stream_finds_its_files(
    tmp_path: Path, logging_module: Path
) -> None:
    world = World(tmp_path, logging_module)
    said = update(world)
    assert "committed v2" in said
    assert calls(world) == [
        "ProvidePayloadFileSizes here",
        "Download here",
        f"SupportsRollback here {STORED}",
        f"ArtifactInstall here {STORED}",
        f"NeedsArtifactReboot here {STORED}",
        f"ArtifactCommit here {STORED}",
        f"Cleanup here {STORED}",
    ]
    assert not (tmp_path / "modules" / "v3" / "payloads" / "0000").exists()
    provides = world.client().provides()
    assert provides["artifact_name"] == "v2"
    assert provides["rootfs-image.logging.version"] == "v2"
    assert world.running == "a"


@pytest.mark.parametrize(
    ("answers", "lines"),
    [
        ({}, ["streams/one 9d0f9c5d", "streams/two 16367aac"]),
        (
            {"ProvidePayloadFileSizes": "Yes"},
            ["streams/one 700000 9d0f9c5d", "streams/two 6 16367aac"],
        ),
    ],
)
def test_a_module_that_streams_gets_every_file_and_none_is_stored(
    tmp_path: Path, logging_module: Path, answers: dict[str, str], lines: list[str]
) -> None:
    import hashlib

    sums = {
        "9d0f9c5d": hashlib.sha256(BIG).hexdigest()[:8],
        "16367aac": hashlib.sha256(b"second").hexdigest()[:8],
    }
    lines = [f"{line[:-8]}{sums[line[-8:]]}" for line in lines]
    world = World(tmp_path, logging_module)
    (tmp_path / "stream").touch()
    said = update(world, **answers)
    assert "committed v2" in said
    download = "DownloadWithFileSizes" if answers else "Download"
    assert calls(world)[1:5] == [*lines, f"{download} here", "SupportsRollback here"]


def test_a_files_fifo_is_there_before_the_module_hears_its_name(
    tmp_path: Path, logging_module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module opens it at once; one that finds nothing there would wait for ever."""
    make = os.mkfifo

    def late(path: str, mode: int) -> None:
        time.sleep(0.3 if "/streams/" in path else 0.0)
        make(path, mode)

    monkeypatch.setattr("updater.device.modules.os.mkfifo", late)
    world = World(tmp_path, logging_module)
    (tmp_path / "stream").touch()
    assert "committed v2" in update(world)
    assert [len(line.split()) for line in calls(world)[1:3]] == [2, 2], "a file was not read"


def test_the_tree_holds_what_the_protocol_says(
    tmp_path: Path, logging_module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, logging_module)
    (tmp_path / "fail").write_text("ArtifactCommit")
    monkeypatch.setattr("updater.device.modules.ModuleRunner.drop", lambda self: None)
    update(world)
    tree = tmp_path / "modules" / "v3" / "payloads" / "0000" / "tree"
    texts = {
        str(path.relative_to(tree)): path.read_text()
        for path in tree.rglob("*")
        if path.is_file() and path.parent.name != "files"
    }
    assert texts.pop("header/header-info").startswith('{"payloads":[{"type":"logging"}]')
    assert '"type":"logging"' in texts.pop("header/type-info")
    assert texts == {
        "version": "3\n",
        "current_artifact_name": "v1\n",
        "current_artifact_group": "",
        "current_device_type": f"{DEVICE_TYPE}\n",
        "header/artifact_name": "v2",
        "header/artifact_group": "stable",
        "header/payload_type": "logging",
        "header/meta-data": '{"colour":"blue"}',
    }
    assert (tree / "tmp").is_dir()
    assert (tree / "files" / "one").read_bytes() == BIG


def states(world: World) -> list[str]:
    return [line.split()[0] for line in calls(world) if line.split()[0] not in QUESTIONS]


QUESTIONS = ("ProvidePayloadFileSizes", "SupportsRollback", "NeedsArtifactReboot")


@pytest.mark.parametrize(
    "case",
    [
        ("Download", {}, ["Download", "Cleanup"], "v1"),
        (
            "ArtifactInstall",
            {},
            ["Download", "ArtifactInstall", "ArtifactFailure", "Cleanup"],
            "v2_INCONSISTENT",
        ),
        (
            "ArtifactInstall",
            {"SupportsRollback": "Yes"},
            ["Download", "ArtifactInstall", "ArtifactRollback", "ArtifactFailure", "Cleanup"],
            "v1",
        ),
        (
            "ArtifactCommit",
            {"SupportsRollback": "Yes"},
            [
                "Download",
                "ArtifactInstall",
                "ArtifactCommit",
                "ArtifactRollback",
                "ArtifactFailure",
                "Cleanup",
            ],
            "v1",
        ),
        (
            "ArtifactVerifyReboot",
            {"SupportsRollback": "Yes", "NeedsArtifactReboot": "Automatic"},
            [
                "Download",
                "ArtifactInstall",
                "ArtifactVerifyReboot",
                "ArtifactRollback",
                "ArtifactVerifyRollbackReboot",
                "ArtifactFailure",
                "Cleanup",
            ],
            "v1",
        ),
        (
            "ArtifactVerifyReboot",
            {"SupportsRollback": "Yes", "NeedsArtifactReboot": "Yes"},
            [
                "Download",
                "ArtifactInstall",
                "ArtifactReboot",
                "ArtifactVerifyReboot",
                "ArtifactRollback",
                "ArtifactRollbackReboot",
                "ArtifactVerifyRollbackReboot",
                "ArtifactFailure",
                "Cleanup",
            ],
            "v1",
        ),
    ],
)
def test_a_failing_call_takes_the_documented_way_back(
    tmp_path: Path,
    logging_module: Path,
    case: tuple[str, dict[str, str], list[str], str],
) -> None:
    failing, answers, expected, name = case
    world = World(tmp_path, logging_module)
    (tmp_path / "fail").write_text(failing)
    said = update(world, "d-1", **answers)
    assert states(world) == expected
    assert f"update module logging: {failing} exited with 1: {failing} went wrong" in said
    assert world.client().artifact_name() == name
    assert world.store.update() is None


def test_a_restart_that_a_module_wants_is_asked_for_once(
    tmp_path: Path, logging_module: Path
) -> None:
    world = World(tmp_path, logging_module)
    answers = {"NeedsArtifactReboot": "Automatic", "SupportsRollback": "Yes"}
    said = update(world, "d-1", **answers)
    assert "committed v2" in said
    assert world.boots == 1
    assert states(world) == [
        "Download",
        "ArtifactInstall",
        "ArtifactVerifyReboot",
        "ArtifactCommit",
        "Cleanup",
    ]


def test_a_rollback_that_is_never_verified_stops_after_a_number_of_restarts(
    tmp_path: Path, logging_module: Path
) -> None:
    world = World(tmp_path, logging_module)
    module = logging_module.parent / "modules" / "logging"
    honest = module.read_text()
    module.write_text(
        honest.replace("exit 0", "case $1 in ArtifactVerify*) exit 1 ;; esac; exit 0")
    )
    try:
        text = "NeedsArtifactReboot=Automatic\nSupportsRollback=Yes\n"
        (tmp_path / "answers").write_text(text)
        _, said = operate(world, "install", "v2.mender", "d-1")
        boots = 0
        while world.client().ports.store.update() is not None:
            boots += 1
            assert boots < 40, "an endless loop of restarts"
            world.restart()
            said += operate(world, "resume")[1]
    finally:
        module.write_text(honest)
    assert "without an end" in said
    assert world.client().artifact_name() == "v2_INCONSISTENT"


@pytest.mark.parametrize(
    ("question", "answer"), [("SupportsRollback", "Perhaps"), ("NeedsArtifactReboot", "Maybe")]
)
def test_an_answer_that_means_nothing_is_an_error(
    tmp_path: Path, logging_module: Path, question: str, answer: str
) -> None:
    said = update(World(tmp_path, logging_module), **{question: answer})
    assert f"update module logging answers '{answer}' to {question}" in said


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("read -r line < stream-next; exit 0", "Download ended without reading one"),
        (
            "read -r line < stream-next; head -c 1000 $line > /dev/null",
            "Download stopped reading one",
        ),
        (
            "read -r line < stream-next; cat $line > /dev/null",
            "Download ended without asking for two",
        ),
        ("echo broken >&2; exit 3", "Download exited with 3: broken"),
    ],
)
def test_a_module_that_reads_only_a_part_is_an_error(
    tmp_path: Path, logging_module: Path, body: str, message: str
) -> None:
    modules = tmp_path / "modules-of-mine"
    modules.mkdir()
    (modules / "logging").write_text(f"#!/bin/sh\n[ $1 != Download ] || {{ {body}; }}\n")
    (modules / "logging").chmod(0o755)
    world = World(tmp_path, logging_module)
    directories = (str(modules),)
    world.config = world.config._replace(
        modules=world.config.modules._replace(directories=directories)
    )
    said = update(world)
    assert f"update module logging: {message}" in said
    assert world.client().artifact_name() == "v1"


def test_an_unknown_payload_type_is_refused_before_anything_happens(
    tmp_path: Path, logging_module: Path
) -> None:
    world = World(tmp_path, logging_module)
    world.config = world.config._replace(
        modules=world.config.modules._replace(directories=("/nonexistent",))
    )
    said = update(world)
    assert "there is no update module for payload type 'logging' in /nonexistent" in said
    assert calls(world) == []


# The shipped ones


class Shipped:
    """An artifact for a shipped module, and what it manages in the world's directory."""

    def __init__(self, directory: Path, kind: str) -> None:
        directory.mkdir()
        self.kind = kind
        self.artifact = directory / "v2.mender"
        self._directory = directory

    def write(self, files: dict[str, bytes | str]) -> None:
        paths = []
        for name, content in files.items():
            path = self._directory / name
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            paths.append(path)
        write_module_artifact(
            self.artifact,
            paths,
            payload_type=self.kind,
            name="v2",
            device_types=[DEVICE_TYPE],
            compression="none",
        )


def single_file(directory: Path, target: Path) -> Path:
    shipped = Shipped(directory, "single-file")
    shipped.write(
        {
            "dest_dir": f"{target}\n",
            "filename": "app.conf\n",
            "permissions": "640\n",
            "app.conf": "new",
        }
    )
    return shipped.artifact


def directory_tree(directory: Path, target: Path) -> Path:
    shipped = Shipped(directory, "directory")
    with tarfile.open(directory / "update.tar", "w") as archive:
        for name, content in (("app.conf", "new"), ("sub", None)):
            path = directory / name
            path.write_text(content) if content else path.mkdir()
            archive.add(path, name)
    shipped.write(
        {"dest_dir": f"{target}\n", "update.tar": (directory / "update.tar").read_bytes()}
    )
    return shipped.artifact


MAKERS: dict[str, Callable[[Path, Path], Path]] = {
    "single-file": single_file,
    "directory": directory_tree,
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("before", ["old", None])
@pytest.mark.parametrize("healthy", [True, False])
def test_files_are_replaced_or_put_back(
    tmp_path: Path, kind: str, before: str | None, healthy: bool
) -> None:
    target = tmp_path / "target"
    world = World(tmp_path / "w", MAKERS[kind](tmp_path / "artifact", target))
    if before is not None:
        target.mkdir()
        (target / "app.conf").write_text(before)
    if not healthy:
        (tmp_path / "artifact" / "sick.d").mkdir()
        sick = tmp_path / "artifact" / "sick.d" / "50-sick"
        sick.write_text("#!/bin/sh\nexit 1\n")
        sick.chmod(0o755)
        world.always_sick = True
    else:
        (tmp_path / "artifact" / "well.d").mkdir()
    said = update(world)
    path = target / "app.conf"
    if healthy:
        assert "committed v2" in said
        assert path.read_text() == "new"
        if kind == "single-file":
            assert path.stat().st_mode & 0o777 == 0o640
        else:
            assert sorted(entry.name for entry in target.iterdir()) == ["app.conf", "sub"]
    else:
        assert "50-sick exited with 1" in said
        assert (path.read_text() if path.exists() else None) == before
    assert [entry.name for entry in tmp_path.iterdir() if "update" in entry.name] == []


@pytest.mark.parametrize("kind", MAKERS)
def test_a_cut_at_any_event_of_a_module_update_leaves_the_old_or_the_new_files(
    tmp_path: Path, kind: str
) -> None:
    cuts = 0
    for cut_at in range(1, 100):
        base = tmp_path / str(cut_at)
        base.mkdir()
        target = base / "target"
        target.mkdir()
        (target / "app.conf").write_text("old")
        world = World(base / "w", MAKERS[kind](base / "artifact", target), cut_at)
        (base / "artifact" / "well.d").mkdir()
        world.power.cut_at = cut_at
        _, said = operate(world, "install", "v2.mender")
        reached = world.power.off
        said += settle(world)
        outcome = world.store.last_outcome()
        assert outcome is not None
        content = (target / "app.conf").read_text()
        assert content == ("new" if outcome.result == "committed" else "old"), said
        if outcome.result != "committed":
            assert outcome.cause
            assert "committed v2" in update(world)
        assert (target / "app.conf").read_text() == "new"
        assert not list(base.glob("target.*"))
        cuts += reached
        if not reached:
            break
    assert cuts >= 10


def test_scripts_run_in_order_and_a_failing_one_makes_the_update_fail(tmp_path: Path) -> None:
    shipped = Shipped(tmp_path / "artifact", "script")
    log = tmp_path / "log"
    shipped.write(
        {
            "10-a": f"#!/bin/sh\necho a >> {log}\n",
            "20-b": f"#!/bin/sh\necho b >> {log}\ntest -e {tmp_path}/allowed\n",
        }
    )
    (tmp_path / "artifact" / "well.d").mkdir()
    world = World(tmp_path / "w", shipped.artifact)
    said = update(world)
    assert "20-b exited with 1" in said
    assert world.client().artifact_name() == "v2_INCONSISTENT"
    (tmp_path / "allowed").touch()
    assert "committed v2" in update(world)
    assert log.read_text().split() == ["a", "b", "a", "b"]
    assert world.client().artifact_name() == "v2"


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg")
def test_debian_packages_are_installed_by_dpkg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    (package / "DEBIAN").mkdir(parents=True)
    (package / "usr").mkdir()
    (package / "usr" / "greeting").write_text("hello")
    (package / "DEBIAN" / "control").write_text(
        "Package: greeting\nVersion: 1.0\nArchitecture: all\nMaintainer: x <x@example.com>\n"
        "Description: a test\n"
    )
    deb = tmp_path / "greeting.deb"
    command = ["dpkg-deb", "--root-owner-group", "--build", str(package), str(deb)]
    subprocess.run(command, check=True, capture_output=True)
    # The real dpkg, but on a root directory of its own.
    root = tmp_path / "root"
    for part in ("info", "updates"):
        (root / "var" / "lib" / "dpkg" / part).mkdir(parents=True)
    (root / "var" / "lib" / "dpkg" / "status").touch()
    shims = tmp_path / "shims"
    shims.mkdir()
    (shims / "dpkg").write_text(
        f"#!/bin/sh\nexec {shutil.which('dpkg')} --root={root} --force-not-root"
        ' --log=/dev/null "$@"\n'
    )
    (shims / "dpkg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{shims}:{os.environ['PATH']}")
    shipped = Shipped(tmp_path / "artifact", "deb")
    shipped.write({"greeting.deb": deb.read_bytes()})
    (tmp_path / "artifact" / "well.d").mkdir()
    said = update(World(tmp_path / "w", shipped.artifact))
    assert "committed v2" in said, said
    assert (root / "usr" / "greeting").read_text() == "hello"


def test_a_kill_in_the_middle_of_a_module_is_rolled_back_at_the_next_start(
    tmp_path: Path,
) -> None:
    """Real processes: client and module die while the module works."""
    module = tmp_path / "modules" / "slow"
    module.parent.mkdir()
    module.write_text(
        "#!/bin/sh\ncase $1 in SupportsRollback) echo Yes ;;\n"
        f"ArtifactInstall) echo half > {tmp_path}/work; sleep 60 ;;\n"
        f"ArtifactRollback) echo undone > {tmp_path}/work ;; esac\n"
    )
    module.chmod(0o755)
    (tmp_path / "payload").write_text("x")
    artifact = tmp_path / "v2.mender"
    write_module_artifact(
        artifact, [tmp_path / "payload"], payload_type="slow", name="v2", device_types=["d"]
    )
    for name in "ab":
        (tmp_path / f"{name}.img").write_bytes(bytes(4096))
    (tmp_path / "artifact_info").write_text("artifact_name=v1\n")
    for number in "12":
        (tmp_path / number).mkdir()
        for name in ("env", "lock"):
            (tmp_path / number / name).write_bytes(GRUB_ENV[name])
    (tmp_path / "running").write_text("a")
    (tmp_path / "boot").write_text("1")
    (tmp_path / "updater.toml").write_text(
        f'''device_type = "d"
data_dir = "{tmp_path}/data"
artifact_info = "{tmp_path}/artifact_info"
[slots]
a = {{device = "{tmp_path}/a.img", number = 2}}
b = {{device = "{tmp_path}/b.img", number = 3}}
[bootenv]
kind = "grub"
copies = ["{tmp_path}/1/env", "{tmp_path}/2/env"]
[modules]
directories = ["{tmp_path}/modules"]
'''
    )
    program = [sys.executable, str(Path(__file__).with_name("updater_device.py")), str(tmp_path)]
    command = [*program, "0", "install", str(artifact)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 30
        while not (tmp_path / "work").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert (tmp_path / "work").read_text() == "half\n"
    done = subprocess.run([*program, "0", "resume"], capture_output=True, text=True, check=False)
    assert (tmp_path / "work").read_text() == "undone\n"
    assert "was not installed, v1 (slot a) stays: interrupted in ArtifactInstall" in done.stderr


def _grub_env() -> dict[str, bytes]:
    from updater.device.bootenv_grub import format_block

    values = {
        "mender_boot_part": "2",
        "mender_boot_part_hex": "2",
        "upgrade_available": "0",
        "bootcount": "0",
    }
    return {"env": format_block(values), "lock": format_block({"editing": "0"})}


GRUB_ENV = _grub_env()
