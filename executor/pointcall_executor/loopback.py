"""An address of this machine for itself: `ADDRESS:PORT` on loopback, and nothing else."""

from __future__ import annotations

import ipaddress


def loopback(text: str) -> tuple[str, int]:
    """Address and port of `127.0.0.1:9464` or `[::1]:9464`. ValueError for what others could reach."""
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.strip("[]"))
        number = int(port) if port.isascii() and port.isdecimal() else -1
    except ValueError:
        number = -1
    if not 0 <= number < 65_536 or not address.is_loopback:
        raise ValueError("a loopback address with a port, such as 127.0.0.1:9464")
    return str(address), number
