"""The thread beside the rings: its records come out, its failure is not silent, it ends at once."""

from __future__ import annotations

import os
import select
import threading
import time

import pytest

from pointcall_executor.kernel.lookout import Lookout


class Look:
    """A look that waits until it is told, as the real one does."""

    def __init__(self, *answers: list[bytes] | Exception) -> None:
        self.answers, self._stop = list(answers), threading.Event()

    def __call__(self, timeout_s: float) -> list[bytes]:
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        self._stop.wait(60)
        return []

    def interrupt(self) -> None:
        self._stop.set()


def until_readable(lookout: Lookout) -> None:
    assert select.select([lookout], [], [], 5)[0]


def test_records_come_out_once_in_order() -> None:
    look = Look([b"a", b"b"], [], [b"c"])
    lookout = Lookout(look, look.interrupt)
    lookout.start()
    found: list[bytes] = []
    while len(found) < 3:
        until_readable(lookout)
        found += lookout.drain()
    assert found == [b"a", b"b", b"c"]
    assert lookout.drain() == []
    assert select.select([lookout], [], [], 0)[0] == []
    lookout.close()


def test_a_failure_is_raised_where_it_is_drained() -> None:
    look = Look(OSError(5, "broken"))
    lookout = Lookout(look, look.interrupt)
    lookout.start()
    until_readable(lookout)
    with pytest.raises(OSError, match="broken"):
        lookout.drain()
    lookout.close()


def test_it_ends_at_once_and_leaves_no_descriptor() -> None:
    look = Look()
    lookout = Lookout(look, look.interrupt)
    lookout.start()
    fd, start = lookout.fileno(), time.monotonic()
    lookout.close()
    lookout.close()
    assert time.monotonic() - start < 5
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_one_that_never_started_can_be_closed() -> None:
    look = Look()
    Lookout(look, look.interrupt).close()
