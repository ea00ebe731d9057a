"""The bench's HTTP server: REST relays, Shelly plugs, the recovery lines, and its own control.

Paths, `N` being a board's number:

    GET, PUT /rest/N            0 or 1 (labgrid's `rest`)
    GET /simple/N[/0|1]         0 or 1 (labgrid's `simplerest`)
    GET, POST /relay/N          Shelly's first generation: `turn=on`, answered with `ison`
    POST /rpc                   Shelly's second: Switch.Set and Switch.GetStatus
    GET, PUT /recovery/N        `restore` puts the golden image back, `ready` ends that
    GET /control                facts of all boards (JSON)
    POST /control/N/ACTION      pull-out, plug-in, weld, unweld, hang, unhang
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

from labgrid.driver.exception import ExecutionError

from framework.targets.bench.board import BenchBoard

__all__ = ["ACTIONS", "HttpHeads", "serve_http"]

_LONGEST_BODY = 4096

ACTIONS: dict[str, Callable[[BenchBoard], None]] = {
    "pull-out": lambda board: board.serial.pull_out(),
    "plug-in": lambda board: board.serial.plug_in(),
    "weld": lambda board: board.weld(True),
    "unweld": lambda board: board.weld(False),
    "hang": lambda board: board.hangs.set(),
    "unhang": lambda board: board.hangs.clear(),
}
"""What can be done to a board from outside, to see what a rig makes of it."""

Answer = tuple[int, str]


class HttpHeads(ThreadingHTTPServer):
    """The server; `boards` by number."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, boards: Mapping[int, BenchBoard], port: int = 0) -> None:
        self.boards = boards
        self._recovered: dict[int, bool] = {}
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in the middle is no news."""

    def answer(self, method: str, path: str, body: str) -> Answer:
        """What a request does and gets."""
        if path == "/rpc":
            return self._rpc(body)
        if path == "/control":
            return 200, json.dumps([board.facts() for board in self.boards.values()])
        match = re.fullmatch(r"/(rest|simple|relay|recovery|control)/(\d+)(?:/([\w-]+))?", path)
        board = self.boards.get(int(match[2])) if match else None
        if match is None or board is None:
            return 404, "no such thing"
        kind, what = match[1], match[3]
        if kind == "rest" and method == "PUT":
            what = body
        if kind == "relay":
            return self._shelly(method, board, body)
        if kind == "recovery":
            return self._recovery(method, board, body)
        if kind == "control":
            if method != "POST" or what not in ACTIONS:
                return 404, "no such action"
            ACTIONS[what](board)
            return 200, json.dumps(board.facts())
        if what in ("0", "1"):
            board.switch(what == "1")
        elif what is not None:
            return 400, "0 or 1"
        return 200, str(int(board.relay()))

    def _shelly(self, method: str, board: BenchBoard, body: str) -> Answer:
        turn = parse_qs(body).get("turn", [""])[0]
        if method == "POST" and turn in ("on", "off"):
            board.switch(turn == "on")
        return 200, json.dumps({"ison": board.relay(), "source": "http"})

    def _rpc(self, body: str) -> Answer:
        try:
            asked = json.loads(body)
            method, parameters = asked["method"], asked["params"]
            board = self.boards[int(parameters["id"])]  # labgrid sends it as a text
        except (ValueError, KeyError, TypeError):
            return 400, "no such switch"
        was = board.relay()
        if method == "Switch.Set":
            board.switch(bool(parameters["on"]))
            result: dict[str, Any] = {"was_on": was}
        else:
            result = {"id": board.number, "output": was}
        return 200, json.dumps({"id": asked.get("id"), "src": "shellyplus1", "result": result})

    def _recovery(self, method: str, board: BenchBoard, body: str) -> Answer:
        if method == "PUT":
            if body == "restore":
                try:
                    board.recover()
                except ExecutionError as error:
                    return 409, str(error.msg)
            elif body != "ready":
                return 400, "restore or ready"
            self._recovered[board.number] = body == "restore"
        return 200, "restore" if self._recovered.get(board.number) else "ready"


class _Handler(BaseHTTPRequestHandler):
    server: HttpHeads
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        length = min(int(self.headers.get("Content-Length") or 0), _LONGEST_BODY)
        body = self.rfile.read(length).decode(errors="replace")
        try:
            status, text = self.server.answer(self.command, self.path.rstrip("/"), body)
        except Exception as error:  # noqa: BLE001 - a head that fails says so to its client
            status, text = 500, f"{type(error).__name__}: {error}"
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = _serve  # noqa: N815 - the library's names

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Nothing: labgrid's exporter and tests say what they do."""


def serve_http(boards: Mapping[int, BenchBoard]) -> HttpHeads:
    """Start the server on any free port of the loopback."""
    server = HttpHeads(boards)
    threading.Thread(target=server.serve_forever, name="http heads", daemon=True).start()
    return server
