"""/metrics, /healthz and /readyz over HTTP on loopback. Read-only, without state, without secrets.

Health: the core's loop turns and nothing failed. Readiness: something is armed. At most `AT_ONCE` requests at a time;
one that dawdles is cut off.
"""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

from pointcall_executor.bounded_http import BoundedServer
from pointcall_executor.pulse import Pulse
from pointcall_executor.telemetry.metrics import CONTENT_TYPE, Metrics
from pointcall_runbook.errors import PointcallError

AT_ONCE: Final = 8
TIMEOUT_S: Final = 5.0
WHOLE_S: Final = 10.0  # for one request with its answer
STUCK: Final = "the core's loop does not turn"
_TEXT: Final = "text/plain; charset=utf-8"


class ListenError(PointcallError):
    """The HTTP listener cannot be there."""

    id = "http.listen"


class Listener(BoundedServer):
    """Serves until `stop`. ListenError where the address is taken. `unready`: why nothing is armed; empty if it is."""

    allow_reuse_port = False

    def __init__(self, address: tuple[str, int], metrics: Metrics, pulse: Pulse, unready: Callable[[], str]) -> None:
        self.metrics, self.pulse, self.unready = metrics, pulse, unready
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            super().__init__(address, _Handler, at_once=AT_ONCE, whole_s=WHOLE_S)
        except OSError as error:
            where = f"{address[0]}:{address[1]}"
            raise ListenError("cannot listen for HTTP", want=where, got=str(error), hint="setting http") from error
        self._thread = threading.Thread(target=self.serve_forever, args=(0.2,), name="http", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no news."""

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join(timeout=5)


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = TIMEOUT_S
    server: Listener
    server_version = "pointcall"
    sys_version = ""

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/metrics":
                self._answer(200, CONTENT_TYPE, self.server.metrics.text())
            case "/healthz":
                self._yes_or_no(self.server.pulse.alive(), "alive", STUCK)
            case "/readyz":
                unready = self.server.unready()
                alive = self.server.pulse.alive()
                self._yes_or_no(alive and not unready, "armed", unready or STUCK)
            case _:
                self._answer(404, _TEXT, b"/metrics, /healthz or /readyz\n")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _yes_or_no(self, yes: bool, good: str, bad: str) -> None:
        self._answer(200 if yes else 503, _TEXT, f"{good if yes else bad}\n".encode())

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every second; they are not news."""
