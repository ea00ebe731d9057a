"""`updater setup`: make a stock Debian system with two slots a device that can be updated.

It looks (`observe`), says everything that stands in the way at once (`problems`, pure), and only
if nothing does, writes the configuration: whole or not at all, read back through the client's own
parser first. Run again with the same wishes it changes nothing; an existing file that differs is
kept unless `--force` says otherwise, and then as `.old`.

It does not partition, does not install a boot loader and does not write to its environment: a
system whose boot loader cannot fall back by itself is refused, because an updater on it would be a
way to lose devices. Facts: libubootenv's fw_env.config (one line a copy: device, offset, size),
Linux's /sys/dev/block/MAJOR:MINOR/partition and /proc/self/mountinfo.
"""

from __future__ import annotations

import json
import os
import stat
from typing import NamedTuple

from updater.device.bootenv import open_environment
from updater.device.config import BootEnvConfig, load_config
from updater.device.console import say
from updater.device.errors import UpdaterError

_MAX_FILE_BYTES = 64 * 1024
_VOLATILE = ("tmpfs", "ramfs", "devtmpfs", "overlay", "squashfs", "rootfs")
SLOT_NAMES = ("a", "b")


class SetupError(UpdaterError):
    """The system cannot be set up; the message says all that stands in the way."""


class Wish(NamedTuple):
    """What the device is to be; paths are absolute."""

    device_type: str
    slots: tuple[str, ...]
    data_dir: str
    fw_env_config: str = ""
    grub_copies: tuple[str, ...] = ()
    artifact_keys: tuple[str, ...] = ()
    ca_file: str = ""
    server_url: str = ""
    artifact_info: str = "/etc/updater/artifact_info"
    artifact_name: str = "unknown"
    health_directory: str = "/etc/updater/health.d"

    @property
    def bootenv(self) -> BootEnvConfig:
        """The boot environment's part of the configuration."""
        if self.grub_copies:
            return BootEnvConfig("grub", "", self.grub_copies)
        return BootEnvConfig("uboot", self.fw_env_config, ())


class SlotFacts(NamedTuple):
    """A slot's device as the kernel sees it; `number` is the partition's, 0 for none."""

    is_block: bool = False
    device_number: int = 0
    number: int = 0


class Observed(NamedTuple):
    """What was found. An `error` text stands for what could not be looked at."""

    root_device: int
    slots: tuple[SlotFacts, ...]
    data_device: int
    data_kind: str
    data_error: str = ""
    env_copies: tuple[tuple[str, int, int], ...] = ()
    env: dict[str, str] = {}  # noqa: RUF012 - never mutated
    env_error: str = ""
    file_errors: tuple[str, ...] = ()


def observe(wish: Wish) -> Observed:
    """Look at the system; change nothing."""
    data_device, data_kind, data_error = _look_at_data(wish.data_dir)
    copies: tuple[tuple[str, int, int], ...] = ()
    env: dict[str, str] = {}
    env_error = ""
    try:
        if wish.fw_env_config:
            copies = parse_fw_env_config(_read(wish.fw_env_config))
        env = open_environment(wish.bootenv).read()
    except (OSError, ValueError, UpdaterError) as error:
        env_error = (
            f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else (str(error))
        )
    return Observed(
        root_device=os.stat("/").st_dev,  # noqa: PTH116
        slots=tuple(_look_at_slot(path) for path in wish.slots),
        data_device=data_device,
        data_kind=data_kind,
        data_error=data_error,
        env_copies=copies,
        env=env,
        env_error=env_error,
        file_errors=tuple(_file_errors(wish)),
    )


def problems(wish: Wish, seen: Observed) -> list[str]:
    """Say everything that stands in the way of an updatable device; pure."""
    found = list(seen.file_errors)
    if not wish.device_type or not wish.device_type.isprintable():
        found.append("the device type is empty or unprintable")
    found += _slot_problems(wish, seen)
    if seen.data_error:
        found.append(f"data directory {wish.data_dir}: {seen.data_error}")
    elif seen.data_kind in _VOLATILE:
        found.append(
            f"data directory {wish.data_dir} is on {seen.data_kind}: it must survive a restart"
        )
    elif seen.data_device in [slot.device_number for slot in seen.slots] + [seen.root_device]:
        found.append(
            f"data directory {wish.data_dir} is inside a slot: it needs a partition of its own,"
            " which both systems share"
        )
    if bool(wish.fw_env_config) == bool(wish.grub_copies):
        found.append("name either --fw-env-config or two --grub-env, not both or neither")
    else:
        found += _environment_problems(wish, seen)
    if wish.server_url and not wish.server_url.startswith("https://"):
        found.append(f"server {wish.server_url}: must begin with https://")
    return found


def _slot_problems(wish: Wish, seen: Observed) -> list[str]:
    if len(wish.slots) != 2:
        return [f"two --slot are needed, not {len(wish.slots)}"]
    found = []
    for path, slot in zip(wish.slots, seen.slots, strict=True):
        if not slot.is_block:
            found.append(f"slot {path} is no block device")
        elif slot.number == 0:
            found.append(f"slot {path} is no partition: the boot loader starts slots by number")
    first, second = seen.slots
    if found:
        return found
    if first.device_number == second.device_number:
        return [f"both slots are the same device: {wish.slots[0]} and {wish.slots[1]}"]
    if seen.root_device not in (first.device_number, second.device_number):
        return [
            f"the running system is on neither {wish.slots[0]} nor {wish.slots[1]}:"
            " setup must run on the device itself, from one of its slots"
        ]
    return []


def _environment_problems(wish: Wish, seen: Observed) -> list[str]:
    if seen.env_error:
        return [f"boot environment: {seen.env_error}"]
    found = []
    if wish.fw_env_config and len(seen.env_copies) != 2:
        found.append(
            f"{wish.fw_env_config} names {len(seen.env_copies)} copies of the environment: two are"
            " needed, else a power cut while it is written loses it"
        )
    for number, (path, offset, size) in enumerate(seen.env_copies):
        for other, start, length in seen.env_copies[number + 1 :]:
            if path == other and offset < start + length and start < offset + size:
                found.append(f"{wish.fw_env_config}: the two copies overlap")
        if path in wish.slots:
            found.append(f"{wish.fw_env_config}: {path} is a slot; an update would overwrite it")
    if len(wish.grub_copies) not in (0, 2) or len(set(wish.grub_copies)) != len(wish.grub_copies):
        found.append("two different --grub-env are needed")
    part = seen.env.get("mender_boot_part", "")
    numbers = [str(slot.number) for slot in seen.slots]
    if part not in numbers:
        found.append(
            "the boot environment's mender_boot_part is"
            f" {part!r} and names none of the slots' numbers {' and '.join(numbers)}: this boot"
            " loader is not set up to choose between two slots"
        )
    return found


def configuration(wish: Wish, seen: Observed) -> str:
    """Return the text of updater.toml; pure, and the same for the same wishes."""
    text = _toml
    lines = [
        "# Written by `updater setup`; see `updater setup --help`.",
        f"device_type = {text(wish.device_type)}",
        f"data_dir = {text(wish.data_dir)}",
        f"artifact_info = {text(wish.artifact_info)}",
        "",
        "[slots]",
        *(
            f"{name} = {{device = {text(path)}, number = {slot.number}}}"
            for name, path, slot in zip(SLOT_NAMES, wish.slots, seen.slots, strict=True)
        ),
        "",
        "[bootenv]",
    ]
    if wish.grub_copies:
        copies = ", ".join(map(text, wish.grub_copies))
        lines += ['kind = "grub"', f"copies = [{copies}]"]
    else:
        lines += ['kind = "uboot"', f"fw_env_config = {text(wish.fw_env_config)}"]
    if wish.ca_file:
        lines += ["", "[tls]", f"ca_file = {text(wish.ca_file)}"]
    if wish.artifact_keys:
        keys = ", ".join(map(text, wish.artifact_keys))
        lines += ["", "[trust]", f"artifact_keys = [{keys}]"]
    lines += ["", "[health]", f"directory = {text(wish.health_directory)}"]
    if wish.server_url:
        lines += ["", "[server]", f"url = {text(wish.server_url)}"]
    return "\n".join(lines) + "\n"


def set_up(wish: Wish, path: str, *, force: bool = False, dry_run: bool = False) -> bool:
    """Check, then write the configuration to `path`; return whether anything changed.

    Raises SetupError with every problem, in one line; nothing was changed then.
    """
    seen = observe(wish)
    found = problems(wish, seen)
    if not dry_run and os.geteuid() != 0:
        found.append("setup writes to /etc: run it as root")
    if found:
        raise SetupError("; ".join(found))
    text = configuration(wish, seen)
    if dry_run:
        for line in text.splitlines():
            say(f"would write: {line}" if line else "would write:")
        return False
    return write_configuration(wish, path, text, force=force)


def write_configuration(wish: Wish, path: str, text: str, *, force: bool) -> bool:
    """Write the files that `text` and `wish` ask for, durably; return whether any changed."""
    try:
        changed = _write_main(path, text, force=force)
        os.makedirs(wish.health_directory, mode=0o755, exist_ok=True)  # noqa: PTH103
        if not os.path.exists(wish.artifact_info):  # noqa: PTH110
            _write(wish.artifact_info, f"artifact_name={wish.artifact_name}\n", 0o644)
            changed = True
    except OSError as error:
        raise SetupError(f"{error.filename or path}: {error.strerror}") from error
    return changed


def _write_main(path: str, text: str, *, force: bool) -> bool:
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)  # noqa: PTH103, PTH120
    try:
        present = _read(path)
    except FileNotFoundError:
        present = None
    if present == text:
        return False
    if present is not None and not force:
        raise SetupError(
            f"{path}: exists and differs from what was asked for; --force replaces it and keeps"
            " it as .old"
        )
    trial = f"{path}.new"
    _write(trial, text)
    try:
        load_config(trial)
        if present is not None:
            _write(f"{path}.old", present)
        os.replace(trial, path)  # noqa: PTH105
    except BaseException:
        os.unlink(trial)  # noqa: PTH108
        raise
    _sync_directory(path)
    return True


def _write(path: str, text: str, mode: int = 0o600) -> None:
    """Write a file, readable by root alone: a server's token may be added to it later."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path, flags, mode)
    try:
        os.write(handle, text.encode())
        os.fsync(handle)
    finally:
        os.close(handle)
    _sync_directory(path)


def _sync_directory(path: str) -> None:
    handle = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)  # noqa: PTH120
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def parse_fw_env_config(text: str) -> tuple[tuple[str, int, int], ...]:
    """Return (device, offset, size) of each copy; ValueError names a malformed line."""
    copies = []
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        try:
            path, offset, size = fields[0], int(fields[1], 0), int(fields[2], 0)
        except (IndexError, ValueError):
            raise ValueError(f"line {number}: not 'device offset size': {line[:80]!r}") from None
        if size <= 0 or offset < 0:
            raise ValueError(f"line {number}: offset {offset} and size {size} make no sense")
        copies.append((path, offset, size))
    return tuple(copies)


def _look_at_slot(path: str) -> SlotFacts:
    try:
        facts = os.stat(path)  # noqa: PTH116
    except OSError:
        return SlotFacts()
    if not stat.S_ISBLK(facts.st_mode):
        return SlotFacts()
    device = f"{os.major(facts.st_rdev)}:{os.minor(facts.st_rdev)}"
    try:
        number = int(_read(f"/sys/dev/block/{device}/partition"))
    except (OSError, ValueError):
        number = 0
    return SlotFacts(True, facts.st_rdev, number)


def _look_at_data(path: str) -> tuple[int, str, str]:
    """Return device, file system type and error of the file system that `path` is or will be on."""
    present = path
    while not os.path.exists(present):  # noqa: PTH110
        present = os.path.dirname(present) or "/"  # noqa: PTH120
    device = os.stat(present).st_dev  # noqa: PTH116
    wanted = f"{os.major(device)}:{os.minor(device)}"
    if os.statvfs(present).f_flag & os.ST_RDONLY:
        return device, "", "the file system is mounted read-only"
    with open("/proc/self/mountinfo", encoding="utf-8") as file:  # noqa: PTH123
        for line in file:
            fields = line.split(" ")
            if fields[2] == wanted:
                return device, fields[fields.index("-") + 1], ""
    return device, "", "its file system is not mounted"


def _file_errors(wish: Wish) -> list[str]:
    """Check keys and certificates the way the client will."""
    from updater.artifact import ArtifactError  # noqa: PLC0415
    from updater.artifact.signature import load_public_key  # noqa: PLC0415

    found = []
    for path in wish.artifact_keys:
        try:
            load_public_key(path)
        except ArtifactError as error:
            found.append(str(error))
    if wish.ca_file:
        import ssl  # noqa: PLC0415

        try:
            ssl.create_default_context(cafile=wish.ca_file)
        except (OSError, ssl.SSLError) as error:
            found.append(f"{wish.ca_file}: not a usable CA certificate ({error})")
    paths = [wish.data_dir, *wish.slots, *wish.artifact_keys, *wish.grub_copies]
    paths += [path for path in (wish.fw_env_config, wish.ca_file) if path]
    found += [f"{path}: must be an absolute path" for path in paths if not path.startswith("/")]
    return found


def _read(path: str) -> str:
    with open(path, "rb") as file:  # noqa: PTH123
        return file.read(_MAX_FILE_BYTES).decode("utf-8", "replace")


def _toml(text: str) -> str:
    """Return a TOML basic string; JSON's escapes are a subset of TOML's."""
    return json.dumps(text, ensure_ascii=False)
