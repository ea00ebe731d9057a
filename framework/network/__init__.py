"""Network faults on the way to a server: a byte-exact proxy, wrong answers, lost frames."""

from framework.network.answers import Answer, AnswerServer
from framework.network.certificates import CertificateError, server_context
from framework.network.orders import OrderLine, OrderLineError
from framework.network.packets import PacketFaults, PacketRelay, RelayError
from framework.network.plan import NetworkFault
from framework.network.proxy import FaultProxy, ProxyError, ProxyEvent

__all__ = [
    "Answer",
    "AnswerServer",
    "CertificateError",
    "FaultProxy",
    "NetworkFault",
    "OrderLine",
    "OrderLineError",
    "PacketFaults",
    "PacketRelay",
    "ProxyError",
    "ProxyEvent",
    "RelayError",
    "server_context",
]
