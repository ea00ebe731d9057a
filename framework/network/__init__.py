"""Network faults between a device and its server: a byte-exact fault proxy."""

from framework.network.proxy import FaultProxy, NetworkFault, ProxyError, ProxyEvent

__all__ = ["FaultProxy", "NetworkFault", "ProxyError", "ProxyEvent"]
