"""The device's side of the management server's API, over HTTPS and nothing else.

Paths, bodies and status codes are those of Mender's public device API (prefix `/api/devices`): an
authentication request signed over its raw bytes, newline included; an opaque token; deployments in
version 2 with a way back to version 1; status, log and inventory. A 401 leads to a new token once;
429 and 503 become ServerErrors that say how long to wait. Answers are bounded in size and time.
"""

from __future__ import annotations

import http.client
import json
import ssl
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

from updater.device.config import ServerConfig
from updater.device.errors import ServerError, UpdaterError
from updater.device.transport import retry_after, tls_context

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from updater.device.identity import Key

_MAX_ANSWER_BYTES = 1024 * 1024
_MAX_LOG_BYTES = 900 * 1024
_V1 = "/api/devices/v1"
_V2 = "/api/devices/v2"
_DEPLOYMENTS = "deployments/device/deployments"


class AbortedError(UpdaterError):
    """The server has aborted the deployment."""


class Deployment(NamedTuple):
    """What the server wants installed; `control` is its update control map, if any."""

    id: str
    artifact_name: str
    device_types: tuple[str, ...]
    uri: str
    control: dict[str, Any]


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int
    body: bytes
    retry_after_s: float

    def json(self) -> Any:
        """Return the body's value; ServerError when it is none."""
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise ServerError(f"the server's answer is not JSON: {error}") from error


class DeviceApi:
    """One device's conversation with one server."""

    def __init__(
        self,
        config: ServerConfig,
        ca_file: str | None,
        key: Key,
        identity: str,
        before_tls: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._ca_file = ca_file
        self._key = key
        self._identity = identity
        self._before_tls = before_tls
        self._token = ""

    def authenticate(self) -> None:
        """Get a token; ServerError with status 401 while nobody has accepted the device."""
        request = {
            "id_data": self._identity,
            "pubkey": self._key.public_pem,
            "tenant_token": self._config.tenant_token,
        }
        body = json.dumps(request).encode() + b"\n"
        headers = {"X-MEN-Signature": self._key.sign(body)}
        if self._config.tenant_token:
            headers["Authorization"] = f"Bearer {self._config.tenant_token}"
        path = f"{_V1}/authentication/auth_requests"
        answer = self._send("POST", path, body, headers)
        if answer.status == 401:
            raise ServerError(
                "the server has not accepted this device (pending or rejected)", status=401
            )
        self._expect(answer, "authentication", 200)
        token = answer.body.decode("ascii", "replace").strip()
        if not token or not token.isprintable() or " " in token:
            raise ServerError("the server accepts the device but its token is malformed")
        self._token = token

    def send_inventory(self, attributes: list[dict[str, object]]) -> None:
        """Replace the device's inventory."""
        path = f"{_V1}/inventory/device/attributes"
        answer = self._call("PUT", path, attributes)
        if answer.status == 405:
            answer = self._call("PATCH", path, attributes)
        self._expect(answer, "inventory", 200, 204)

    def next_deployment(self, provides: Mapping[str, str]) -> Deployment | None:
        """Ask for work; `provides` holds artifact_name and device_type among others."""
        wanted = {"device_provides": dict(provides), "update_control_map": True}
        answer = self._call("POST", f"{_V2}/{_DEPLOYMENTS}/next", wanted)
        if answer.status in (404, 405):
            query = "&".join(
                f"{key}={quote(provides.get(key, ''), safe='')}"
                for key in ("artifact_name", "device_type")
            )
            answer = self._call("GET", f"{_V1}/{_DEPLOYMENTS}/next?{query}")
        self._expect(answer, "deployments", 200, 204)
        if answer.status == 204:
            return None
        return _deployment(answer.json())

    def report(self, deployment: str, status: str, substate: str = "") -> None:
        """Tell how far it is; AbortedError when the server does not want it any more."""
        value = {"status": status, **({"substate": substate[:200]} if substate else {})}
        answer = self._call("PUT", f"{_V1}/{_DEPLOYMENTS}/{_id(deployment)}/status", value)
        if answer.status == 409:
            raise AbortedError("the server has aborted the deployment")
        self._expect(answer, "status", 200, 204)

    def send_log(self, deployment: str, messages: list[dict[str, str]]) -> None:
        """Upload the log; the newest lines if it is too long."""
        size = 0
        kept: list[dict[str, str]] = []
        for message in reversed(messages):
            size += len(json.dumps(message)) + 1
            if size > _MAX_LOG_BYTES:
                break
            kept.append(message)
        value = {"messages": kept[::-1]}
        answer = self._call("PUT", f"{_V1}/{_DEPLOYMENTS}/{_id(deployment)}/log", value)
        self._expect(answer, "log", 200, 204)

    def control_map(self, deployment: str) -> dict[str, Any]:
        """Return the deployment's update control map as it is now; empty when there is none."""
        path = f"{_V2}/{_DEPLOYMENTS}/{_id(deployment)}/update_control_map"
        answer = self._call("GET", path)
        if answer.status in (204, 404, 405):
            return {}
        self._expect(answer, "update control", 200)
        value = answer.json()
        return _control(value.get("update_control_map", value) if isinstance(value, dict) else {})

    def _expect(self, answer: Answer, what: str, *statuses: int) -> None:
        if answer.status not in statuses:
            raise ServerError(
                f"{self._config.url}: {what}: the server answered {answer.status}"
                f"{_reason(answer.body)}",
                status=answer.status,
                retry_after_s=answer.retry_after_s,
            )

    def _call(self, method: str, path: str, value: object = None) -> Answer:
        """Call with a token; when it is not (or no longer) valid, get a new one, once."""
        body = b"" if value is None else json.dumps(value).encode()
        fresh = not self._token
        if fresh:
            self.authenticate()
        answer = self._send(method, path, body, {"Authorization": f"Bearer {self._token}"})
        if answer.status == 401 and not fresh:
            self._token = ""
            self.authenticate()
            answer = self._send(method, path, body, {"Authorization": f"Bearer {self._token}"})
        if answer.status == 401:
            self._token = ""
        return answer

    def _send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        self._before_tls()
        parts = urlsplit(self._config.url)
        connection = http.client.HTTPSConnection(
            parts.hostname or "",
            parts.port or 443,
            timeout=self._config.timeout_s,
            context=tls_context(self._ca_file),
        )
        if body:
            headers = {"Content-Type": "application/json", **headers}
        try:
            connection.request(method, parts.path + path, body or None, headers)
            response = connection.getresponse()
            content = response.read(_MAX_ANSWER_BYTES + 1)
            if len(content) > _MAX_ANSWER_BYTES:
                raise ServerError(f"{self._config.url}: an answer of more than 1 MiB")
            return Answer(response.status, content, retry_after(response))
        except ssl.SSLCertVerificationError as error:
            raise ServerError(
                f"{self._config.url}: the server's certificate is not trusted:"
                f" {error.verify_message}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ServerError(f"{self._config.url}: cannot be reached: {cause}") from error
        finally:
            connection.close()


def _id(deployment: str) -> str:
    return quote(deployment, safe="")


def _reason(body: bytes) -> str:
    try:
        reason = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return ""
    text = "".join(char for char in str(reason)[:200] if char.isprintable())
    return f" ({text})"


def _deployment(value: Any) -> Deployment:
    try:
        artifact = value["artifact"]
        names = artifact.get("device_types_compatible") or []
        texts = (value["id"], artifact["artifact_name"], artifact["source"]["uri"], *names)
    except (KeyError, TypeError, AttributeError) as error:
        raise ServerError(f"the server's deployment is malformed: {error}") from error
    if not all(isinstance(text, str) and text and text.isprintable() for text in texts):
        raise ServerError("the server's deployment is malformed: a field is no text")
    identifier, name, uri, *types = texts
    return Deployment(
        identifier, name, tuple(types), uri, _control(value.get("update_control_map"))
    )


def _control(value: Any) -> dict[str, Any]:
    states = value.get("states") if isinstance(value, dict) else None
    return states if isinstance(states, dict) else {}
