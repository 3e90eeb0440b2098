"""The gRPC address of a Unix socket: `unix:<path>`, in the shorter of its absolute and relative forms."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from pointcall_runbook.errors import PointcallError

MAX_SOCKET_PATH_BYTES: Final = 107  # sun_path without its final zero: unix(7)


class SocketPathError(PointcallError):
    """The path of a socket does not fit into an address."""

    id = "api.socket-path"


def endpoint(socket: Path) -> str:
    """What gRPC listens on or connects to. SocketPathError where no form of the path is short enough."""
    forms = (str(socket.absolute()), os.path.relpath(socket))
    for form in forms:
        if len(os.fsencode(form)) <= MAX_SOCKET_PATH_BYTES:
            return f"unix:{form}"
    raise SocketPathError(
        "the path of the socket is too long",
        want=f"at most {MAX_SOCKET_PATH_BYTES} bytes",
        got=str(socket),
        hint="choose a shorter --state-dir",
    )
