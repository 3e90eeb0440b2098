"""Does anybody accept on this address and port? Asked of the kernel (NETLINK_SOCK_DIAG), without a connect.

A connect would be judged by the breaker's gate, would count as the half-open probe, and on loopback could meet its own
socket (kernel.md, peers.md section 1). The kernel walks its listening sockets only, so a busy node costs nothing. Where
it has no such dump (the module tcp_diag is missing), /proc/self/net says the same, and walks all sockets for it.
Spec: linux/inet_diag.h, sock_diag(7), proc_net_tcp. No root needed.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pointcall_runbook.vocabulary import Address

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST_DUMP: Final = 0x1 | 0x300
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_TCP_LISTEN: Final = 10
_HEADER: Final = struct.Struct("=IHHII")
_REQUEST: Final = struct.Struct("=BBBxI")  # family, protocol, extensions, states; the socket id follows
_SOCKET_ID_BYTES: Final = 48
_NO_DUMP: Final = (errno.ENOENT, errno.EPROTONOSUPPORT)  # of NETLINK_SOCK_DIAG, or of TCP in it
_TABLES: Final[dict[int, str]] = {socket.AF_INET: "tcp", socket.AF_INET6: "tcp6"}
_ROW: Final = re.compile(r" *\d+: ([0-9A-F]+):([0-9A-F]{4}) \S+ 0A ")  # 0A: TCP_LISTEN

Bound = tuple[int, bytes, int]  # family, address in network order, port


def _dump(family: int) -> Iterator[bytes]:
    """The raw answers of one dump of listening TCP sockets."""
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 1 << _TCP_LISTEN) + bytes(_SOCKET_ID_BYTES)
    message = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as channel:
        channel.send(message)
        while True:
            data = channel.recv(65536)
            at = 0
            while at + _HEADER.size <= len(data):
                length, kind, *_ = _HEADER.unpack_from(data, at)
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    (code,) = struct.unpack_from("=i", data, at + _HEADER.size)
                    raise OSError(-code, os.strerror(-code))
                yield data[at + _HEADER.size : at + length]
                at += (length + 3) & ~3


def _asked(family: int) -> Iterator[Bound]:
    width = 4 if family == socket.AF_INET else 16
    for answer in _dump(family):
        # inet_diag_msg: family, state, timer, retrans, then the socket id: source port (network order), ...
        yield family, answer[8 : 8 + width], int.from_bytes(answer[4:6], "big")


def _read(family: int, folder: Path) -> Iterator[Bound]:
    """The same of the table of all sockets; addresses are there as words of 32 bits in the machine's order."""
    try:
        text = (folder / _TABLES[family]).read_text("ascii")
    except FileNotFoundError:
        return  # no IPv6
    for line in text.splitlines()[1:]:
        found = _ROW.match(line)
        if found is not None:
            words = (int(found[1][at : at + 8], 16) for at in range(0, len(found[1]), 8))
            yield family, b"".join(struct.pack("=I", word) for word in words), int(found[2], 16)


def bound(folder: Path = Path("/proc/self/net")) -> Iterator[Bound]:
    """Every listening TCP socket of this network namespace. OSError where the kernel does not say."""
    for family in _TABLES:
        try:
            yield from list(_asked(family))
        except OSError as error:
            if error.errno not in _NO_DUMP:
                raise
            yield from _read(family, folder)


def accepts(socket_: Bound, address: Address, port: int) -> bool:
    """Whether that socket takes connections to `address`:`port`. One that is bound to :: takes IPv4, too."""
    family, where, at = socket_
    if at != port:
        return False
    ipv4 = address.packed[:12] == bytes(10) + b"\xff\xff"
    everywhere = not any(where) and (family == socket.AF_INET6 or ipv4)
    return everywhere or Address.from_bytes(where) == address


def listening(address: Address, port: int) -> bool:
    """True if a TCP socket in this network namespace accepts connections to `address`:`port`."""
    return any(accepts(each, address, port) for each in bound())
