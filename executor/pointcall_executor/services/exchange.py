"""One HTTP exchange with a manager of services, with one deadline for all of it, however little at a time comes."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def connected(connection: http.client.HTTPConnection, seconds: float) -> Iterator[None]:
    """Connect, and cut it off after this time. Whoever waits for whatever of it then has an error, or an answer that
    ends too early: OSError, HTTPException, or the ValueError of what is no whole JSON value."""
    channel: socket.socket | None = None
    late = threading.Event()

    def cut() -> None:
        late.set()
        found = channel or connection.sock  # a connection forgets its socket before the whole answer is read
        with contextlib.suppress(OSError):
            if found is not None:
                socket.socket.shutdown(found, socket.SHUT_RDWR)  # below TLS, which another thread is reading

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        connection.connect()
        channel = connection.sock
        if late.is_set():  # while its name was looked up, or TLS began, there was nothing to cut off
            raise TimeoutError(f"not connected within {seconds:g} s")
        yield
    finally:
        timer.cancel()
