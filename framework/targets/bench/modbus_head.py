"""The bench's Modbus TCP relay card: coil N is board N's relay (pyModbusTCP's own server)."""

from __future__ import annotations

from collections.abc import Mapping

from pyModbusTCP.server import DataBank, ModbusServer

from framework.targets.bench.board import BenchBoard

__all__ = ["serve_modbus"]


class _Coils(DataBank):  # type: ignore[misc]
    """The coils of the card, read from and written to the relays themselves."""

    def __init__(self, boards: Mapping[int, BenchBoard]) -> None:
        super().__init__()
        self._boards = boards

    def get_coils(
        self, address: int, number: int = 1, srv_info: object = None
    ) -> list[bool] | None:
        """Read; None (an exception for the client) outside the card."""
        boards = [self._boards.get(n) for n in range(address, address + number)]
        return [b.relay() for b in boards if b is not None] if all(boards) else None

    def set_coils(self, address: int, bit_list: list[bool], srv_info: object = None) -> bool | None:
        """Write; None outside the card."""
        for place, value in enumerate(bit_list, address):
            board = self._boards.get(place)
            if board is None:
                return None
            board.switch(bool(value))
        return True


def serve_modbus(boards: Mapping[int, BenchBoard], port: int) -> ModbusServer:
    """Start the card on a port of the loopback."""
    server = ModbusServer("127.0.0.1", port, no_block=True, data_bank=_Coils(boards))
    server.start()
    return server
