"""What net-snmp's snmpd asks for the APC strip: outlet N of sPDUOutletCtl is board N's relay.

Run by snmpd (`pass_persist`, snmpd.conf(5)): lines in, lines out. The relays are reached through
the bench's HTTP server, whose address is the argument. Imports nothing of ours: it has to start
within snmpd's patience.
"""

from __future__ import annotations

import sys
from urllib.request import Request, urlopen

OID = ".1.3.6.1.4.1.318.1.1.4.4.2.1.3"
ON, OFF = 1, 2  # sPDUOutletCtl: outletOn(1), outletOff(2)


def _relay(base: str, outlet: str, value: str | None = None) -> str:
    data = None if value is None else value.encode()
    request = Request(  # noqa: S310 - our own server on the loopback
        f"{base}/rest/{outlet}", data=data, method="GET" if data is None else "PUT"
    )
    with urlopen(request, timeout=60) as answer:  # noqa: S310
        return str(answer.read().decode())


def _outlet(oid: str) -> str:
    return oid.removeprefix(OID + ".") if oid.startswith(OID + ".") else ""


def answer(base: str, lines: list[str]) -> str:
    """What snmpd gets for one request of its protocol."""
    command, oid = lines[0], lines[1]
    outlet = _outlet(oid)
    try:
        if command == "get" and outlet.isdigit():
            state = ON if _relay(base, outlet) == "1" else OFF
            return f"{oid}\ninteger\n{state}"
        if command == "set" and outlet.isdigit():
            value = lines[2].split()[-1]
            if value not in (str(ON), str(OFF)):
                return "wrong-value"
            _relay(base, outlet, "1" if value == str(ON) else "0")
            return "DONE"
    except OSError:  # the bench, or the board behind it, is ill
        pass
    return "NONE" if command != "set" else "not-writable"


def main() -> None:
    """Serve snmpd until it goes."""
    base = sys.argv[1]
    read = sys.stdin.readline
    while line := read():
        command = line.strip()
        if command == "PING":
            print("PONG", flush=True)
        elif command == "set":
            print(answer(base, [command, read().strip(), read().strip()]), flush=True)
        elif command in ("get", "getnext"):
            print(answer(base, [command, read().strip()]), flush=True)


if __name__ == "__main__":
    main()
