"""A TDX quote through vsock: TDREPORT to the host's quote generation service, quote back. The connection is a value.

The service is not trusted: what it returns is parsed and compared by the caller, and verified like any quote.
Spec: Intel DCAP qgs_msg_lib: a 4-byte big-endian length, then a little-endian header and body.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Final

from pointcall_attest import tdreport, tdx
from pointcall_executor.tee.platform import PlatformError

HOST_CID, PORT = 2, 4050
TIMEOUT_S: Final = 10.0  # making a quote takes 2 to 4 ms; a busy host needs longer
HEADER: Final = struct.Struct("<HHIII")  # major, minor, type, size, error
GET_QUOTE_REQUEST, GET_QUOTE_RESPONSE = 0, 1
_LENGTH: Final = struct.Struct(">I")
_SIZES: Final = struct.Struct("<II")
_MAX_ANSWER: Final = HEADER.size + _SIZES.size + 4096 + tdx.MAX_QUOTE_BYTES
Connect = Callable[[], socket.socket]


def vsock() -> socket.socket:
    """A connection to the host's service at its usual place."""
    connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    connection.settimeout(TIMEOUT_S)
    try:
        connection.connect((HOST_CID, PORT))
    except OSError:
        connection.close()
        raise
    return connection


def quote(report: bytes, connect: Connect = vsock) -> bytes:
    """The quote of a TDREPORT; PlatformError `tee.quote_service` where the service gives none."""
    assert len(report) == tdreport.SIZE, "a TDREPORT has 1024 bytes"
    body = _SIZES.pack(len(report), 0) + report
    message = HEADER.pack(1, 0, GET_QUOTE_REQUEST, HEADER.size + len(body), 0) + body
    try:
        with connect() as connection:
            connection.sendall(_LENGTH.pack(len(message)) + message)
            (size,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
            if not HEADER.size + _SIZES.size <= size <= _MAX_ANSWER:
                raise _refused(f"an answer of {size} bytes")
            answer = _exactly(connection, size)
    except OSError as error:
        raise _refused(f"{type(error).__name__}: {error}") from None
    return _answered(answer)


def _answered(answer: bytes) -> bytes:
    major, minor, kind, size, error = HEADER.unpack_from(answer)
    if (major, minor, kind, size) != (1, 0, GET_QUOTE_RESPONSE, len(answer)):
        raise _refused("an answer of another version, type or size")
    if error:
        raise _refused(f"error {error:#x} of the service")
    id_size, quote_size = _SIZES.unpack_from(answer, HEADER.size)
    start = HEADER.size + _SIZES.size + id_size
    if not quote_size or start + quote_size != len(answer):
        raise _refused("sizes inside the answer disagree")
    return answer[start:]


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise _refused(f"the service hung up after {len(found)} of {size} bytes")
        found += part
    return found


def _refused(why: str) -> PlatformError:
    return PlatformError("the quote service gives no quote", id="tee.quote_service", got=why)
