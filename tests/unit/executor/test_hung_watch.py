"""When sensors of storage are looked at: rarely, and no later than a sixth of the limit after it passed."""

from __future__ import annotations

import pytest

from pointcall_executor.core.event import Source
from pointcall_executor.core.hung import InFlight, What
from pointcall_executor.hung_watch import HungWatch
from pointcall_runbook.vocabulary import Operation

SECOND = 10**9
DISK = What(7, 8 << 20, Operation.WRITE)


class Sensor:
    """One operation in flight, from the beginning on; notes before when it was asked to be sure."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def in_flight(self, before_ns: int) -> list[InFlight]:
        self.asked.append(before_ns)
        return [InFlight(DISK, 0)]


@pytest.mark.parametrize(
    ("limit_ns", "period_ns"),
    [(60 * SECOND, 10 * SECOND), (3600 * SECOND, 10 * SECOND), (SECOND, SECOND // 4), (30 * SECOND, 5 * SECOND)],
)
def test_it_looks_when_it_is_time_and_says_how_long_that_is(limit_ns: int, period_ns: int) -> None:
    sensor = Sensor()
    watch = HungWatch(sensor, Source.FUSE, limit_ns)
    assert watch.due_ns(5) == 0
    assert watch.look(5) == []
    assert watch.due_ns(5) == period_ns
    assert watch.look(5 + period_ns - 1) == []
    assert watch.due_ns(5 + period_ns - 1) == 1
    assert len(sensor.asked) == 1
    watch.look(5 + period_ns)
    assert sensor.asked == [5 - limit_ns + 1, 5 + period_ns - limit_ns + 1]


def test_what_hangs_is_told_again_and_again_and_the_kernel_was_asked_about_it() -> None:
    sensor = Sensor()
    watch = HungWatch(sensor, Source.FUSE, 60 * SECOND)
    told = [event for now in range(200) for event in watch.look(now * SECOND)]
    assert [(e.at_ns // SECOND, e.longest_ns // SECOND, e.source) for e in told] == [
        (60, 60, Source.FUSE), (120, 120, Source.FUSE), (180, 180, Source.FUSE),
    ]  # fmt: skip
    assert sensor.asked[6] > 0  # before this: what began then and is reported at 60 s is asked about
