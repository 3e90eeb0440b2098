"""/metrics, /healthz and /readyz on loopback: what they say, to whom, and that nobody can hold them."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pointcall_executor.config import ConfigError, load
from pointcall_executor.loopback import loopback
from pointcall_executor.pulse import Pulse
from pointcall_executor.telemetry import http as listener
from pointcall_executor.telemetry.http import AT_ONCE, Listener, ListenError
from pointcall_executor.telemetry.metrics import CONTENT_TYPE, Metrics
from tests.unit.live.night import QUIET


@dataclass
class Served:
    armed: bool = True
    failed: bool = False
    beats: int = 0
    now: float = 0.0
    listener: Listener = field(init=False)

    def __post_init__(self) -> None:
        pulse = Pulse(lambda: self.beats, lambda: self.failed, lambda: self.now)
        self.listener = Listener(
            ("127.0.0.1", 0), Metrics(lambda: QUIET), pulse, lambda: "" if self.armed else "halted"
        )

    def ask(self, path: str, method: str = "GET") -> tuple[int, str, bytes]:
        client = http.client.HTTPConnection("127.0.0.1", self.listener.port, timeout=10)
        try:
            client.request(method, path)
            answer = client.getresponse()
            return answer.status, answer.headers.get("Content-Type", ""), answer.read()
        finally:
            client.close()


@pytest.fixture
def served() -> Iterator[Served]:
    found = Served()
    yield found
    found.listener.stop()


def test_the_metrics_are_there(served: Served) -> None:
    status, kind, body = served.ask("/metrics?x=1")
    assert (status, kind) == (200, CONTENT_TYPE)
    assert b"pointcall_ready 1.0" in body


def test_healthy_is_who_turns_and_ready_is_who_is_armed(served: Served) -> None:
    assert served.ask("/healthz")[0] == served.ask("/readyz")[0] == 200
    served.armed = False
    assert served.ask("/readyz")[::2] == (503, b"halted\n")
    assert served.ask("/healthz")[0] == 200
    served.armed, served.now = True, 60.0
    assert served.ask("/healthz")[::2] == (503, b"the core's loop does not turn\n")
    assert served.ask("/readyz")[0] == 503
    served.beats = 1
    assert served.ask("/readyz")[0] == 200
    served.failed = True
    assert served.ask("/healthz")[0] == served.ask("/readyz")[0] == 503


def test_anything_else_is_not_there(served: Served) -> None:
    assert served.ask("/")[0] == served.ask("/../etc/passwd")[0] == 404
    assert served.ask("/metrics", "POST")[0] == 501
    status, _, body = served.ask("/metrics", "HEAD")
    assert (status, body) == (200, b"")


def test_a_taken_port_is_an_error_that_says_so(served: Served) -> None:
    taken = ("127.0.0.1", served.listener.port)
    with pytest.raises(ListenError) as refusal:
        Listener(taken, Metrics(lambda: QUIET), Pulse(lambda: 0, lambda: False), str)
    assert refusal.value.id == "http.listen"


def test_those_who_dawdle_are_cut_off_and_more_than_enough_are_turned_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener, "WHOLE_S", 1.0)
    served = Served()
    try:
        slow = [socket.create_connection(("127.0.0.1", served.listener.port)) for _ in range(AT_ONCE)]
        for client in slow:
            client.sendall(b"GET /metr")
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", served.listener.port)) as late:
            late.settimeout(5)
            assert late.recv(10) == b""  # closed at once
        deadline = time.monotonic() + 10
        for client in slow:
            client.settimeout(max(0.1, deadline - time.monotonic()))
            while client.recv(4096):
                pass
            client.close()
        until = time.monotonic() + 5
        while time.monotonic() < until:
            try:
                assert served.ask("/healthz")[0] == 200
                break
            except (http.client.HTTPException, ConnectionError):
                time.sleep(0.05)
        else:
            pytest.fail("no place became free")
    finally:
        served.listener.stop()


@pytest.mark.parametrize("text", ["127.0.0.1:9464", "[::1]:9464", "127.8.8.8:0"])
def test_loopback_is_accepted(text: str) -> None:
    assert loopback(text)[1] in (0, 9464)


@pytest.mark.parametrize("text", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "localhost:1", "127.0.0.1", "127.0.0.1:-1",
                                  "127.0.0.1:65536", "127.0.0.1:x", ":9464"])  # fmt: skip
def test_nothing_else_is(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loopback"):
        loopback(text)
    path = tmp_path / "pointcall.toml"
    path.write_text(f'http = "{text}"\n')
    with pytest.raises(ConfigError) as refusal:
        load(path, {})
    assert "http" in refusal.value.message
