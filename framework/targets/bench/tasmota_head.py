"""The bench's Tasmota plugs: MQTT clients that obey `cmnd/plugN/POWER` and tell `stat/plugN/POWER`.

As Tasmota does: an empty command asks for the state, `tele/plugN/LWT` is retained and says Online
(or, by the client's will, Offline). The plugs are set up with `PowerRetain 1`, as ours for labgrid
have to be: its driver may ask before the broker has its subscription, and an answer that is not
retained is lost then. The source is Tasmota's documentation of its MQTT interface and commands.
"""

from __future__ import annotations

import threading
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from framework.targets.bench.board import BenchBoard
from framework.targets.errors import RigError

__all__ = ["TasmotaPlug"]

_CONNECT_S = 10.0


class TasmotaPlug:
    """One plug, connected to a broker until `close()`."""

    def __init__(self, board: BenchBoard, broker: str) -> None:
        self._board = board
        name = f"plug{board.number}"
        self._command, self._status = f"cmnd/{name}/POWER", f"stat/{name}/POWER"
        self._alive = f"tele/{name}/LWT"
        self._ready = threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2)
        self._client.will_set(self._alive, "Offline", retain=True)
        self._client.on_connect = self._connected
        self._client.on_message = self._told
        self._client.connect(broker)
        self._client.loop_start()
        if not self._ready.wait(_CONNECT_S):
            raise RigError(f"the MQTT broker at {broker} took no client within {_CONNECT_S:g} s")

    def _connected(self, client: mqtt.Client, *_: Any) -> None:
        client.subscribe(self._command)
        client.publish(self._alive, "Online", retain=True)
        self._ready.set()

    def _told(self, client: mqtt.Client, _: Any, message: mqtt.MQTTMessage) -> None:
        """A command; carried out on a thread, so that one that hangs leaves the plug connected."""
        wanted = message.payload.decode(errors="replace").upper()

        def obey() -> None:
            if wanted in ("ON", "OFF", "1", "0"):
                self._board.switch(wanted in ("ON", "1"))
            state = "ON" if self._board.relay() else "OFF"
            client.publish(self._status, state, retain=True)

        threading.Thread(target=obey, name="tasmota", daemon=True).start()

    def close(self) -> None:
        """Pull the plug off the network."""
        self._client.publish(self._alive, "Offline", retain=True)
        self._client.disconnect()
        self._client.loop_stop()
