"""An HTTP server of at most so many requests at a time, each in a thread of its own and cut off after its time.

Who serves what is not here: telemetry/http.py, witness_server.py.
"""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
from typing import Any


class BoundedServer(http.server.ThreadingHTTPServer):
    """`at_once` requests, each with its answer within `whole_s` seconds. One more is closed at once. OSError where the
    address is taken."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: Any, *, at_once: int, whole_s: float) -> None:
        self._places, self._whole_s = threading.BoundedSemaphore(at_once), whole_s
        self.request_queue_size = 2 * at_once
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own, where one is free; else the connection is closed at once."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        cut = threading.Timer(self._whole_s, _cut, (request,))
        cut.daemon = True
        cut.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            cut.cancel()
            self._places.release()


def _cut(request: socket.socket) -> None:
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)
