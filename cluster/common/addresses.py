"""Addresses `host:port`: which of them stay on this machine."""

from __future__ import annotations

import ipaddress


def split_address(address: str) -> tuple[str, int] | None:
    """(host, port) of `host:port`, brackets of IPv6 removed; None when it is something else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        return None
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether what is sent to this host name or IP address stays on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
