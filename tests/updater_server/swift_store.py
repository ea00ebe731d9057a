"""A real S3-compatible object store: OpenStack Swift with its S3 API, in a folder of its own.

Proxy, account, container and object server, each a process, one replica, on the loopback; the
proxy speaks TLS with a certificate of the test's own. From OpenStack's "Swift All In One" guide and
the s3api middleware's text. Swift is a dependency of the tests only (`.ci/bootstrap tests` makes
its environment, build/peers/swift); it keeps objects in files with extended attributes, so the
folder's file system must have those.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from updater.server.certificates import Authority

PROGRAMS = Path(__file__).parents[2] / "build" / "peers" / "swift" / "bin"
ACCESS_KEY = "test:tester"
SECRET = "testing"
START_TIMEOUT_S = 60.0

_COMMON = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
disable_fallocate = true
log_level = WARNING
"""
_SERVER = """
[pipeline:main]
pipeline = {kind}-server

[app:{kind}-server]
use = egg:swift#{kind}
"""
_PROXY = """\
cert_file = {folder}/server.pem
key_file = {folder}/server.key

[pipeline:main]
pipeline = catch_errors s3api tempauth bulk slo dlo proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true

[filter:catch_errors]
use = egg:swift#catch_errors

[filter:s3api]
use = egg:swift#s3api
location = us-east-1
s3_acl = false

[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin

[filter:bulk]
use = egg:swift#bulk

[filter:slo]
use = egg:swift#slo

[filter:dlo]
use = egg:swift#dlo
"""
_SWIFT = """\
[swift-hash]
swift_hash_path_prefix = brownout
swift_hash_path_suffix = brownout

[storage-policy:0]
name = one
default = yes
"""
# As `swift-ring-builder create, add, rebalance` for each, in one process.
_RINGS = """
import sys
from swift.common.ring import RingBuilder
for text in sys.argv[2:]:
    kind, port = text.split(":")
    builder = RingBuilder(6, 1, 0)
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1, "ip": "127.0.0.1",
                     "port": int(port), "device": "d1", "meta": ""})
    builder.rebalance()
    builder.get_ring().save(f"{sys.argv[1]}/{kind}.ring.gz")
"""


def why_not() -> str:
    """Why Swift can't run here; empty if it can."""
    if not (PROGRAMS.parent / ".complete").exists():
        return "OpenStack Swift is not there (.ci/bootstrap tests makes it)"
    with tempfile.NamedTemporaryFile() as file:
        try:
            os.setxattr(file.name, "user.swift", b"1")
        except OSError as error:
            return f"Swift needs extended attributes: {error.strerror}"
    return ""


class Swift:
    """The running store. `url` is its S3 endpoint, `ca` the authority of its certificate."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="swift."))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = {kind: _free_port() for kind in ("object", "container", "account", "proxy")}
        self.url = f"https://localhost:{self._ports['proxy']}"
        self.ca = self.folder / "ca.pem"
        try:
            self._prepare()
            self.start()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        authority = Authority.create("object store")
        self.ca.write_bytes(authority.pem())
        chain, key = authority.server(["localhost"])
        (self.folder / "server.pem").write_bytes(chain)
        (self.folder / "server.key").write_bytes(key)
        (self.folder / "swift.conf").write_text(_SWIFT)
        (self.folder / "devices" / "d1").mkdir(parents=True)
        values = {"folder": self.folder, "user": _user()}
        for kind, port in self._ports.items():
            text = _COMMON.format(port=port, **values)
            text += _PROXY.format(**values) if kind == "proxy" else _SERVER.format(kind=kind)
            (self.folder / f"{kind}.conf").write_text(text)
        rings = [f"{kind}:{port}" for kind, port in self._ports.items() if kind != "proxy"]
        done = subprocess.run(
            [PROGRAMS / "python", "-c", _RINGS, self.folder, *rings],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        """Start what does not run; returns once all of it accepts connections."""
        for kind in self._ports:
            if kind not in self._processes:
                log = (self.folder / f"{kind}.log").open("ab")
                with log:
                    self._processes[kind] = subprocess.Popen(
                        [PROGRAMS / f"swift-{kind}-server", self.folder / f"{kind}.conf", "-v"],
                        stdout=log,
                        stderr=log,
                        env={**os.environ, "SWIFT_DIR": str(self.folder)},
                    )
        end = time.monotonic() + START_TIMEOUT_S
        for kind, port in self._ports.items():
            while True:
                assert self._processes[kind].poll() is None, self._words(kind)
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert time.monotonic() < end, self._words(kind)
                time.sleep(0.05)

    def stop(self) -> None:
        """Take it away; what it acknowledged stays in its folder."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        self._processes.clear()

    def close(self) -> None:
        """End it and remove its folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _words(self, kind: str) -> str:
        return (self.folder / f"{kind}.log").read_text(errors="replace")[-3000:]


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def swift() -> Iterator[Swift]:
    """Swift, while the context lasts."""
    running = Swift()
    try:
        ssl.create_default_context(cafile=str(running.ca))
        yield running
    finally:
        running.close()
