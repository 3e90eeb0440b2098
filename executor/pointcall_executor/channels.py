"""Where notifications go: a structured line, a datagram to a Unix socket, or an HTTP POST. One message, no retry.

A message is `{node?, channel, level, code}` and nothing else: no text of a runbook or of a service can be in it. What
cannot be told is an outcome in the receipt. Spec: docs/spec/manifest.md, section Channels.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import ssl
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, Final

from pointcall_attest.manifest import Channel, Manifest
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.vocabulary import Level, channel

SEND_SECONDS: Final = 5.0


class ChannelError(PointcallError):
    """A channel that is not declared, or that could not be told."""

    id = "channel.error"


def to_stderr(line: str) -> None:
    """Where lines go unless somebody wants them elsewhere."""
    sys.stderr.write(f"pointcall: {line}\n")


class DeclaredChannels:
    """The channels of a manifest, by number."""

    def __init__(self, manifest: Manifest, node: str, say: Callable[[str], None] = to_stderr) -> None:
        self._node, self._say = node, say
        self._channels = {channel(c.name).number: c for c in manifest.channels}
        self._end: float | None = None  # when the last of them must be told

    def _channel(self, number: int) -> Channel:
        found = self._channels.get(number)
        if found is None:
            raise ChannelError("no such channel is declared", id="channel.unknown", got=str(number))
        return found

    def waits(self, number: int) -> bool:
        """Whether telling it goes through somebody else, who may be slow."""
        found = self._channels.get(number)
        return found is not None and found.kind != "log"

    def hurry(self) -> None:
        """The executor ends: all that is still to be told shares one `SEND_SECONDS` from now on."""
        self._end = time.monotonic() + SEND_SECONDS

    def send(self, number: int, level: Level, code: int) -> str:
        """Tell the channel; its name. ChannelError says why that failed.

        All of it takes `SEND_SECONDS` at the most: name, connection, request and answer, however slowly they come.
        """
        found = self._channel(number)
        if found.kind == "log":
            self._say(f"notify channel={found.name} level={level.name.lower()} code={code}")
            return found.name
        message = {"node": self._node, "channel": found.name, "level": level.name.lower(), "code": code}
        try:
            seconds = SEND_SECONDS if self._end is None else min(SEND_SECONDS, self._end - time.monotonic())
            if seconds <= 0:
                raise TimeoutError("the executor ends")
            (_to_socket if found.kind == "unix" else _to_web)(found.address, json.dumps(message).encode(), seconds)
        except (OSError, http.client.HTTPException, ValueError, RuntimeError) as error:  # the last: no thread left
            raise ChannelError(
                f"channel {found.name} could not be told", id="channel.unreachable",
                want=f"{found.kind} {found.address}", got=str(error) or type(error).__name__,
            ) from error  # fmt: skip
        return found.name


def _to_socket(path: str, message: bytes, seconds: float) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(seconds)
        sender.connect(path)
        sender.send(message)


def _to_web(address: str, message: bytes, seconds: float) -> None:
    """One POST; a redirect or any other answer than 2xx is a failure: the manifest says exactly where to.

    One deadline for all of it: name, connection, TLS, request and answer, however little at a time comes.
    """
    deadline = time.monotonic() + seconds
    url = urllib.parse.urlsplit(address)
    if url.hostname is None:
        raise ValueError("an address without a host")
    secure = url.scheme == "https"
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(url.hostname, url.port)
    with _connected(url.hostname, connection.port, deadline) as raw, _ended_at(deadline, raw):
        connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=url.hostname) if secure else raw
        with contextlib.closing(connection):
            path = (url.path or "/") + (f"?{url.query}" if url.query else "")
            connection.request("POST", path, message, {"Content-Type": "application/json", "User-Agent": "pointcall"})
            status = connection.getresponse().status
    if time.monotonic() >= deadline:  # what was cut off may look whole
        raise TimeoutError(f"not within {seconds:.3g} s")
    if not 200 <= status < 300:
        raise ValueError(f"status {status}")


def _connected(host: str, port: int, deadline: float) -> socket.socket:
    """A connection to the first address that answers; the time that is left is shared by those not yet tried."""
    places = _resolved(host, port, deadline)
    failure: OSError = TimeoutError(f"not within {SEND_SECONDS:g} s")
    for number, (family, kind, protocol, _, place) in enumerate(places):
        raw = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
        try:
            raw.settimeout(max(0.001, deadline - time.monotonic()) / (len(places) - number))
            raw.connect(place)
        except OSError as error:
            failure = error
            raw.close()
        else:
            raw.settimeout(SEND_SECONDS)
            return raw
    raise failure


def _resolved(host: str, port: int, deadline: float) -> list[Any]:
    """The addresses of a host. The resolver has no timeout that a caller could set: it may go on alone, for nothing."""
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def resolve() -> None:
        try:
            found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, ValueError) as error:
            found.put(error)

    threading.Thread(target=resolve, name="resolver", daemon=True).start()
    try:
        answer = found.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise TimeoutError(f"{host} is not resolved within {SEND_SECONDS:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return list(answer)


@contextlib.contextmanager
def _ended_at(deadline: float, raw: socket.socket) -> Iterator[None]:
    """The connection ends at the deadline, whoever is waiting for whatever then."""
    with raw.dup() as same:  # TLS takes the socket over, not the connection

        def end() -> None:
            with contextlib.suppress(OSError):
                same.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(max(0.0, deadline - time.monotonic()), end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
