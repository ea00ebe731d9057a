"""`updater server init`: a folder with everything a server needs, made once and never overwritten.

Authority, server certificate, secret, settings, database with its first admin; and the texts that
connect a device.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import NamedTuple

from updater.server import accounts
from updater.server.certificates import Authority, write_private
from updater.server.database import Database
from updater.server.errors import ServerError
from updater.server.models import User
from updater.server.settings import SETTINGS_NAME, Settings, load_settings

CA_NAME, CA_KEY_NAME = "ca.pem", "ca.key"

_SETTINGS = """\
# The update server's settings; every key and its default: updater/server/settings.py.
host = "{host}"
port = {port}
# public_url = "https://updates.example.com"   # in links; without it, what the device called us
certificate = "server.pem"
key = "server.key"
# Only artifacts that one of these public keys signed are taken; none: signatures aren't looked at.
artifact_keys = [{artifact_keys}]
# For PostgreSQL: database_url = "postgresql://user@host/name"
# For an S3-compatible store; the bucket must exist, and s3.key be readable by the server alone:
# artifacts = "s3://bucket/prefix"
# s3_endpoint = "https://s3.example.com"
# s3_region = "us-east-1"
# s3_access_key = "KEY"
# s3_secret = "s3.key"
# s3_ca = "s3.pem"    # if the system doesn't know its authority
"""

_DEVICE = """\
# Brownout's own client: set this in /etc/updater/updater.toml
[server]
url = "{url}"
[tls]
ca_file = "/etc/updater/server-ca.pem"      # a copy of {ca}

# Mender's client: /etc/mender/mender.conf
{{"ServerURL": "{url}", "ServerCertificate": "/etc/mender/server-ca.pem"}}
"""


_QEMU = """\
A QEMU device of this project calls this host {host}. In another terminal:

    make device

and at its prompt, pasted as it is (it restarts, and calls here from then on):

mkdir -p /data/etc
cat > /data/etc/server-ca.pem <<'END'
{ca}END
{{ sed 's|^ca_file = .*|ca_file = "/data/etc/server-ca.pem"|' /etc/updater/updater.toml; cat <<'END'
[server]
url = "https://{host}:{port}"
poll_s = 5
retry_s = 5
reboot_command = ["reboot", "-f"]
END
}} > /data/etc/updater.toml
sync; reboot -f

Then accept it on the web page. An update for it:

    .venv/bin/python -m images build qemu-arm64 --variant v2
    .venv/bin/updater artifact write rootfs-image -f build/qemu-arm64/rootfs-v2.img -n v2 \\
        -t qemu-arm64 -k build/keys/artifact.key -o build/v2.mender

uploaded and deployed on the web page.
"""


def qemu_device(ca: str, host: str, port: int) -> str:
    """How to connect a QEMU device that knows this host as `host`; `ca` is the authority's PEM."""
    return _QEMU.format(ca=ca, host=host, port=port)


class Made(NamedTuple):
    """What `init` made, for printing."""

    settings: Settings
    url: str
    fingerprint: str
    device_configuration: str
    admin_password: str


def initialise(
    folder: Path,
    names: list[str],
    port: int = 8443,
    host: str = "0.0.0.0",  # noqa: S104 - devices come over the network
    artifact_keys: list[Path] | None = None,
    database_url: str = "",
) -> Made:
    """Make `folder` for a server known by `names`. Raises ServerError if one is there already."""
    target = folder / SETTINGS_NAME
    if target.exists():
        raise ServerError(f"{target} exists; `updater server run {folder}` starts that server")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority = _authority(folder)
        chain, key = authority.server(names)
        for name, content in (
            ("server.key", key),
            ("secret.key", secrets.token_bytes(32)),
        ):
            (folder / name).unlink(missing_ok=True)
            write_private(folder / name, content)
        (folder / "server.pem").write_bytes(chain)
        url = f"https://{names[0]}:{port}"
        copied = []
        for number, source in enumerate(artifact_keys or []):
            (folder / f"artifact-key-{number}.pem").write_bytes(source.read_bytes())
            copied.append(f'"artifact-key-{number}.pem"')
        text = _SETTINGS.format(host=host, port=port, artifact_keys=", ".join(copied))
        if database_url:
            text += f'database_url = "{database_url}"\n'
        temporary = folder / f"{SETTINGS_NAME}.new"
        temporary.unlink(missing_ok=True)
        write_private(temporary, text.encode())
        settings = load_settings(temporary)
        password = secrets.token_urlsafe(12)
        _first_admin(settings, password)
        # Last: a folder without it is one that init may begin again.
        os.replace(temporary, target)  # noqa: PTH105 - the sentence reads better
    except OSError as error:
        raise ServerError(f"{error.filename or folder}: {error.strerror}") from error
    return Made(
        load_settings(target),
        url,
        authority.fingerprint(),
        _DEVICE.format(url=url, ca=folder / CA_NAME),
        password,
    )


def _authority(folder: Path) -> Authority:
    certificate, key = folder / CA_NAME, folder / CA_KEY_NAME
    if certificate.exists() and key.exists():
        return Authority.load(certificate, key)
    authority = Authority.create()
    key.unlink(missing_ok=True)
    write_private(key, authority.key_pem())
    certificate.write_bytes(authority.pem())
    return authority


def _first_admin(settings: Settings, password: str) -> None:
    database = Database(settings.database_url)
    hashed = accounts.hash_password(password)
    now = time.time()
    try:
        database.migrate()
        if not database.embedded:
            # A shared database may have its users already.
            if database.read_now(lambda s: s.query(User).count()):
                return
        else:
            database.write_now(lambda s: s.query(User).delete() and None)
        database.write_now(lambda s: accounts.create_user(s, "admin", hashed, "admin", "init", now))
    finally:
        database.close()
