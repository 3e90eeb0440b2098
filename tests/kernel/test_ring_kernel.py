"""The ring: exact accounting when it overflows, limits, and waking up."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointcall_executor.core.event import decode
from pointcall_executor.kernel import bpf
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.loader import Loaded, load
from pointcall_executor.kernel.maps import Map
from pointcall_executor.kernel.ring import Ring
from pointcall_executor.kernel.sensor import COUNTERS
from tests.kernel.lab import need_blob
from tests.kernel.storm import storm

pytestmark = pytest.mark.kernel
BENCH = Path(__file__).resolve().parents[2] / "bpf" / "build" / "stamp.blob"
FILLED = 200_000
CAPACITY = (1 << 24) // 64


@pytest.fixture
def loaded() -> Iterator[Loaded]:
    need_blob("breaker")
    if not BENCH.exists():
        pytest.skip("the bench object is not built: make -C bpf bench")
    stamp = load(Blob.parse(BENCH.read_bytes()))
    yield stamp
    stamp.close()


@pytest.fixture
def ring(loaded: Loaded) -> Iterator[Ring]:
    consumer = Ring(loaded.maps["events"])
    yield consumer
    consumer.close()


def counters(loaded: Loaded) -> tuple[int, int]:
    raw = Map(loaded.maps["counters"]).get(bytes(4))
    assert raw is not None
    sent, lost = COUNTERS.unpack(raw)
    return sent, lost


def fill(loaded: Loaded) -> int:
    """How many records were made, sent or lost."""
    return bpf.prog_run(loaded.programs["pc_fill"], bytes(8))[0]


def test_every_record_is_received_or_counted_lost(loaded: Loaded, ring: Ring) -> None:
    made = fill(loaded) + fill(loaded)
    sent, lost = counters(loaded)
    assert made == 2 * FILLED == sent + lost
    assert len(ring.drain(1 << 30)) == sent
    assert CAPACITY - 1 <= sent <= CAPACITY


def test_order_is_kept_over_the_wrap(loaded: Loaded, ring: Ring) -> None:
    for _ in range(3):
        fill(loaded)
        assert [int.from_bytes(r[:8], "little") for r in ring.drain(1 << 30)] == list(range(FILLED))
    assert counters(loaded) == (3 * FILLED, 0)


def test_a_limit_leaves_the_rest_for_the_next_drain(loaded: Loaded, ring: Ring) -> None:
    fill(loaded)
    assert len(ring.drain(10)) == 10
    assert decode(ring.drain(1)[0]).at_ns == 10
    assert len(ring.drain(1 << 30)) == FILLED - 11
    assert ring.drain() == []


def test_waiting_ends_with_an_event_and_with_the_time(loaded: Loaded, ring: Ring) -> None:
    assert ring.wait(0.001) is False
    timer = threading.Timer(0.02, lambda: bpf.prog_run(loaded.programs["pc_tick"], bytes(8)))
    timer.start()
    assert ring.wait(5) is True
    timer.join()
    assert len(ring.drain()) == 1


def test_a_second_consumer_in_the_same_process_sees_what_the_first_left(loaded: Loaded, ring: Ring) -> None:
    fill(loaded)
    ring.drain(100)
    other = Ring(loaded.maps["events"])
    assert decode(other.drain(1)[0]).at_ns == 100
    other.close()


def test_a_storm_from_every_cpu_is_accounted_exactly(loaded: Loaded) -> None:
    """Two seconds; `python -m tests.kernel.storm --seconds 600` is the long form."""
    result = storm(2, os.cpu_count() or 1)
    assert result.exact
    assert result.received > 0
    assert result.memory_late < result.memory_early + 20_000
