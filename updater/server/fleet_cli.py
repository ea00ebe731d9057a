"""`updater server fleet …`: everything that the management API can do, from a shell.

Speaks the API over TLS, with the token in --token-file or $UPDATER_SERVER_TOKEN. What is listed or
shown is JSON, as the API has it; what is made prints its id alone, for scripts. A test runs every
command and compares the routes that were called with the API's description, so none is forgotten.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from updater.server.errors import ServerError

_ROLES = click.Choice(["viewer", "operator", "admin"])
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WINDOW = re.compile(
    r"^((?P<days>[a-z,-]+)\s+)?(?P<start>\d\d:\d\d)-(?P<end>\d\d:\d\d)(\s+(?P<zone>\S+))?$",
    re.IGNORECASE,
)
_OPERATORS = (("!=", "!="), ("^=", "prefix"), ("=", "="))
_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_WHERE_HELP = "NAME=VALUE, NAME!=VALUE, NAME^=BEGINNING, NAME (is there) or !NAME (isn't)."


class Api:
    """The management API of one server."""

    def __init__(self, url: str, ca: Path | None, token: str) -> None:
        import ssl  # noqa: PLC0415

        import httpx  # noqa: PLC0415

        try:
            context = ssl.create_default_context(cafile=str(ca) if ca else None)
        except OSError as error:
            raise ServerError(f"{ca}: not a usable authority: {error}") from error
        self._client = httpx.Client(
            base_url=url,
            verify=context,
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(30.0, read=600.0),
        )

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def call(self, method: str, path: str, **kwargs: Any) -> Any:
        """Send a request; return its answer's JSON. Raises ServerError with the server's words."""
        import httpx  # noqa: PLC0415

        try:
            response = self._client.request(method, f"/api/management/v1{path}", **kwargs)
        except httpx.HTTPError as error:
            raise ServerError(f"{self._client.base_url}: {error}") from error
        if response.status_code >= 400:
            try:
                message = response.json()["error"]
            except (ValueError, KeyError, TypeError):
                message = f"HTTP {response.status_code}"
            raise ServerError(str(message))
        return response.json() if response.content else None


def conditions(texts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read the texts of --where as the API's conditions. Raises ServerError."""
    found: list[dict[str, Any]] = []
    for text in texts:
        for sign, operator in _OPERATORS:
            attribute, there, value = text.partition(sign)
            if there and attribute and value:
                found.append({"attribute": attribute, "operator": operator, "values": [value]})
                break
        else:
            missing = text.startswith("!")
            if not text.strip("!") or "=" in text:
                raise ServerError(f"--where {text}: write NAME=VALUE")
            found.append(
                {"attribute": text.lstrip("!"), "operator": "missing" if missing else "exists"}
            )
    return found


def window(text: str) -> dict[str, Any]:
    """Read `[mon-fri,sun] 22:00-04:30 [Europe/Berlin]` as the API's window. Raises ServerError."""
    match = _WINDOW.match(text.strip())
    if match is None:
        raise ServerError(f"--window {text}: write it like 'mon-fri 22:00-04:30 Europe/Berlin'")
    result: dict[str, Any] = {"start": match["start"], "end": match["end"]}
    if match["zone"]:
        result["timezone"] = match["zone"]
    if match["days"]:
        days: list[int] = []
        for part in match["days"].lower().split(","):
            first, dash, last = part.partition("-")
            if first not in _DAYS or (dash and last not in _DAYS):
                raise ServerError(f"--window {text}: the days are {', '.join(_DAYS)}")
            begin = _DAYS.index(first)
            length = (_DAYS.index(last) - begin) % 7 if dash else 0
            days += [(begin + more) % 7 for more in range(length + 1)]
        result["days"] = sorted(set(days))
    return result


def _print(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


@click.group()
@click.option("--url", envvar="UPDATER_SERVER_URL", default="https://localhost:8443")
@click.option("--ca", envvar="UPDATER_SERVER_CA", type=click.Path(path_type=Path))
@click.option("--token-file", type=_FILE)
@click.option("--token", envvar="UPDATER_SERVER_TOKEN", default="", hidden=True)
@click.pass_context
def fleet(
    context: click.Context, url: str, ca: Path | None, token_file: Path | None, token: str
) -> None:
    """Manage devices, artifacts and deployments of a running server."""
    secret = token_file.read_text().strip() if token_file else token
    if not secret:
        raise ServerError("no token: give --token-file or set UPDATER_SERVER_TOKEN")
    context.obj = api = Api(url, ca, secret)
    context.call_on_close(api.close)


@fleet.command("devices")
@click.option("--status", type=click.Choice(["pending", "accepted", "rejected", "preauthorized"]))
@click.option("--group", help="Only those in this group.")
@click.option("--where", multiple=True, metavar="CONDITION", help=_WHERE_HELP)
@click.pass_obj
def devices(api: Api, status: str | None, group: str | None, where: tuple[str, ...]) -> None:
    """List devices."""
    if group and where:
        raise ServerError("give --group or --where")
    wanted = conditions(where)
    if status and not group:
        wanted.append({"attribute": "status", "operator": "=", "values": [status]})
    found: list[Any] = []
    after: str | None = ""
    while after is not None:
        params: dict[str, Any] = {"after": after, "limit": 500}
        if group:
            params |= {"group": group} | ({"status": status} if status else {})
            page = api.call("GET", "/devices", params=params)
        else:
            page = api.call("POST", "/devices/search", params=params, json=wanted)
        found += page["devices"]
        after = page["next"]
    _print(found)


@fleet.command("device")
@click.argument("device_id")
@click.pass_obj
def device(api: Api, device_id: str) -> None:
    """Show a device: its keys, inventory, groups and history."""
    _print(api.call("GET", f"/devices/{device_id}"))


@fleet.command("accept")
@click.argument("device_ids", nargs=-1, required=True)
@click.option("--key", metavar="KEY-ID", help="Which of its keys; default: the newest that waits.")
@click.pass_obj
def accept(api: Api, device_ids: tuple[str, ...], key: str | None) -> None:
    """Accept pending devices; for one that has a key already, rotate to its new one."""
    _with_key(api, "accept", device_ids, key)


@fleet.command("reject")
@click.argument("device_ids", nargs=-1, required=True)
@click.option("--key", metavar="KEY-ID", help="Reject only this one of its keys.")
@click.pass_obj
def reject(api: Api, device_ids: tuple[str, ...], key: str | None) -> None:
    """Reject devices; their tokens stop at once."""
    _with_key(api, "reject", device_ids, key)


def _with_key(api: Api, verb: str, device_ids: tuple[str, ...], key: str | None) -> None:
    if key and len(device_ids) > 1:
        raise ServerError("--key is a key of one device")
    for device_id in device_ids:
        body = {"json": {"key_id": key}} if key else {}
        api.call("POST", f"/devices/{device_id}/{verb}", **body)


@fleet.command("preauthorize")
@click.argument("public_key", type=_FILE)
@click.option(
    "--identity", multiple=True, required=True, metavar="NAME=VALUE", help="As the device says it."
)
@click.pass_obj
def preauthorize(api: Api, public_key: Path, identity: tuple[str, ...]) -> None:
    """Accept a device with the key PUBLIC_KEY (PEM) before it first calls; prints its id."""
    pairs = [text.partition("=") for text in identity]
    if not all(name and sign for name, sign, _ in pairs):
        raise ServerError("--identity: write NAME=VALUE")
    body = {
        "identity": {name: value for name, _, value in pairs},
        "pubkey": public_key.read_text(errors="replace"),
    }
    click.echo(api.call("POST", "/devices", json=body)["id"])


@fleet.command("decommission")
@click.argument("device_ids", nargs=-1, required=True)
@click.pass_obj
def decommission(api: Api, device_ids: tuple[str, ...]) -> None:
    """Forget devices."""
    for device_id in device_ids:
        api.call("DELETE", f"/devices/{device_id}")


@fleet.command("statistics")
@click.pass_obj
def statistics(api: Api) -> None:
    """Count devices and deployments by status."""
    _print(api.call("GET", "/statistics"))


@fleet.group("group")
def group() -> None:
    """Groups of devices, static or by their inventory."""


@group.command("list")
@click.pass_obj
def group_list(api: Api) -> None:
    """List the groups with their sizes."""
    _print(api.call("GET", "/groups"))


@group.command("create")
@click.argument("name")
@click.option("--where", multiple=True, metavar="CONDITION", help=_WHERE_HELP)
@click.pass_obj
def group_create(api: Api, name: str, where: tuple[str, ...]) -> None:
    """Make a group; with --where it is dynamic: whoever matches is in it. Prints its id."""
    body = {"name": name, **({"filter": conditions(where)} if where else {})}
    click.echo(api.call("POST", "/groups", json=body)["id"])


@group.command("change")
@click.argument("name")
@click.option("--add", multiple=True, metavar="DEVICE-ID")
@click.option("--remove", multiple=True, metavar="DEVICE-ID")
@click.pass_obj
def group_change(api: Api, name: str, add: tuple[str, ...], remove: tuple[str, ...]) -> None:
    """Put devices into a static group and take others out."""
    body = {"add": list(add), "remove": list(remove)}
    api.call("PATCH", f"/groups/{_quoted(name)}/devices", json=body)


@group.command("delete")
@click.argument("name")
@click.pass_obj
def group_delete(api: Api, name: str) -> None:
    """Delete a group; its devices stay."""
    api.call("DELETE", f"/groups/{_quoted(name)}")


@fleet.command("upload")
@click.argument("file", type=_FILE)
@click.pass_obj
def upload(api: Api, file: Path) -> None:
    """Upload an artifact; prints its id."""
    from rich.progress import open as open_with_progress  # noqa: PLC0415

    size = file.stat().st_size
    with open_with_progress(file, "rb", description=file.name, transient=True) as source:
        made = api.call(
            "POST",
            "/artifacts",
            content=iter(lambda: source.read(1 << 20), b""),
            headers={"Content-Type": "application/octet-stream", "Content-Length": str(size)},
        )
    click.echo(made["id"])


@fleet.command("artifacts")
@click.option("--name", help="Only those of this name.")
@click.pass_obj
def artifacts(api: Api, name: str | None) -> None:
    """List artifacts, newest first."""
    _print(api.call("GET", "/artifacts", params={"limit": 500, **({"name": name} if name else {})}))


@fleet.command("artifact")
@click.argument("artifact_id")
@click.pass_obj
def artifact(api: Api, artifact_id: str) -> None:
    """Show what an artifact says about itself."""
    _print(api.call("GET", f"/artifacts/{artifact_id}"))


@fleet.command("delete-artifact")
@click.argument("artifact_id")
@click.pass_obj
def delete_artifact(api: Api, artifact_id: str) -> None:
    """Delete an artifact that no deployment needs."""
    api.call("DELETE", f"/artifacts/{artifact_id}")


@fleet.command("deploy")
@click.argument("artifact_name")
@click.option("--name", help="Default: the artifact's name.")
@click.option("--device", "device_ids", multiple=True, metavar="ID")
@click.option("--group")
@click.option("--where", multiple=True, metavar="CONDITION", help=_WHERE_HELP)
@click.option("--all", "everything", is_flag=True)
@click.option("--phase", "phases", multiple=True, metavar="10%|5", help="Size of a phase; repeat.")
@click.option("--max-failures", type=click.FloatRange(0, 100), default=100.0, metavar="PERCENT")
@click.option("--retries", type=click.IntRange(0, 20), default=0)
@click.option("--stall-timeout", type=click.FloatRange(1), metavar="SECONDS")
@click.option("--starts-at", metavar="TIME", help="ISO 8601 with its offset; default: now.")
@click.option("--duration", type=click.FloatRange(1), metavar="SECONDS", help="Ends after this.")
@click.option(
    "--window",
    "window_text",
    metavar="TEXT",
    help="When devices may start, e.g. 'mon-fri 22:00-04:30 Europe/Berlin'.",
)
@click.option("--control-map", type=_FILE, help="An update control map, as JSON.")
@click.pass_obj
def deploy(
    api: Api,
    artifact_name: str,
    name: str | None,
    device_ids: tuple[str, ...],
    group: str | None,
    where: tuple[str, ...],
    everything: bool,
    phases: tuple[str, ...],
    max_failures: float,
    retries: int,
    stall_timeout: float | None,
    starts_at: str | None,
    duration: float | None,
    window_text: str | None,
    control_map: Path | None,
) -> None:
    """Deploy an artifact; prints the deployment's id."""
    given: dict[str, Any] = {
        "devices": list(device_ids),
        "group": group,
        "filter": conditions(where),
        "all": everything,
    }
    rules: list[dict[str, Any]] = []
    for text in phases:
        number = text.removesuffix("%")
        try:
            rules.append(
                {"percent": float(number)} if text.endswith("%") else {"count": int(number)}
            )
        except ValueError as error:
            raise ServerError(f"--phase {text}: write 10% or 5") from error
    optional = {
        "stall_timeout_s": stall_timeout,
        "starts_at": starts_at,
        "duration_s": duration,
        "window": window(window_text) if window_text else None,
        "update_control_map": _json(control_map) if control_map else None,
    }
    made = api.call(
        "POST",
        "/deployments",
        json={
            "name": name or artifact_name,
            "artifact_name": artifact_name,
            "target": {key: value for key, value in given.items() if value},
            "phases": [*rules, {}],
            "max_failure_percent": max_failures,
            "retries": retries,
            **{key: value for key, value in optional.items() if value is not None},
        },
    )
    click.echo(made["id"])


@fleet.command("deployments")
@click.option(
    "--status",
    type=click.Choice(["scheduled", "running", "paused", "finished", "stopped", "aborted"]),
)
@click.pass_obj
def deployments(api: Api, status: str | None) -> None:
    """List deployments, newest first."""
    params = {"limit": 500, **({"status": status} if status else {})}
    _print(api.call("GET", "/deployments", params=params))


@fleet.command("deployment")
@click.argument("deployment_id")
@click.option("--devices", "with_devices", is_flag=True, help="Its devices instead.")
@click.pass_obj
def deployment(api: Api, deployment_id: str, with_devices: bool) -> None:
    """Show a deployment, or its devices."""
    if not with_devices:
        _print(api.call("GET", f"/deployments/{deployment_id}"))
        return
    found: list[Any] = []
    while True:
        params = {"after": found[-1]["number"] if found else 0, "limit": 500}
        page = api.call("GET", f"/deployments/{deployment_id}/devices", params=params)
        found += page
        if len(page) < 500:
            break
    _print(found)


@fleet.command("abort")
@click.argument("deployment_id")
@click.pass_obj
def abort(api: Api, deployment_id: str) -> None:
    """Abort a deployment."""
    api.call("POST", f"/deployments/{deployment_id}/abort")


@fleet.command("pause")
@click.argument("deployment_id")
@click.pass_obj
def pause(api: Api, deployment_id: str) -> None:
    """Let no more devices of a deployment start."""
    api.call("POST", f"/deployments/{deployment_id}/pause")


@fleet.command("resume")
@click.argument("deployment_id")
@click.pass_obj
def resume(api: Api, deployment_id: str) -> None:
    """Go on with a paused deployment."""
    api.call("POST", f"/deployments/{deployment_id}/resume")


@fleet.command("log")
@click.argument("deployment_id")
@click.argument("device_id")
@click.pass_obj
def log(api: Api, deployment_id: str, device_id: str) -> None:
    """Print the log that a device sent."""
    found = api.call("GET", f"/deployments/{deployment_id}/devices/{device_id}/log")
    for message in found["messages"]:
        click.echo(f"{message['timestamp']} {message['level']:7} {message['message']}")


@fleet.command("audit")
@click.pass_obj
def audit(api: Api) -> None:
    """Show the latest changes."""
    _print(api.call("GET", "/audit"))


@fleet.group("user")
def user() -> None:
    """Users and their roles; for an admin."""


@user.command("list")
@click.pass_obj
def user_list(api: Api) -> None:
    """List the users."""
    _print(api.call("GET", "/users"))


@user.command("add")
@click.argument("name")
@click.option("--role", type=_ROLES, default="viewer", show_default=True)
@click.option("--password-file", type=_FILE, help="Instead of being asked for it.")
@click.pass_obj
def user_add(api: Api, name: str, role: str, password_file: Path | None) -> None:
    """Add a user; prints the id."""
    body = {"name": name, "role": role, "password": _password(password_file)}
    click.echo(api.call("POST", "/users", json=body)["id"])


@user.command("change")
@click.argument("name")
@click.option("--role", type=_ROLES)
@click.option("--new-password", is_flag=True, help="Ask for a new password.")
@click.option("--password-file", type=_FILE, help="Take the new password from there.")
@click.pass_obj
def user_change(
    api: Api, name: str, role: str | None, new_password: bool, password_file: Path | None
) -> None:
    """Change a user's role or password."""
    body: dict[str, str] = {"role": role} if role else {}
    if new_password or password_file:
        body["password"] = _password(password_file)
    if not body:
        raise ServerError("nothing to change: give --role, --new-password or --password-file")
    api.call("PATCH", f"/users/{_quoted(name)}", json=body)


@user.command("delete")
@click.argument("name")
@click.pass_obj
def user_delete(api: Api, name: str) -> None:
    """Delete a user."""
    api.call("DELETE", f"/users/{_quoted(name)}")


@fleet.group("token")
def token() -> None:
    """Your own API tokens."""


@token.command("list")
@click.pass_obj
def token_list(api: Api) -> None:
    """List them, without their secrets."""
    _print(api.call("GET", "/tokens"))


@token.command("create")
@click.argument("label")
@click.option("--days", type=click.IntRange(1, 3650), default=365, show_default=True)
@click.pass_obj
def token_create(api: Api, label: str, days: int) -> None:
    """Make one; prints it, this once."""
    click.echo(api.call("POST", "/tokens", json={"label": label, "days": days})["token"])


@token.command("revoke")
@click.argument("token_id")
@click.pass_obj
def token_revoke(api: Api, token_id: str) -> None:
    """Revoke one; an admin may revoke anybody's."""
    api.call("DELETE", f"/tokens/{token_id}")


def _password(file: Path | None) -> str:
    if file is not None:
        return file.read_text().rstrip("\n")
    asked: str = click.prompt("Password", hide_input=True, confirmation_prompt=True)
    return asked


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ServerError(f"{path}: not valid JSON: {error}") from error


def _quoted(name: str) -> str:
    from urllib.parse import quote  # noqa: PLC0415

    return quote(name, safe="")
