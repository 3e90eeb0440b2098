"""The bad link itself: what was asked of it is what packets meet, and nothing of it is left."""

from __future__ import annotations

import errno
import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault import link
from tests.fault.link import CENTRE, BadLink
from tests.kernel.lab import listen


@pytest.fixture(autouse=True)
def possible() -> None:
    lack = link.missing()
    if lack is not None:
        pytest.skip(f"{lack} is missing")


class Echo:
    """A datagram server in the centre, and a client of it at the node."""

    def __init__(self, between: BadLink) -> None:
        with between.at_centre():
            self._server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._server.bind((CENTRE, 7))
        with between.at_node():
            self.client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.client.connect((CENTRE, 7))
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        while True:
            packet, who = self._server.recvfrom(100)
            if packet == b"end":
                return
            self._server.sendto(packet, who)

    def trip_s(self) -> float:
        begin = time.monotonic()
        self.client.send(b"x")
        self.client.settimeout(5)
        assert self.client.recv(100) == b"x"
        return time.monotonic() - begin

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as _:
            self.client.send(b"end")
        self._thread.join()
        self.client.close()
        self._server.close()


@pytest.fixture
def between() -> Iterator[BadLink]:
    with BadLink(seed=3) as made:
        yield made


@pytest.fixture
def echo(between: BadLink) -> Iterator[Echo]:
    made = Echo(between)
    yield made
    between.heal()
    made.close()


def test_latency_is_counted_one_way_and_may_change(between: BadLink, echo: Echo) -> None:
    quick = statistics.median(echo.trip_s() for _ in range(5))
    between.become(latency_s=0.2, loss=0.0)
    slow = [echo.trip_s() for _ in range(3)]
    assert all(0.4 <= one < 0.4 + 0.2 + quick for one in slow), (quick, slow)


def lost(between: BadLink, packets: int, loss: float) -> list[int]:
    """Which of these packets a node's way loses."""
    between.become(latency_s=0.0, loss=loss)
    with between.at_node(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        out, way = [], between.node.way
        for number in range(packets):
            before = way.sent, way.lost
            client.sendto(b"x", (CENTRE, 7))
            while way.sent == before[0]:
                time.sleep(0.0001)
            out += [number] * (way.lost - before[1])
    return out


def test_loss_is_what_was_asked_each_way_and_the_same_for_a_seed(between: BadLink, echo: Echo) -> None:
    first = lost(between, 1000, 0.3)
    assert 0.25 < len(first) / 1000 < 0.35
    back = between.centre.way
    assert 0.25 < back.lost / back.sent < 0.35
    assert between.node.way.arrived == 1000 - len(first)
    with BadLink(seed=3) as again:
        assert lost(again, 1000, 0.3) == first


def test_everything_is_lost_or_there_is_no_way_and_then_it_heals(between: BadLink, echo: Echo) -> None:
    between.become(latency_s=0.0, loss=1.0)
    echo.client.settimeout(0.2)
    echo.client.send(b"x")
    with pytest.raises(TimeoutError):
        echo.client.recv(100)
    between.down()
    with between.at_node(), pytest.raises(OSError, match="unreachable") as caught:
        socket.create_connection((CENTRE, 9), timeout=5)
    assert caught.value.errno == errno.ENETUNREACH
    between.heal()
    assert echo.trip_s() < 5


def test_tcp_arrives_whole_over_a_link_that_loses_packets(between: BadLink) -> None:
    between.become(latency_s=0.01, loss=0.1)
    sent, got = os.urandom(200_000), b""
    with between.at_centre():
        server = listen(80, CENTRE)
    with server, between.at_node(), socket.create_connection((CENTRE, 80), timeout=60) as client:
        accepted, _ = server.accept()
        with accepted:
            thread = threading.Thread(target=lambda: (client.sendall(sent), client.shutdown(socket.SHUT_WR)))
            thread.start()
            accepted.settimeout(60)
            while piece := accepted.recv(65536):
                got += piece
            thread.join()
    assert got == sent
    assert between.node.way.lost > 0


def test_nothing_is_left() -> None:
    before = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    made = BadLink()
    made.become(latency_s=5.0, loss=0.0)
    with made.at_node(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"x", (CENTRE, 7))
    made.close()
    made.close()
    assert (len(list(Path("/proc/self/fd").iterdir())), threading.active_count()) == before
