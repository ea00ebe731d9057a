"""`updater setup` refuses what cannot be updated safely, and otherwise writes once and for all."""

from __future__ import annotations

from pathlib import Path

import pytest
from updater_artifacts import make_key, write_key_pair

from updater.cli import main
from updater.device.config import load_config
from updater.device.errors import ConfigError
from updater.device.setup import (
    Observed,
    SetupError,
    SlotFacts,
    Wish,
    configuration,
    observe,
    parse_fw_env_config,
    problems,
    write_configuration,
)

WISH = Wish(
    device_type="board",
    slots=("/dev/mmcblk0p2", "/dev/mmcblk0p3"),
    data_dir="/data/updater",
    fw_env_config="/etc/fw_env.config",
)
SEEN = Observed(
    root_device=2,
    slots=(SlotFacts(True, 2, 2), SlotFacts(True, 3, 3)),
    data_device=4,
    data_kind="ext4",
    env_copies=(("/dev/mmcblk0", 0x100000, 0x4000), ("/dev/mmcblk0", 0x104000, 0x4000)),
    env={"mender_boot_part": "2"},
)


def test_a_device_that_can_be_updated_has_no_problems() -> None:
    assert problems(WISH, SEEN) == []
    grub = WISH._replace(fw_env_config="", grub_copies=("/boot/1/env", "/boot/2/env"))
    assert problems(grub, SEEN._replace(env_copies=())) == []


@pytest.mark.parametrize(
    ("wish", "seen", "problem"),
    [
        ({"device_type": ""}, {}, "device type is empty"),
        ({"slots": ("/dev/x",)}, {"slots": (SlotFacts(True, 2, 2),)}, "two --slot are needed"),
        ({}, {"slots": (SlotFacts(), SlotFacts(True, 3, 3))}, "mmcblk0p2 is no block device"),
        ({}, {"slots": (SlotFacts(True, 2, 0), SlotFacts(True, 3, 3))}, "is no partition"),
        ({}, {"slots": (SlotFacts(True, 2, 2), SlotFacts(True, 2, 2))}, "the same device"),
        ({}, {"root_device": 9}, "the running system is on neither"),
        ({}, {"data_device": 3}, "is inside a slot"),
        ({}, {"data_kind": "tmpfs"}, "is on tmpfs: it must survive a restart"),
        ({}, {"data_error": "read-only"}, "data directory /data/updater: read-only"),
        ({"fw_env_config": ""}, {}, "name either --fw-env-config or two --grub-env"),
        ({"grub_copies": ("/a", "/b")}, {}, "name either --fw-env-config or two --grub-env"),
        ({}, {"env_copies": SEEN.env_copies[:1]}, "1 copies of the environment: two are needed"),
        ({}, {"env_copies": (SEEN.env_copies[0],) * 2}, "the two copies overlap"),
        ({}, {"env_copies": (SEEN.env_copies[0], ("/dev/mmcblk0p2", 0, 9))}, "is a slot"),
        ({}, {"env_error": "fw_printenv is missing"}, "boot environment: fw_printenv is missing"),
        ({}, {"env": {}}, "mender_boot_part is '' and names none"),
        ({}, {"env": {"mender_boot_part": "7"}}, "mender_boot_part is '7'"),
        ({"server_url": "http://x"}, {}, "must begin with https://"),
        ({}, {"file_errors": ("key.pem: not a PEM public key",)}, "not a PEM public key"),
    ],
)
def test_what_stands_in_the_way_is_said(
    wish: dict[str, object], seen: dict[str, object], problem: str
) -> None:
    found = problems(WISH._replace(**wish), SEEN._replace(**seen))
    assert any(problem in text for text in found), found


def test_everything_is_said_at_once() -> None:
    found = problems(WISH._replace(device_type=""), SEEN._replace(root_device=9, data_device=9))
    assert len(found) == 3


@pytest.mark.parametrize(
    "wish",
    [
        WISH,
        WISH._replace(fw_env_config="", grub_copies=("/boot/1/env", "/boot/2/env")),
        WISH._replace(device_type='quo"te\\', artifact_keys=("/etc/a.pem", "/etc/b.pem")),
        WISH._replace(ca_file="/etc/ca.pem"),
    ],
)
def test_what_is_written_is_what_the_client_reads(tmp_path: Path, wish: Wish) -> None:
    path = tmp_path / "updater.toml"
    path.write_text(configuration(wish, SEEN))
    config = load_config(str(path))
    assert config.device_type == wish.device_type
    assert [(slot.device, slot.number) for slot in config.slots] == [
        ("/dev/mmcblk0p2", 2),
        ("/dev/mmcblk0p3", 3),
    ]
    assert config.bootenv == wish.bootenv
    assert config.artifact_keys == wish.artifact_keys
    assert (config.ca_file or "") == wish.ca_file
    assert config.health_directory == "/etc/updater/health.d"


@pytest.fixture
def place(tmp_path: Path) -> tuple[Wish, str]:
    folder = tmp_path / "etc" / "updater"
    wish = WISH._replace(
        artifact_info=str(folder / "artifact_info"), health_directory=str(folder / "health.d")
    )
    return wish, str(folder / "updater.toml")


def test_a_second_run_changes_nothing(place: tuple[Wish, str]) -> None:
    wish, path = place
    text = configuration(wish, SEEN)
    assert write_configuration(wish, path, text, force=False)
    facts = Path(path).stat()
    assert facts.st_mode & 0o777 == 0o600
    assert not write_configuration(wish, path, text, force=False)
    assert Path(path).stat().st_mtime_ns == facts.st_mtime_ns
    folder = Path(path).parent
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "artifact_info",
        "health.d",
        "updater.toml",
    ]


def test_a_different_configuration_is_kept_unless_forced(place: tuple[Wish, str]) -> None:
    wish, path = place
    old, new = configuration(wish, SEEN), configuration(wish._replace(device_type="new"), SEEN)
    write_configuration(wish, path, old, force=False)
    with pytest.raises(SetupError, match="exists and differs"):
        write_configuration(wish, path, new, force=False)
    assert Path(path).read_text() == old
    assert write_configuration(wish, path, new, force=True)
    assert Path(path).read_text() == new
    assert Path(f"{path}.old").read_text() == old


def test_what_the_client_would_not_read_is_never_put_in_place(place: tuple[Wish, str]) -> None:
    wish, path = place
    write_configuration(wish, path, configuration(wish, SEEN), force=False)
    before = Path(path).read_text()
    with pytest.raises(ConfigError):
        write_configuration(wish, path, "device_type = 3\n", force=True)
    assert Path(path).read_text() == before
    assert not Path(f"{path}.new").exists()


def test_fw_env_config_is_read_as_libubootenv_does() -> None:
    text = "# comment\n/dev/mmcblk0 0x100000 0x4000 # first\n\n/dev/mmcblk0\t1064960 16384 512 1\n"
    assert parse_fw_env_config(text) == SEEN.env_copies
    for bad in ("/dev/x 0x10", "/dev/x zero 1", "/dev/x 0 0"):
        with pytest.raises(ValueError, match="line 1"):
            parse_fw_env_config(bad)


def test_looking_at_this_machine_finds_it_no_device(tmp_path: Path) -> None:
    """The real look, at a machine that has no slots: every fact is reported, nothing is raised."""
    _, public = write_key_pair(make_key("ecdsa"), tmp_path, "k")
    (tmp_path / "fw_env.config").write_text("nonsense\n")
    (tmp_path / "no-ca.pem").write_text("no certificate")
    wish = WISH._replace(
        slots=(str(public), str(tmp_path / "absent")),
        data_dir=str(tmp_path / "data" / "updater"),
        fw_env_config=str(tmp_path / "fw_env.config"),
        artifact_keys=(str(public), str(tmp_path / "absent.pem")),
        ca_file=str(tmp_path / "no-ca.pem"),
    )
    seen = observe(wish)
    assert seen.slots == (SlotFacts(), SlotFacts())
    assert seen.data_device == tmp_path.stat().st_dev
    assert "not 'device offset size'" in seen.env_error
    found = "; ".join(problems(wish, seen))
    for words in ("no block device", "absent.pem: cannot read the key", "not a usable CA"):
        assert words in found


def test_the_command_line_refuses_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "updater.toml"
    arguments = ["--config", str(path), "setup", "--device-type", "board", "--slot", "/dev/null",
                 "--slot", "/dev/zero", "--fw-env-config", "/nowhere"]  # fmt: skip
    assert main(arguments) == 1
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "slot /dev/null is no block device; slot /dev/zero is no block device" in error
    assert "/nowhere: No such file or directory" in error
    assert not path.exists()
