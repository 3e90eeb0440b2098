"""Does anybody accept on this address and port? Asked of the kernel (NETLINK_SOCK_DIAG), without a connect.

A connect would be judged by the breaker's gate, would count as the half-open probe, and on loopback could meet its own
socket (kernel.md, peers.md section 1). The kernel walks its listening sockets only, so a busy node costs nothing.
Spec: linux/inet_diag.h, sock_diag(7). No root needed.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
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
_ANY: Final = (bytes(4), bytes(16))


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


def _matches(answer: bytes, family: int, address: Address, port: int) -> bool:
    # inet_diag_msg: family, state, timer, retrans, then the socket id: source port (network order), ...
    if int.from_bytes(answer[4:6], "big") != port:
        return False
    width = 4 if family == socket.AF_INET else 16
    bound = answer[8 : 8 + width]
    return bound in _ANY or Address.from_bytes(bound) == address


def listening(address: Address, port: int) -> bool:
    """True if a TCP socket in this network namespace accepts connections to `address`:`port`."""
    return any(
        _matches(answer, family, address, port)
        for family in (socket.AF_INET, socket.AF_INET6)
        for answer in _dump(family)
    )
