"""One deadline for a whole exchange, also where connecting alone took longer."""

from __future__ import annotations

import http.client
import socket
import time

import pytest

from pointcall_executor.services.exchange import connected


class Late(http.client.HTTPConnection):
    """Its name is found when the time is over: until then there is no socket that could be cut off."""

    def __init__(self, channel: socket.socket) -> None:
        super().__init__("manager", timeout=30)
        self._channel = channel

    def connect(self) -> None:
        time.sleep(0.2)
        self.sock = self._channel


def test_who_is_connected_when_the_time_is_over_asks_nothing_any_more() -> None:
    ours, theirs = socket.socketpair()
    with theirs, ours:
        begun = False
        with pytest.raises(TimeoutError), connected(Late(ours), 0.05):
            begun = True
        assert not begun
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
