"""Parse addresses `host:port`, and tell which of them stay on this machine."""

from __future__ import annotations

import ipaddress


def split_address(address: str) -> tuple[str, int] | None:
    """Return (host, port) of `host:port`, the brackets of IPv6 removed; None when it is something else."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    return (host, int(port)) if host and port.isdecimal() and int(port) <= 65535 else None


def is_loopback(host: str) -> bool:
    """Return whether what is sent to this host name or IP address stays on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
