"""Is a service ready as it is declared? By a listening port, by an HTTP answer, by a file.

A port is asked of the kernel without a connect. HTTP needs one: it is made by the spawner, from a cgroup that the
breaker never refuses and whose connect is never the half-open probe, and only once somebody listens, so that it cannot
count as a failure of the destination.
"""

from __future__ import annotations

import re
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pointcall_attest.declaration import Http, Ready
from pointcall_executor.services.listening import listening
from pointcall_executor.services.managed import ServiceError
from pointcall_runbook.vocabulary import Address

PAUSE_SECONDS: Final = (0.0002, 0.002)  # between two looks: short at first
SHORT_FOR_SECONDS: Final = 0.05
HTTP_SECONDS: Final = 1.0  # for one request
MAX_STATUS_LINE_BYTES: Final = 1024

Connect = Callable[[str, int], socket.socket]  # a socket that has begun to connect
Ended = Callable[[float], bool]


def place(text: str) -> tuple[Address, int]:
    """`address:port` as the declaration writes it."""
    host, _, port = text.rpartition(":")
    return Address.parse(host.strip("[]")), int(port)


def described(ready: Ready) -> str:
    """What is checked, in words, for receipts."""
    found = [f"accepts on {ready.tcp}"] if ready.tcp is not None else []
    found += [f"answers GET {ready.http.path} with {ready.http.status}"] if ready.http is not None else []
    found += [f"{ready.file} exists"] if ready.file is not None else []
    return " and ".join(found)


def unready(ready: Ready, connect: Connect) -> str:
    """Empty if everything that is declared is so now, otherwise the first thing that is not."""
    if ready.tcp is not None:
        address, port = place(ready.tcp)
        if not listening(address, port):
            return f"nobody listens on {ready.tcp}"
        if ready.http is not None and (wrong := _unanswered(ready.http, ready.tcp, address, port, connect)):
            return wrong
    if ready.file is not None and not Path(ready.file).exists():
        return f"{ready.file} does not exist"
    return ""


def await_ready(ready: Ready, connect: Connect, *, name: str, ended: Ended, hint: str) -> None:
    """ServiceError `service.ended` if it ends first, `service.not-ready` if its time is over.

    `ended` waits so many seconds and says whether the service ended meanwhile.
    """
    begin = time.monotonic()
    while wrong := unready(ready, connect):
        age = time.monotonic() - begin
        if ended(PAUSE_SECONDS[age > SHORT_FOR_SECONDS]):
            raise ServiceError(f"{name} ended at once", id="service.ended", hint=hint)
        if age * 1000 > ready.timeout_ms:
            want = f"{described(ready)} within {ready.timeout_ms} ms"
            raise ServiceError(f"{name} is not ready", id="service.not-ready", want=want, got=wrong, hint=hint)


def _unanswered(http: Http, where: str, address: Address, port: int, connect: Connect) -> str:
    deadline = time.monotonic() + HTTP_SECONDS
    request = f"GET {http.path} HTTP/1.1\r\nHost: {where}\r\nUser-Agent: pointcall\r\nConnection: close\r\n\r\n"
    try:
        with connect(str(address), port) as channel:
            channel.settimeout(HTTP_SECONDS)
            _connected(channel, deadline)
            channel.sendall(request.encode("ascii"))
            status = _status(channel, deadline)
    except (OSError, ServiceError) as error:
        return f"GET {http.path}: {error}"
    return "" if status == http.status else f"GET {http.path} was answered with {status or 'no status'}"


def _connected(channel: socket.socket, deadline: float) -> None:
    """Wait until a connect that has begun is done. OSError if it failed."""
    if not _writable(channel, deadline - time.monotonic()):
        raise TimeoutError("no connection")
    code = channel.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, "connect")


def _writable(channel: socket.socket, seconds: float) -> bool:
    waiting = select.poll()
    waiting.register(channel, select.POLLOUT)
    return bool(waiting.poll(max(0.0, seconds) * 1000))


def _status(channel: socket.socket, deadline: float) -> int:
    """The status of an HTTP/1.x answer, 0 if it is none. Reads no more than its first line."""
    got = b""
    while b"\r\n" not in got and len(got) < MAX_STATUS_LINE_BYTES:
        channel.settimeout(max(0.001, deadline - time.monotonic()))
        data = channel.recv(MAX_STATUS_LINE_BYTES)
        if not data:
            break
        got += data
    found = re.match(rb"HTTP/1\.[01] ([1-5][0-9]{2})[ \r]", got)
    return int(found[1]) if found else 0
