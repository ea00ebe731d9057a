"""Building U-Boot: what is refused, what is checked, and that the bytes are always the same."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from images import uboot
from images.bootenv import encode_environment


def _lock(directory: Path, text: str) -> Path:
    path = directory / "uboot-src.lock"
    path.write_text(text, "utf-8")
    return path


def test_the_lock_file_names_the_source_and_every_tool() -> None:
    entries = uboot.read_lock()
    assert {e.name for e in entries if e.kind == "tool"} == set(uboot.TOOL_PACKAGES)
    sources = [e for e in entries if e.kind == "source"]
    assert len(sources) == 3
    assert {e.version for e in sources} == {"2023.01+dfsg-2+deb12u3"}
    assert "://" not in uboot.LOCK_FILE.read_text("utf-8")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("source u-boot.dsc 1 abc\n", ":1: not 'source|tool name version sha256'"),
        ("package x 1 " + "0" * 64 + "\n", ":1: not"),
        ("# nothing\n", "not locked; re-lock with"),
    ],
)
def test_a_bad_lock_file_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(uboot.UbootError) as caught:
        uboot.read_lock(_lock(tmp_path, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "images.uboot", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_missing_compilers_are_named_with_the_package_to_install(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("dpkg-source", "patch", "perl"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    done = _run("build", "--cache-dir", str(tmp_path / "cache"), PATH=str(tools))
    assert done.returncode == 1
    assert done.stderr == (
        "uboot: error: building U-Boot needs gcc, make: run `apt-get install build-essential`\n"
    )


def test_every_line_of_the_environment_is_understood() -> None:
    variables = uboot.default_environment()
    assert variables["bootlimit"] == "1"
    for name, value in variables.items():
        assert "\n" not in value, name
        # U-Boot takes a backslash out when it reads an environment: none may be needed.
        assert "\\" not in value, name
        opened = len([word for word in value.replace(";", " ").split() if word == "if"])
        closed = len([word for word in value.replace(";", " ").split() if word == "fi"])
        assert opened == closed, name
        for called in [w.split()[0].strip(";") for w in value.split("run ")[1:]]:
            assert called in variables, f"{name} runs {called}"


def test_a_copy_is_what_mkenvimage_makes(tmp_path: Path) -> None:
    """U-Boot's own tool as a peer: the same bytes (it marks the first copy with flags 1)."""
    variables = uboot.default_environment()
    text = tmp_path / "env.txt"
    text.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    peer = tmp_path / "peer.bin"
    subprocess.run(["mkenvimage", "-r", "-p", "0", "-s", "16384", "-o", peer, text], check=True)
    assert peer.read_bytes() == encode_environment(variables, 16384, 1)


@pytest.mark.slow
class TestWithTheSource:
    """These need the package cache filled: the first one that runs fills it."""

    @pytest.mark.night
    def test_a_second_build_elsewhere_gives_the_same_bytes(self) -> None:
        """In another directory, and from a source whose cached copy was damaged meanwhile."""
        before = hashlib.sha256(uboot.build().binary.read_bytes()).hexdigest()
        (dsc,) = [e for e in uboot.read_lock() if e.name.endswith(".dsc")]
        file = uboot.DEFAULT_CACHE / "uboot" / "files" / dsc.sha256
        good = file.read_bytes()
        file.write_bytes(good[:-1] + b"?")
        again = uboot.build(force=True)
        assert not again.cached
        assert again.sha256 == before
        assert file.read_bytes() == good

    def test_nothing_of_the_machine_is_in_the_binary(self) -> None:
        data = uboot.build().binary.read_bytes()
        for trace in (str(Path.home()), str(uboot.DEFAULT_CACHE), "/tmp/"):
            assert trace.encode() not in data

    @pytest.mark.night
    def test_a_setting_that_uboot_does_not_have_stops_the_build(self) -> None:
        inputs = uboot.Inputs(extra=("CONFIG_NO_SUCH_THING=y",))
        with pytest.raises(uboot.UbootError, match="does not take 'CONFIG_NO_SUCH_THING=y'"):
            uboot.build(inputs=inputs)

    @pytest.mark.night
    def test_a_failed_compilation_is_one_line_with_the_log(self) -> None:
        inputs = uboot.Inputs(extra=('CONFIG_DEFAULT_ENV_FILE="absent.env"',))
        with pytest.raises(uboot.UbootError) as caught:
            uboot.build(inputs=inputs)
        assert str(caught.value).startswith("U-Boot does not build: ")
        log = Path(str(caught.value).rpartition("log: ")[2])
        assert "absent.env" in log.read_text("utf-8", "replace")

    def test_no_directory_is_left_behind_by_failed_builds(self) -> None:
        assert not list((uboot.DEFAULT_CACHE / "uboot").glob("work*"))

    def test_a_source_that_has_gone_is_said_with_what_to_do(self, tmp_path: Path) -> None:
        text = uboot.LOCK_FILE.read_text("utf-8")
        sources = [e for e in uboot.read_lock() if e.kind == "source"]
        text = text.replace(sources[0].version, "2023.01+dfsg-2+deb12u999")
        text = text.replace(sources[0].sha256, "0" * 64)
        with pytest.raises(uboot.UbootError, match=r"no longer has .* u-boot=.*u999.*uboot lock"):
            uboot.build(lock_file=_lock(tmp_path, text))

    def test_a_tool_that_has_gone_is_said_with_what_to_do(self, tmp_path: Path) -> None:
        text = uboot.LOCK_FILE.read_text("utf-8")
        bison = next(e for e in uboot.read_lock() if e.name == "bison")
        text = text.replace(f"bison {bison.version}", "bison 2:99-1")
        text = text.replace(bison.sha256, "1" * 64)
        with pytest.raises(uboot.UbootError, match=r"no longer has bison=2:99-1.*uboot lock"):
            uboot.build(lock_file=_lock(tmp_path, text))
