"""`/etc/updater/updater.toml`: read once, checked completely, unknown keys refused.

A misspelt key is a setting that silently does not hold, so every error names the file and the
key. Values are NamedTuples, not dataclasses: `dataclasses` costs a tenth of a second of import
on an emulated board, and this module is on the boot path.
"""

from __future__ import annotations

import tomllib
from typing import Any, NamedTuple

from updater.device.errors import ConfigError

DEFAULT_PATH = "/etc/updater/updater.toml"


class Slot(NamedTuple):
    """One root file system: its name, block device and partition number."""

    name: str
    device: str
    number: int


class BootEnvConfig(NamedTuple):
    """Where the boot variables live: `kind` is "uboot" or "grub"."""

    kind: str
    fw_env_config: str
    copies: tuple[str, ...]


class DownloadConfig(NamedTuple):
    """Bounds of a download: seconds and counts.

    `stall_s` must bring `stall_bytes` each; a download expected to take `spool_min_s` or more is
    kept on the data partition, to be resumed after a restart (0: always; it is not if there is no
    room). `window_mib` is the memory that an artifact's xz or zstd may ask for.
    """

    timeout_s: float = 30.0
    deadline_s: float = 7200.0
    retries: int = 8
    backoff_s: float = 0.5
    backoff_ceiling_s: float = 30.0
    stall_s: float = 120.0
    stall_bytes: int = 4096
    spool_min_s: float = 60.0
    window_mib: int = 16


class ScriptsConfig(NamedTuple):
    """State scripts: where the root file system's are, and their bounds in seconds."""

    directory: str = "/etc/updater/scripts"
    timeout_s: float = 3600.0
    retry_interval_s: float = 60.0
    retry_window_s: float = 1800.0


class ModulesConfig(NamedTuple):
    """Update modules: the directories that are searched, in order, and a call's bound."""

    directories: tuple[str, ...] = (
        "/etc/updater/modules/v3",
        "/usr/share/mender/modules/v3",
        f"{__file__.rpartition('/device/')[0]}/modules/v3",
    )
    timeout_s: float = 4 * 3600.0


class ServerConfig(NamedTuple):
    """The management server; without a `url` there is none. Times are in seconds.

    `require_contact` makes contact with the server, within `contact_budget_s`, a condition for
    committing; otherwise a server that is down never costs a good system. With a `key_uri` the
    device's key is in a PKCS#11 token (`token_key.py`), not in `key_file`. `windows` are the
    local times at which an update may be installed and the device restarted: "22:00-04:30", or
    "Sat,Sun 00:00-24:00"; none means always.
    """

    url: str = ""
    tenant_token: str = ""
    key_file: str = ""
    key_uri: str = ""
    key_type: str = "ed25519"
    identity: str = "/usr/share/mender/identity/mender-device-identity"
    inventory: str = "/usr/share/mender/inventory"
    poll_s: float = 1800.0
    inventory_s: float = 28800.0
    retry_s: float = 60.0
    timeout_s: float = 30.0
    require_contact: bool = False
    contact_budget_s: float = 300.0
    windows: tuple[str, ...] = ()
    reboot_command: tuple[str, ...] = ("reboot",)


class Config(NamedTuple):
    """The whole configuration."""

    path: str
    device_type: str
    data_dir: str
    artifact_info: str
    slots: tuple[Slot, Slot]
    bootenv: BootEnvConfig
    ca_file: str | None
    artifact_keys: tuple[str, ...]
    health_directory: str | None
    health_timeout_s: float
    download: DownloadConfig
    scripts: ScriptsConfig = ScriptsConfig()
    modules: ModulesConfig = ModulesConfig()
    server: ServerConfig = ServerConfig()
    grow_ext4: bool = False


def load_config(path: str = DEFAULT_PATH) -> Config:
    """Read and check `path`. Raises ConfigError."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - pathlib is not on the boot path
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    top = _Table(path, "", values)
    config = Config(
        path=path,
        device_type=top.text("device_type"),
        data_dir=top.absolute("data_dir"),
        artifact_info=top.absolute("artifact_info"),
        slots=_slots(top.table("slots")),
        bootenv=_bootenv(top.table("bootenv")),
        grow_ext4=top.flag("grow_ext4"),
        **_optional_sections(top),
    )
    top.refuse_unknown()
    return config


def _optional_sections(top: _Table) -> dict[str, Any]:
    tls = top.table("tls", optional=True)
    trust = top.table("trust", optional=True)
    health = top.table("health", optional=True)
    download = top.table("download", optional=True)
    scripts = top.table("scripts", optional=True)
    modules = top.table("modules", optional=True)
    server = top.table("server", optional=True)
    defaults = DownloadConfig()
    values = {
        "ca_file": tls.absolute("ca_file", optional=True),
        "artifact_keys": trust.texts("artifact_keys"),
        "health_directory": health.absolute("directory", optional=True),
        "health_timeout_s": health.number("timeout_s", 30.0, 0.1, 3600.0),
        "download": DownloadConfig(
            timeout_s=download.number("timeout_s", defaults.timeout_s, 0.1, 3600.0),
            deadline_s=download.number("deadline_s", defaults.deadline_s, 1.0, 7 * 86400.0),
            retries=int(download.number("retries", defaults.retries, 0, 100)),
            backoff_s=download.number("backoff_s", defaults.backoff_s, 0.0, 3600.0),
            backoff_ceiling_s=download.number(
                "backoff_ceiling_s", defaults.backoff_ceiling_s, 0.0, 3600.0
            ),
            stall_s=download.number("stall_s", defaults.stall_s, 0.1, 86400.0),
            stall_bytes=int(download.number("stall_bytes", defaults.stall_bytes, 1, 1 << 30)),
            spool_min_s=download.number("spool_min_s", defaults.spool_min_s, 0.0, 1e9),
            window_mib=int(download.number("window_mib", defaults.window_mib, 1, 64)),
        ),
        "scripts": _scripts(scripts),
        "server": _server(server),
        "modules": ModulesConfig(
            directories=modules.texts("directories") or ModulesConfig().directories,
            timeout_s=modules.number("timeout_s", ModulesConfig().timeout_s, 1.0, 7 * 86400.0),
        ),
    }
    for table in (tls, trust, health, download, scripts, modules, server):
        table.refuse_unknown()
    return values


def _scripts(table: _Table) -> ScriptsConfig:
    defaults = ScriptsConfig()
    return ScriptsConfig(
        directory=table.absolute("directory", optional=True) or defaults.directory,
        timeout_s=table.number("timeout_s", defaults.timeout_s, 0.1, 86400.0),
        retry_interval_s=table.number("retry_interval_s", defaults.retry_interval_s, 0.1, 86400.0),
        retry_window_s=table.number("retry_window_s", defaults.retry_window_s, 0.0, 7 * 86400.0),
    )


def _server(table: _Table) -> ServerConfig:
    if not table.names():
        return ServerConfig()
    defaults = ServerConfig()
    url = table.text("url").rstrip("/")
    if not url.startswith("https://"):
        raise ConfigError(f"{table.file}: server.url must begin with https://")
    kind = table.text("key_type", optional=True) or defaults.key_type
    if kind not in ("ed25519", "ecdsa", "rsa"):
        raise ConfigError(f"{table.file}: server.key_type must be ed25519, ecdsa or rsa")
    windows = table.texts("windows")
    from updater.device.windows import parse_window  # noqa: PLC0415

    for window in windows:
        try:
            parse_window(window)
        except ValueError as error:
            raise ConfigError(f"{table.file}: server.windows: {error}") from error
    return ServerConfig(
        url=url,
        tenant_token=table.text("tenant_token", optional=True),
        key_file=table.absolute("key_file", optional=True),
        key_uri=_key_uri(table),
        key_type=kind,
        identity=table.absolute("identity", optional=True) or defaults.identity,
        inventory=table.absolute("inventory", optional=True) or defaults.inventory,
        poll_s=table.number("poll_s", defaults.poll_s, 1.0, 30 * 86400.0),
        inventory_s=table.number("inventory_s", defaults.inventory_s, 1.0, 30 * 86400.0),
        retry_s=table.number("retry_s", defaults.retry_s, 0.1, 86400.0),
        timeout_s=table.number("timeout_s", defaults.timeout_s, 0.1, 3600.0),
        require_contact=table.flag("require_contact"),
        contact_budget_s=table.number("contact_budget_s", defaults.contact_budget_s, 1.0, 86400.0),
        windows=windows,
        reboot_command=table.texts("reboot_command") or defaults.reboot_command,
    )


def _key_uri(table: _Table) -> str:
    """Return where the key is in a PKCS#11 token, checked as far as that goes without it."""
    uri = table.text("key_uri", optional=True)
    if uri:
        if "key_file" in table.names():
            raise ConfigError(f"{table.file}: server has both a key_file and a key_uri")
        from updater.device.token_key import parse_uri  # noqa: PLC0415

        try:
            parse_uri(uri)
        except ConfigError as error:
            raise ConfigError(f"{table.file}: {error}") from error
    return uri


def _slots(table: _Table) -> tuple[Slot, Slot]:
    slots = []
    for name in table.names():
        entry = table.table(name)
        number = entry.number("number", None, 1, 255)
        if number != int(number):
            raise ConfigError(f"{table.file}: slots.{name}.number must be whole")
        slots.append(Slot(name, _device_path(entry), int(number)))
        entry.refuse_unknown()
    if len(slots) != 2:
        raise ConfigError(f"{table.file}: [slots] must name exactly two slots, not {len(slots)}")
    first, second = slots
    if first.device == second.device or first.number == second.number:
        raise ConfigError(f"{table.file}: both slots have the same device or number")
    return first, second


_BY = {
    "PARTUUID=": "/dev/disk/by-partuuid/",
    "PARTLABEL=": "/dev/disk/by-partlabel/",
    "UUID=": "/dev/disk/by-uuid/",
    "LABEL=": "/dev/disk/by-label/",
}


def _device_path(entry: _Table) -> str:
    """A path, or what names a partition as in fstab; then udev's links are followed."""
    text = entry.text("device")
    for prefix, directory in _BY.items():
        name = text.removeprefix(prefix)
        if name != text and name and "/" not in name:
            return directory + name
    return entry.absolute("device")


def _bootenv(table: _Table) -> BootEnvConfig:
    kind = table.text("kind")
    if kind == "uboot":
        config = BootEnvConfig(kind, table.absolute("fw_env_config"), ())
    elif kind == "grub":
        copies = table.texts("copies")
        if len(copies) != 2 or copies[0] == copies[1]:
            raise ConfigError(f"{table.file}: bootenv.copies must name two different files")
        config = BootEnvConfig(kind, "", copies)
    else:
        raise ConfigError(f'{table.file}: bootenv.kind must be "uboot" or "grub", not {kind!r}')
    table.refuse_unknown()
    return config


class _Table:
    """One TOML table that remembers which of its keys were asked for."""

    def __init__(self, file: str, prefix: str, values: dict[str, Any]) -> None:
        self.file = file
        self._prefix = prefix
        self._values = values
        self._known: set[str] = set()

    def names(self) -> list[str]:
        return list(self._values)

    def table(self, key: str, *, optional: bool = False) -> _Table:
        value = self._take(key, optional)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise ConfigError(f"{self.file}: {self._name(key)} must be a table")
        return _Table(self.file, self._name(key) + ".", value)

    def text(self, key: str, *, optional: bool = False) -> str:
        value = self._take(key, optional)
        if value is None:
            return ""
        if not isinstance(value, str) or not value or not value.isprintable():
            raise ConfigError(f"{self.file}: {self._name(key)} must be a non-empty string")
        return value

    def absolute(self, key: str, *, optional: bool = False) -> str:
        value = self.text(key, optional=optional)
        if value and not value.startswith("/"):
            raise ConfigError(f"{self.file}: {self._name(key)} must be an absolute path")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._take(key, optional=True)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise ConfigError(f"{self.file}: {self._name(key)} must be a list of strings")
        return tuple(value)

    def flag(self, key: str) -> bool:
        value = self._take(key, optional=True)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise ConfigError(f"{self.file}: {self._name(key)} must be true or false")
        return value

    def number(self, key: str, default: float | None, low: float, high: float) -> float:
        value = self._take(key, optional=default is not None)
        if value is None:
            assert default is not None
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.file}: {self._name(key)} must be a number")
        if not low <= value <= high:
            raise ConfigError(f"{self.file}: {self._name(key)} must be from {low} to {high}")
        return float(value)

    def refuse_unknown(self) -> None:
        for key in self._values:
            if key not in self._known:
                raise ConfigError(f"{self.file}: unknown key {self._name(key)!r}")

    def _take(self, key: str, optional: bool) -> Any:
        self._known.add(key)
        if key not in self._values and not optional:
            raise ConfigError(f"{self.file}: {self._name(key)} is missing")
        return self._values.get(key)

    def _name(self, key: str) -> str:
        return self._prefix + key
