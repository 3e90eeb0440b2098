"""A real PostgreSQL for a test, on a Unix socket and loopback, and a proxy that makes the link to it bad."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
USER = "postgres"
START_S = 60.0


def missing() -> str | None:
    """What this machine lacks, by name."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "psycopg"
    if not BINARIES:
        return "PostgreSQL server"
    return None if os.geteuid() or shutil.which("setpriv") else "setpriv"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(address: str = "127.0.0.1") -> Iterator[int]:
    """The port of a new, empty server with default durability on loopback, and on `address` for whoever can reach it;
    gone at the end, with its data."""
    binary, port = BINARIES[-1], free_port()
    as_user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="pointcall-test-pg-") as name:  # not below pytest's folder: that is private
        folder = Path(name)
        if as_user:
            shutil.chown(folder, USER, USER)
        data, log = folder / "data", folder / "server.txt"
        initdb = [*as_user, str(binary.with_name("initdb")), "-D", str(data), "-A", "trust", "-U", USER]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL)
        addresses = ",".join(sorted({"127.0.0.1", address}))
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all {address}/24 trust\n")
        options = ["-D", str(data), "-p", str(port), "-k", str(folder), "-c", f"listen_addresses={addresses}"]
        with log.open("wb") as out:
            process = subprocess.Popen([*as_user, str(binary), *options], stderr=out, stdout=out)
        try:
            _wait(process, port, log)
            yield port
        finally:
            process.send_signal(signal.SIGINT)  # at once, whoever is still connected
            process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_S
    while not _is_ready(port):
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-1000:]
        time.sleep(0.05)


def _is_ready(port: int) -> bool:
    """It accepts connections and has finished its own recovery."""
    command = [str(BINARIES[-1].with_name("pg_isready")), "-q", "-h", "127.0.0.1", "-p", str(port)]
    return subprocess.run(command, check=False).returncode == 0


class BadLink:
    """A proxy that breaks a share of its connections after some bytes, and delays every piece it carries."""

    def __init__(self, target: int, *, broken: float, delay_s: float, seed: int) -> None:
        self.opened = self.cut = 0
        self._target, self._broken, self._delay_s, self._chance = target, broken, delay_s, random.Random(seed)
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nothing is left behind: no thread, no socket."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._sockets):
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.opened += 1
            doomed = self._chance.random() < self._broken
            budget = self._chance.randrange(300, 12_000) if doomed else None
            self.cut += doomed
            server = socket.create_connection(("127.0.0.1", self._target))
            self._sockets += [client, server]
            left = [budget]
            for source, sink in ((client, server), (server, client)):
                thread = threading.Thread(target=self._carry, args=(source, sink, left), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _carry(self, source: socket.socket, sink: socket.socket, left: list[int | None]) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                time.sleep(self._delay_s)
                if left[0] is not None:
                    piece, left[0] = piece[: left[0]], left[0] - len(piece)
                sink.sendall(piece)
                if left[0] is not None and left[0] <= 0:
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
