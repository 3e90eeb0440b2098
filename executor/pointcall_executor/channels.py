"""Where notifications go: a structured line, a datagram to a Unix socket, or an HTTP POST. One message, no retry.

A message is `{node?, channel, level, code}` and nothing else: no text of a runbook or of a service can be in it. What
cannot be told is an outcome in the receipt. Spec: docs/spec/manifest.md, section Channels.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import sys
import threading
import urllib.parse
from collections.abc import Callable
from typing import Final

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

    def _channel(self, number: int) -> Channel:
        found = self._channels.get(number)
        if found is None:
            raise ChannelError("no such channel is declared", id="channel.unknown", got=str(number))
        return found

    def waits(self, number: int) -> bool:
        """Whether telling it goes through somebody else, who may be slow."""
        found = self._channels.get(number)
        return found is not None and found.kind != "log"

    def send(self, number: int, level: Level, code: int) -> str:
        """Tell the channel; its name. ChannelError says why that failed.

        An answer takes `SEND_SECONDS` at the most once there is a connection, however slowly it comes; looking up a
        name and connecting to each of its addresses come before that.
        """
        found = self._channel(number)
        if found.kind == "log":
            self._say(f"notify channel={found.name} level={level.name.lower()} code={code}")
            return found.name
        message = {"node": self._node, "channel": found.name, "level": level.name.lower(), "code": code}
        try:
            (_to_socket if found.kind == "unix" else _to_web)(found.address, json.dumps(message).encode())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ChannelError(
                f"channel {found.name} could not be told", id="channel.unreachable",
                want=f"{found.kind} {found.address}", got=str(error) or type(error).__name__,
            ) from error  # fmt: skip
        return found.name


def _to_socket(path: str, message: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(SEND_SECONDS)
        sender.connect(path)
        sender.send(message)


def _to_web(address: str, message: bytes) -> None:
    """One POST; a redirect or any other answer than 2xx is a failure: the manifest says exactly where to."""
    url = urllib.parse.urlsplit(address)
    if url.hostname is None:
        raise ValueError("an address without a host")
    connection: http.client.HTTPConnection
    if url.scheme == "https":
        trust = ssl.create_default_context()
        connection = http.client.HTTPSConnection(url.hostname, url.port, timeout=SEND_SECONDS, context=trust)
    else:
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=SEND_SECONDS)
    limit = threading.Timer(SEND_SECONDS, _cut, (connection,))
    limit.daemon = True
    try:
        connection.connect()
        limit.start()
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        connection.request("POST", path, message, {"Content-Type": "application/json", "User-Agent": "pointcall"})
        answer = connection.getresponse()
        if not 200 <= answer.status < 300:
            raise ValueError(f"status {answer.status}")
    finally:
        limit.cancel()
        connection.close()


def _cut(connection: http.client.HTTPConnection) -> None:
    """The time is over: whoever sends its answer byte by byte has not answered."""
    with contextlib.suppress(OSError, AttributeError):  # it is closed meanwhile
        connection.sock.shutdown(socket.SHUT_RDWR)
