"""Network faults between a device and its server: a byte-exact proxy, and wrong answers."""

from framework.network.answers import Answer, AnswerServer
from framework.network.certificates import CertificateError, server_context
from framework.network.orders import OrderLine, OrderLineError
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
    "ProxyError",
    "ProxyEvent",
    "server_context",
]
