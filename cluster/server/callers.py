"""Who makes a call over gRPC."""

from __future__ import annotations

import grpc

from cluster.access.call_pool import Caller, KeyRefused
from cluster.access.keys import Keys, key_id
from cluster.jobs.tenants.tenant import ANYONE, Tenant
from cluster.server.security import presented_key


class Callers:
    """Tells callers apart: by their API keys, or where there are none by the host they come from."""

    def __init__(self, keys: Keys | None) -> None:
        self._keys = keys

    def identify(self, context: grpc.ServicerContext) -> Caller:
        """Return who makes a call; the tenant is None where there are keys and the call has none of them."""
        peer = context.peer()
        if self._keys is None:
            return Caller(_host(peer), peer, ANYONE)
        key = presented_key(context.invocation_metadata())
        tenant = self._keys.tenant(key) if key is not None else None
        if key is None or tenant is None:
            return Caller(_host(peer), peer)
        return Caller(f"key {tenant.name}", peer, tenant, key_id(key))


def tenant_of(caller: Caller) -> Tenant:
    """Return whose call it is. Raises KeyRefused: nobody's whose key counts."""
    if caller.tenant is None:
        raise KeyRefused("an API key is needed: metadata `authorization: Bearer KEY`")
    return caller.tenant


def _host(peer: str) -> str:
    """Return the host of `ipv4:HOST:PORT` or `ipv6:[HOST]:PORT`; of a Unix socket what gRPC says."""
    return peer if peer.startswith("unix:") else peer.rpartition(":")[0]
