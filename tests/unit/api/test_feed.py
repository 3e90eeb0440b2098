"""The feed: every item exactly once, also across restarts; what was overwritten is counted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointcall_attest import entry
from pointcall_executor import feed
from pointcall_executor.agent_api.errors import RequestError
from pointcall_executor.core.event import CircuitEvent, Destination, Kind
from pointcall_executor.feed import Changes, FeedItem, FeedPage, page
from pointcall_runbook.vocabulary import Address
from tests.unit.report.sample_log import BOOT_NS, START, SampleLog

INSTANCE = "0123456789abcdef"
START_NS = int(START.timestamp() * 1e9)


def changes(instance: str = INSTANCE) -> Changes:
    return Changes(instance, lambda ns: START_NS + ns - BOOT_NS)


def opened(after_s: float = 0, kind: Kind = Kind.CIRCUIT_OPENED) -> CircuitEvent:
    to = Destination(Address.parse("10.0.0.7"), 5432)
    return CircuitEvent(kind, BOOT_NS + int(after_s * 1e9), to, 5, 111, 0, 0)


def everything(log: SampleLog, seen: Changes, cursor: str) -> tuple[list[FeedItem], FeedPage]:
    found: list[FeedItem] = []
    while True:
        got = page(log, seen, cursor, 0)
        found += got.items
        cursor = got.cursor
        if not got.more:
            return found, got


def test_a_run_is_one_line_with_what_became_of_it() -> None:
    log = SampleLog()
    log.recover()
    log.recover(refused_by="guard.rate")
    log.recover(outcome="failed", confirmed=False)
    items = page(log, changes(), "", 3).items
    assert [i.level for i in items] == ["info", "warning", "alarm"]
    assert items[0].text == "refusing-dependency on CircuitOpened: recreate service/db: applied (3.9 ms)"
    assert "held back by guard.rate" in items[1].text
    assert all(i.run and i.kind == "run" and i.recorded for i in items)


def test_a_refusal_says_what_would_have_allowed_it() -> None:
    log = SampleLog()
    log.refuse()
    (item,) = page(log, changes(), "", 1).items
    assert (item.kind, item.id, item.hint) == ("refusal", "manifest.expired", "sign a newer manifest")


def test_intents_outcomes_of_runs_and_accesses_are_not_told_twice() -> None:
    log = SampleLog()
    log.recover()
    log.append(entry.Access(role="auditor", method="x", count=3))
    assert [i.kind for i in page(log, changes(), "", 100).items] == ["epoch", "run"]


def test_what_a_crash_left_open_is_an_alarm() -> None:
    log = SampleLog()
    run = log.recover().run
    body = entry.OutcomeBody(
        action="recreate",
        target="db",
        outcome="unconfirmed",
        detail={"reason": "it ended"},
        postcondition="",
        undo=None,
    )
    log.append(body, run)
    item = page(log, changes(), "", 1).items[-1]
    assert (item.kind, item.level, item.text) == ("action", "alarm", "recreate db: unconfirmed (it ended)")


def test_text_from_outside_is_escaped() -> None:
    log = SampleLog()
    log.append(entry.Config(what="paused", detail={"reason": "\x1b[2J\u202egood"}))
    (item,) = page(log, changes(), "", 1).items
    assert "\x1b" not in item.text
    assert "\\u{202e}" in item.text


def test_a_cursor_goes_on_where_it_ended() -> None:
    log, seen = SampleLog(), changes()
    first = page(log, seen, "", 0)
    assert first.items == ()
    seen.noted(opened(1))
    log.sleep(2)
    log.recover()
    items, last = everything(log, seen, first.cursor)
    assert [(i.kind, i.recorded) for i in items] == [("circuit", False), ("run", True)]
    assert items[0].text == "circuit to tcp://10.0.0.7:5432 opened after 5 failures"
    assert everything(log, seen, last.cursor)[0] == []


def test_after_a_restart_the_log_goes_on_and_circuits_begin_anew() -> None:
    log, before = SampleLog(), changes()
    before.noted(opened())
    cursor = page(log, before, "", 0).cursor
    log.recover()
    after = changes("f" * 16)
    after.noted(opened(kind=Kind.CIRCUIT_CLOSED))
    got = page(log, after, cursor, 0)
    assert got.restarted
    assert {i.kind for i in got.items} == {"run", "circuit"}
    assert not page(log, after, got.cursor, 0).restarted


def test_what_was_overwritten_is_counted_exactly() -> None:
    log, seen = SampleLog(), changes()
    cursor = page(log, seen, "", 0).cursor
    for _ in range(feed.KEPT_MAX + 7):
        seen.noted(opened())
    got = page(log, seen, cursor, 0)
    assert (got.missed, len(got.items)) == (7, feed.KEPT_MAX)
    assert page(log, seen, got.cursor, 0).missed == 0


def test_a_log_that_is_shorter_than_the_cursor_does_no_harm() -> None:
    assert page(SampleLog(), changes(), f"999999.{INSTANCE}.0", 0).items == ()


@pytest.mark.parametrize("text", ["x", "1.2", f"-1.{INSTANCE}.0", f"01.{INSTANCE}.0", f"1.{INSTANCE}.0\n", "9" * 400])
def test_a_cursor_that_no_answer_gave_is_refused(text: str) -> None:
    with pytest.raises(RequestError) as refusal:
        page(SampleLog(), changes(), text, 0)
    assert refusal.value.id == "api.cursor"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["run", "refuse", "circuit", "ask", "restart"]), max_size=30), st.integers(1, 5))
def test_every_item_comes_exactly_once(story: list[str], window: int) -> None:
    """Whatever happens between two questions, and however small the windows are."""
    log, seen = SampleLog(), changes()
    found: list[FeedItem] = []
    cursor, told, restarts = page(log, seen, "", 0).cursor, 0, 0
    kept = feed.WINDOW, feed.PAGE
    feed.WINDOW, feed.PAGE = window, max(1, window - 1)  # type: ignore[misc]
    try:
        for step in [*story, "ask"]:
            log.sleep(1)
            match step:
                case "run":
                    log.recover()
                case "refuse":
                    log.refuse()
                case "circuit":
                    seen.noted(opened())
                    told += 1
                case "restart":  # what nobody asked for is gone with the process
                    items, got = everything(log, seen, cursor)
                    found, cursor = found + items, got.cursor
                    restarts += 1
                    seen = changes(f"{restarts:016x}")
                case _:
                    items, got = everything(log, seen, cursor)
                    found, cursor = found + items, got.cursor
    finally:
        feed.WINDOW, feed.PAGE = kept  # type: ignore[misc]
    recorded = [i.index for i in found if i.recorded]
    assert recorded == [e.index for e in log.log if e.kind in ("receipt", "refusal")]
    assert len(found) - len(recorded) == told
