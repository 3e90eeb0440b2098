"""Operations of storage that do not end are reported, once for each time that the limit passes."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from pointcall_executor.core.event import Kind, Source, StorageEvent, decode, encode
from pointcall_executor.core.hung import InFlight, Known, What, look
from pointcall_runbook.vocabulary import Operation

LIMIT = 60
DISK = What(7, 8 << 20, Operation.WRITE)
OTHER = What(7, 8 << 20, Operation.READ)

whats = st.sampled_from([What(c, d, o) for c in (0, 7) for d in (1, 2) for o in Operation])
# (what, when it begins, when it ends), in the steps of a story; a look each step.
stories = st.lists(st.tuples(whats, st.integers(0, 300), st.integers(1, 400)), max_size=12)


def told(operations: Iterable[tuple[What, int, int]], looks: Iterable[int], limit: int = LIMIT) -> list[StorageEvent]:
    known: Known = {}
    found = []
    for now in looks:
        going = [InFlight(what, begin) for what, begin, took in operations if begin <= now < begin + took]
        known, reports = look(known, going, now, limit, Source.FUSE)
        found += reports
    return found


def test_it_is_reported_when_the_limit_passes_and_each_time_that_it_passes_again() -> None:
    found = told([(DISK, 10, 200)], range(400))
    assert [(e.at_ns, e.longest_ns) for e in found] == [(70, 60), (130, 120), (190, 180)]


def test_a_report_counts_what_is_in_flight_and_what_of_it_is_late() -> None:
    story = [(DISK, 10, 500), (DISK, 15, 500), (DISK, 65, 500), (OTHER, 0, 50)]
    (event,) = told(story, [80])
    assert event == StorageEvent(Kind.STORAGE_SLOW, 80, 7, 8 << 20, Operation.WRITE, 3, 2, 0, Source.FUSE, 70)
    assert decode(encode(event)) == event


def test_one_that_hangs_after_another_ended_is_reported_when_its_own_limit_passes() -> None:
    found = told([(DISK, 0, 65), (DISK, 20, 100)], range(200))
    assert [(e.at_ns, e.longest_ns, e.slow) for e in found] == [(60, 60, 1), (80, 60, 1)]


def test_one_that_hangs_beside_another_is_told_with_it() -> None:
    found = told([(DISK, 0, 200), (DISK, 20, 200)], range(200))
    assert [(e.at_ns, e.slow) for e in found] == [(60, 1), (120, 2), (180, 2)]


def test_a_begin_that_is_newer_than_the_look_counts_and_is_not_late() -> None:
    _, (event,) = look({}, [InFlight(DISK, 0), InFlight(DISK, 65)], 60, LIMIT, Source.VFS)
    assert (event.operations, event.slow, event.longest_ns) == (2, 1, 60)


@given(stories, st.integers(1, 120), st.integers(1, 7))
def test_what_ends_in_time_is_never_reported_and_what_does_not_always_is(
    story: list[tuple[What, int, int]], limit: int, step: int
) -> None:
    looks = range(0, 800, step)
    reports = told(story, looks, limit)
    late = {what for what, begin, took in story if any(begin + limit <= now < begin + took for now in looks)}
    assert {What(r.cgroup, r.device, r.operation) for r in reports} == late
    assert {(r.errors, r.source, r.kind) for r in reports} <= {(0, Source.FUSE, Kind.STORAGE_SLOW)}


@given(stories, st.integers(1, 120), st.integers(1, 7))
def test_every_report_is_true_and_none_comes_too_soon_after_another(
    story: list[tuple[What, int, int]], limit: int, step: int
) -> None:
    """Another follows sooner only where everything that was late had ended in between."""
    last: dict[What, int] = {}
    for report in told(story, range(0, 800, step), limit):
        what, now = What(report.cgroup, report.device, report.operation), report.at_ns
        ages = [now - b for w, b, took in story if w == what and b <= now < b + took]
        assert (report.operations, report.longest_ns) == (len(ages), max(ages))
        assert report.slow == sum(age >= limit for age in ages) >= 1
        if what in last and now - last[what] < limit:
            between = range(last[what], now, step)
            assert any(not any(w == what and b + limit <= t < b + took for w, b, took in story) for t in between)
        last[what] = now


@given(stories, st.integers(0, 400), st.integers(1, 120))
def test_the_order_in_which_the_kernel_lists_them_does_not_matter(
    story: list[tuple[What, int, int]], now: int, limit: int
) -> None:
    going = [InFlight(what, begin) for what, begin, took in story if begin <= now < begin + took]
    one, first = look({}, going, now, limit, Source.FUSE)
    other, second = look({}, reversed(going), now, limit, Source.FUSE)
    assert one == other
    assert sorted(map(repr, first)) == sorted(map(repr, second))
