"""Power heads: the bench's relays behind the protocols of the devices that people buy.

Each kind says which resource an exporter publishes for it; what speaks its protocol is a real
server. HTTP kinds and the recovery line share one HTTP server (`http_heads`), Modbus coils are
pyModbusTCP's (`modbus_head`), Tasmota plugs are clients of a Mosquitto broker (`tasmota_head`),
and the APC strip is net-snmp's snmpd with a small program of ours behind it (`snmp_pass`).
Sources: labgrid's power backends, Shelly's API documents, Tasmota's MQTT documents, and
PowerNet-MIB (sPDUOutletCtl).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attrs import frozen

__all__ = ["HEADS", "Addresses", "Head"]


@frozen
class Addresses:
    """Where the servers of a bench listen; all on the loopback.

    Attributes:
        http: port of the HTTP heads.
        modbus: port of the Modbus server.
        snmp: UDP port of the SNMP agent.
        broker: address of the MQTT broker, whose port is always 1883.
    """

    http: int
    modbus: int
    snmp: int
    broker: str


@frozen
class Head:
    """A kind of power head.

    Attributes:
        name: as `--heads` takes it.
        sold_as: what people buy.
        resource: the labgrid resource's class.
        arguments: of that resource, for a board's number.
        rig: the rig file whose drivers fit.
    """

    name: str
    sold_as: str
    resource: str
    arguments: Callable[[Addresses, int], Mapping[str, Any]]
    rig: str = "rigs/bench.yaml"


def _network(model: str, host: Callable[[Addresses], str]) -> Callable[..., Mapping[str, Any]]:
    return lambda at, number: {"model": model, "host": host(at), "index": number}


def _escaped(text: str) -> str:
    """labgrid fills in `{index}` itself, after the exporter's file went through Jinja."""
    return '{{ "' + text + '" }}'


HEADS: dict[str, Head] = {
    head.name: head
    for head in (
        Head(
            "rest",
            "relay with PUT and GET",
            "NetworkPowerPort",
            _network("rest", lambda at: f"http://127.0.0.1:{at.http}/rest/{_escaped('{index}')}"),
        ),
        Head(
            "simplerest",
            "relay with GET only",
            "NetworkPowerPort",
            _network(
                "simplerest",
                lambda at: f"http://127.0.0.1:{at.http}/simple/{_escaped('{index}/{value}')}",
            ),
        ),
        Head(
            "shelly_gen1",
            "Shelly 1, Plug S",
            "NetworkPowerPort",
            _network("shelly_gen1", lambda at: f"http://127.0.0.1:{at.http}"),
        ),
        Head(
            "shelly_gen2",
            "Shelly Plus, Pro, Gen 3",
            "NetworkPowerPort",
            _network("shelly_gen2", lambda at: f"http://127.0.0.1:{at.http}"),
        ),
        Head(
            "apc",
            "APC AP79xx over SNMP",
            "NetworkPowerPort",
            _network("apc", lambda at: f"127.0.0.1:{at.snmp}"),
        ),
        Head(
            "tasmota",
            "plug with Tasmota over MQTT",
            "TasmotaPowerPort",
            lambda at, number: {
                "host": at.broker,
                "avail_topic": f"tele/plug{number}/LWT",
                "power_topic": f"cmnd/plug{number}/POWER",
                "status_topic": f"stat/plug{number}/POWER",
            },
            "rigs/bench-tasmota.yaml",
        ),
        Head(
            "modbus",
            "relay card on Modbus TCP",
            "ModbusTCPCoil",
            lambda at, number: {"host": f"127.0.0.1:{at.modbus}", "coil": number},
            "rigs/bench-modbus.yaml",
        ),
    )
}
