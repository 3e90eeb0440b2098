"""One connect through io_uring, which makes no connect system call. Raw system calls, x86-64 and arm64 alike.

Spec: io_uring_setup(2), io_uring_enter(2), include/uapi/linux/io_uring.h.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct

SETUP, ENTER = 425, 426
OFF_SQ_RING, OFF_CQ_RING, OFF_SQES = 0, 0x8000000, 0x10000000
OP_CONNECT, GETEVENTS = 16, 1
PARAMS = 120

_libc = ctypes.CDLL(None, use_errno=True)


def connect(port: int, ip: str = "127.0.0.1") -> str:
    """OK or the errno's name. OSError where io_uring itself is refused."""
    params = ctypes.create_string_buffer(PARAMS)
    fd = _syscall(SETUP, 4, params)
    try:
        with socket.socket() as sock:
            result = _submit(fd, params.raw, sock.fileno(), port, ip)
    finally:
        os.close(fd)
    return "OK" if result == 0 else errno.errorcode[-result]


def _submit(ring: int, params: bytes, sock: int, port: int, ip: str) -> int:
    entries = struct.unpack_from("<I", params)[0]
    cq_entries = struct.unpack_from("<I", params, 4)[0]
    _head, sq_tail, _mask, _n, _flags, _dropped, sq_array = struct.unpack_from("<7I", params, 40)
    _cq_head, _cq_tail, _cq_mask, _cq_n, _overflow, cqes = struct.unpack_from("<6I", params, 80)
    address = ctypes.create_string_buffer(
        struct.pack("<H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(ip) + bytes(8), 16
    )
    with (
        mmap.mmap(ring, sq_array + 4 * entries, offset=OFF_SQ_RING) as sq,
        mmap.mmap(ring, cqes + 16 * cq_entries, offset=OFF_CQ_RING) as cq,
        mmap.mmap(ring, 64 * entries, offset=OFF_SQES) as sqes,
    ):
        sqes[:64] = struct.pack("<BBHiQQ", OP_CONNECT, 0, 0, sock, 16, ctypes.addressof(address)).ljust(64, b"\0")
        sq[sq_array : sq_array + 4] = bytes(4)
        sq[sq_tail : sq_tail + 4] = struct.pack("<I", 1)
        _syscall(ENTER, ring, 1, 1, GETEVENTS, None, 0)
        return int(struct.unpack_from("<i", cq, cqes + 8)[0])


def _syscall(number: int, *args: object) -> int:
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        raise OSError(ctypes.get_errno(), "io_uring")
    return result
