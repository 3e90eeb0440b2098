"""A C2SP witness: `POST /add-checkpoint` over HTTP, its state in SQLite. One origin's state only ever grows.

witness.db is trusted: who can write it can make the witness sign a fork. Keep it on another machine than the logs.
Not here: the rules (pointcall_attest.log.witness). Spec: C2SP tlog-witness, docs/spec/log.md section 5.
"""

from __future__ import annotations

import http.server
import sqlite3
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from pointcall_attest.log import checkpoint as checkpoints
from pointcall_attest.log.checkpoint import LOG, Verifier, WitnessKey
from pointcall_attest.log.witness import MAX_REQUEST_BYTES, Request, Seen, WitnessRefusal, judge
from pointcall_executor.bounded_http import BoundedServer
from pointcall_executor.mirror import briefly

Keys = Callable[[str], Sequence[Verifier]]  # origin -> the keys of that log, none if it is unknown
TIMEOUT_S: Final = 30.0  # for one request of a slow client
WHOLE_S: Final = 60.0  # for one request with its answer
AT_ONCE: Final = 32  # requests; one more is told nothing, and its node asks again


class Witness:
    """Signs growth, durably. Thread-safe; several may share one database."""

    def __init__(self, path: Path, name: str, key: WitnessKey, keys: Keys) -> None:
        self._name, self._key, self._keys = name, key, keys
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("pragma journal_mode = wal")
        self._db.execute("pragma synchronous = full")
        self._db.execute(
            "create table if not exists seen(origin text primary key, size integer not null, root blob not null) strict"
        )

    @property
    def verifier(self) -> Verifier:
        """The key that its cosignatures are checked with."""
        return checkpoints.cosigner(self._name, self._key)

    def add_checkpoint(self, raw: bytes, *, at_s: int) -> str:
        """A cosignature line. WitnessRefusal otherwise. What is signed is durable before the line exists."""
        request = Request.parse(raw)
        origin = request.checkpoint.origin
        keys = self._keys(origin)  # they may be far away: nobody waits for them but who asks
        with self._lock:
            self._db.execute("begin immediate")  # looking and remembering are one step
            try:
                new = judge(request, self._seen(origin), keys)
                sql = "insert into seen values (?, ?, ?) on conflict(origin) do update set size = ?, root = ?"
                self._db.execute(sql, (origin, new.size, new.root, new.size, new.root))
            except BaseException:
                self._db.execute("rollback")
                raise
            self._db.execute("commit")
        return checkpoints.cosign(request.checkpoint, self._name, self._key, at_s=at_s)

    def close(self) -> None:
        """May be called twice."""
        self._db.close()

    def _seen(self, origin: str) -> Seen:
        row = self._db.execute("select size, root from seen where origin = ?", (origin,)).fetchone()
        return Seen(row[0], row[1]) if row else Seen()


def keys_of_file(path: Path) -> Keys:
    """Keys from a file of `log <verifier key>` lines, in the form of a witness policy; read for each request."""

    def keys(origin: str) -> Sequence[Verifier]:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        known = [Verifier.parse(words[1]) for words in lines if words[0] == "log" and len(words) > 1]
        return [key for key in known if key.name == origin and key.kind == LOG]

    return keys


def keys_of_mirror(address: str) -> Keys:
    """Keys of the epochs that a mirror holds of a log: so the witness follows the changes of keys by itself.

    The mirror is trusted for that: who can write it can name a key. That key still signs growth only.
    """

    def keys(origin: str) -> Sequence[Verifier]:
        with briefly(address) as mirror:
            return mirror.verifiers(origin)

    return keys


def serve(witness: Witness, address: tuple[str, int], now_s: Callable[[], int]) -> BoundedServer:
    """A server on this address, not yet running: call `serve_forever()`. Put TLS in front of it.

    At most `AT_ONCE` requests at a time, each over a connection of its own.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = TIMEOUT_S

        def do_POST(self) -> None:
            status, body, kind = self._answer()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")  # one that is kept would keep its place
            self.end_headers()
            self.wfile.write(body)

        def _answer(self) -> tuple[int, bytes, str]:
            length = self.headers.get("Content-Length", "")
            if self.path != "/add-checkpoint":
                return 404, b"", "text/plain"
            if not length.isdecimal() or len(length) > 7 or int(length) > MAX_REQUEST_BYTES:
                self.close_connection = True
                return 400, b"", "text/plain"
            try:
                line = witness.add_checkpoint(self.rfile.read(int(length)), at_s=now_s())
            except WitnessRefusal as refusal:
                kind = "text/x.tlog.size" if refusal.status == 409 else "text/plain"
                return refusal.status, refusal.body.encode(), kind
            except Exception as error:  # storage or the source of keys: nothing was signed, and the asker tries again
                sys.stderr.write(f"pointcall: witness: {type(error).__name__}: {str(error)[:200]}\n")
                return 503, b"", "text/plain"
            return 200, line.encode(), "text/plain"

        def log_message(self, format: str, *args: object) -> None:
            """The journal is the log; requests are not printed."""

    return BoundedServer(address, Handler, at_once=AT_ONCE, whole_s=WHOLE_S)
