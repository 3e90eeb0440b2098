"""What a person on call is told, case by case; and that it fits the terminal whatever happens."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointcall_executor.api import backend
from pointcall_executor.feed import FeedItem
from pointcall_executor.live.picture import Seen, page, picture
from tests.unit.live.night import BAD, HAPPENED, NOW, QUIET, later

HELD = backend.HeldBack("01HELD", 0, "fix", "recreate", ("1",), "db", "OomKilled", 65, "a" * 64, "node-7")


def told(status: backend.NodeStatus | None, *items: FeedItem, **over: Any) -> Any:
    return picture(Seen(status, items, NOW, **over))


def test_a_quiet_node_has_nothing_wrong_and_says_what_only_watches() -> None:
    got = told(QUIET)
    assert (got.wrong, got.next, got.level) == ((), (), "info")
    assert [line.text for line in got.held] == ["only watching (mode monitor): slow-filesystem"]


def test_evidence_is_not_called_old_before_its_renewal_is_late() -> None:
    for age_ms, life_ms in ((899_000, 900_000), (1_000_000, 900_000), (86_000_000, 86_400_000), (80_000, 60_000)):
        status = replace(QUIET, epoch_age_ms=age_ms, epoch_life_ms=life_ms, evidence_left_ms=2 * life_ms - age_ms)
        assert told(status).wrong == ()


def test_who_waits_for_a_person_comes_first_with_what_to_type() -> None:
    status = replace(BAD, held_back=(HELD,), called=(backend.Called("01RUN", 7),))
    got = told(status)
    assert ["01RUN" in got.wrong[0].text, "approval" in got.wrong[1].text] == [True, True]
    assert got.next[:2] == (
        "pointcall log show 01RUN; then pointcall acknowledge 01RUN --reason ...", "pointcall approve 01HELD"
    )  # fmt: skip
    many = told(replace(status, called=tuple(backend.Called(f"R{n}", 7) for n in range(50))))
    assert [line.text for line in many.wrong if "more" in line.text] == ["47 more escalations wait for an answer"]
    assert "pointcall approve --list" in many.next
    assert any("service db does not run" in line.text for line in many.wrong)


def test_a_node_that_only_watches_says_so() -> None:
    got = told(replace(QUIET, mode="monitor", runbooks=(replace(QUIET.runbooks[0], mode="monitor"),)))
    assert [line.text for line in got.held] == [
        "only watching (this node is in mode monitor): no action is done, no connect refused"
    ]


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "disarmed": ({"state": "disarmed"}, "alarm", "nothing is armed"),
    "failed": ({"state": "failed", "reason": "disk full"}, "alarm", "the executor failed: disk full"),
    "the manifest ends soon": ({"expires": "2026-11-23T10:00:00Z"}, "warning", "the manifest ends in 6 h 55 min"),
    "the manifest ends now": ({"expires": "2026-11-23T03:10:00Z"}, "alarm", "the manifest ends in 5 min 55 s"),
    "a service does not run": (
        {"services": (backend.ServiceState("db", "process", "stopped", 2),)},
        "alarm",
        "service db does not run, recreated 2 times in 1 h",
    ),
    "a service does not accept": (
        {"services": (backend.ServiceState("db", "process", "running", 0, 7, "not accepting"),)},
        "alarm",
        "service db runs (pid 7) but does not accept",
    ),
    "a service comes and goes": (
        {"services": (backend.ServiceState("db", "process", "running", 3, 7, "accepting"),)},
        "warning",
        "service db was recreated 3 times in 1 h",
    ),
    "an open circuit": (
        {"circuits": (backend.CircuitState("::1", 9, "open", 5, "", 3_000),)},
        "warning",
        "circuit to [::1]:9 is open: probe in 3 s; 5 connects refused",
    ),
    "a forced circuit": (
        {"circuits": (backend.CircuitState("10.0.0.7", 9, "forced", 5, "db", 65_000),)},
        "warning",
        "circuit to 10.0.0.7:9 (db) is held open: ends in 1 min 5 s",
    ),
    "a quarantined runbook": (
        {"runbooks": (replace(QUIET.runbooks[0], state="quarantined"),)},
        "alarm",
        "runbook refusing-dependency trapped",
    ),
    "lost events": ({"lost_events": 7}, "warning", "7 events were lost"),
    "a mirror that is late": (
        {"copies": (backend.LogCopy("mirror", 7, 2, 61_000, 3, "no route"),)},
        "warning",
        "mirror: 2 entries behind for 1 min 1 s",
    ),
    "old evidence": (
        {"epoch_age_ms": 1_200_000, "evidence_left_ms": 600_000},
        "alarm",
        "the evidence is 20 min old: it cannot be renewed; in 10 min everything is disarmed",
    ),
    "old evidence of short epochs": (
        {"epoch_age_ms": 91_000, "epoch_life_ms": 60_000, "evidence_left_ms": 29_000},
        "alarm",
        "the evidence is 1 min 31 s old",
    ),
    "old evidence while nothing is armed": (
        {"epoch_age_ms": 1_200_000, "manifest": ""},
        "alarm",
        "the evidence is 20 min old: it cannot be renewed",
    ),
    "somebody was called": (
        {"called": (backend.Called("01RUN", 7),)},
        "alarm",
        "a person was called because of run 01RUN (code 7), and nobody has answered",
    ),
    "an action waits for an approval": (
        {"held_back": (HELD,)},
        "alarm",
        "fix wants recreate db, after OomKilled 1 min 5 s ago: it waits for an approval",
    ),
    "a circuit that only watches": (
        {"circuits": (backend.CircuitState("::1", 9, "open", 5, "", 3_000, watch_only=True),)},
        "warning",
        "circuit to [::1]:9 is open: probe in 3 s; 5 connects would have been refused",
    ),
    "no checkpoints": ({"signed_size": 1, "tree_size": 1500}, "warning", "1499 entries wait"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case: str) -> None:
    over, level, words = WRONG[case]
    got = told(replace(QUIET, **over))
    assert [(line.level, words in line.text) for line in got.wrong] == [(level, True)], got.wrong
    assert got.level == level


def test_the_worst_comes_first() -> None:
    got = told(BAD)
    assert [line.level for line in got.wrong] == ["alarm", "warning"]


def test_no_answer_is_said_with_what_was_known_before() -> None:
    got = told(BAD, away_since=later(-60))
    assert "does not answer since 03:03:05" in got.wrong[0].text
    assert "from before" in got.wrong[0].text
    assert "NO ANSWER" in got.headline
    assert got.next[0].startswith("is it running? systemctl status pointcall")
    nothing = told(None, away_since=NOW)
    assert "nothing is known" in nothing.headline
    assert len(nothing.wrong) == 1


def test_a_stuck_loop_is_said() -> None:
    assert "the core's loop does not turn" in told(QUIET, stuck=True).wrong[0].text


def test_what_is_held_back_says_until_when_and_what_would_allow_it() -> None:
    paused = replace(QUIET, state="paused", reason="I look", paused_left_ms=90_000, in_flight=("service db",))
    got = told(paused, *HAPPENED)
    texts = [line.text for line in got.held]
    assert texts[0] == "ALL ACTIONS PAUSED: I look; ends by itself in 1 min 30 s"
    assert "working on service db now" in texts
    assert "[guard.flapping] recreate db" in texts[-1]
    assert "allowed by: wait" in texts[-1]
    assert "press r to resume" in got.next


def test_alarms_of_the_feed_are_wrong_for_a_while() -> None:
    item = FeedItem("2026-11-23T03:00:00.000000Z", "run", "alarm", "x on Y: recreate db: failed", "R")
    assert "recreate db: failed" in told(QUIET, item).wrong[0].text
    old = picture(Seen(QUIET, [item], NOW + timedelta(hours=1)))
    assert old.wrong == ()


def rows(status: backend.NodeStatus, items: tuple[FeedItem, ...], width: int, height: int) -> list[str]:
    return [row.text for row in page(told(status, *items), width, height, NOW)]


def test_the_page_says_how_much_it_leaves_out() -> None:
    many = replace(BAD, services=tuple(backend.ServiceState(f"s{n}", "process", "stopped", 0) for n in range(40)))
    got = rows(many, HAPPENED, 80, 22)
    assert len(got) <= 22
    (more,) = [row for row in got if re.search(r"… and \d+ more", row) and got.index(row) < got.index(title(got, "DO"))]
    stopped = sum("does not run" in row for row in got[: got.index(more)])
    assert f"… and {40 + 1 - stopped} more" in more, got  # one circuit is open too
    assert all(any(title in row for row in got) for title in ("WRONG NOW", "DO NEXT", "HELD BACK", "LAST DONE"))


def title(got: list[str], words: str) -> str:
    return next(row for row in got if row.startswith(f"── {words}"))


def test_what_was_held_back_long_ago_is_not_held_back_now() -> None:
    """A refusal of last week must not be taken for tonight's."""
    item = replace(HAPPENED[2], at="2026-11-20T03:03:58.000000Z")
    assert all("guard.flapping" not in line.text for line in told(QUIET, item).held)
    run = replace(HAPPENED[1], at="2026-11-20T03:01:10.000000Z")
    assert told(QUIET, run).done[0].text.startswith("2026-11-20 03:01 run: ")


def test_a_digest_does_not_take_the_room_of_the_rest() -> None:
    item = replace(HAPPENED[2], text=f"manifest: want {'ab' * 48}, got {'cd' * 48}", hint="look")
    assert any(f"want {'ab' * 8}…, got {'cd' * 8}…" in row for row in rows(QUIET, (item,), 120, 40))


def test_what_was_done_last_keeps_a_few_rows() -> None:
    runs = tuple(replace(HAPPENED[1], text=f"done {n}") for n in range(40))
    got = rows(BAD, (*runs, *[HAPPENED[2]] * 40), 80, 22)
    assert sum("run: done" in row for row in got) >= 3, got


def test_an_approval_that_was_given_is_not_asked_for_again() -> None:
    item = replace(HAPPENED[2], run="01HELD", id="guard.approval")
    assert all("guard.approval" not in line.text for line in told(QUIET, item).held)
    assert any("guard.approval" in line.text for line in told(replace(QUIET, held_back=(HELD,)), item).held)


def test_a_halted_node_is_not_armed_before_the_halt_is_cleared() -> None:
    assert told(replace(QUIET, state="disarmed", reason="halted: look")).next == (
        "pointcall halt --clear; then pointcall arm DIR",
    )
    assert "pointcall events --kind refusal" in told(replace(QUIET, state="disarmed")).next[0]


def test_a_line_is_whole_where_there_is_room_for_it() -> None:
    """The end of a refusal says what to type."""
    many = tuple(replace(HAPPENED[1], text=f"done {n}") for n in range(40))
    refused = replace(HAPPENED[2], hint="pointcall approve 01K9RBZ0000000000000000000")
    got = rows(QUIET, (*many, *[refused] * 3), 80, 22)
    assert sum("01K9RBZ0000000000000000000" in row for row in got) == 3, got


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 30), st.integers(0, 30), st.integers(0, 40), st.integers(20, 200), st.integers(10, 80),
    st.text(max_size=300),
)  # fmt: skip
def test_it_always_fits_and_the_worst_is_always_there(
    services: int, circuits: int, items: int, width: int, height: int, name: str
) -> None:
    status = replace(
        QUIET,
        node=name.replace("\n", " "),
        services=tuple(backend.ServiceState(f"s{n}", "process", "stopped", 0) for n in range(services)),
        circuits=tuple(backend.CircuitState("10.0.0.7", n, "open", 0) for n in range(circuits)),
    )
    got = rows(status, HAPPENED[:1] * items, width, height)
    assert len(got) <= height
    assert all(len(row) <= width for row in got)
    assert any("WRONG NOW" in row for row in got)
    if services:
        assert "‼" in got[2]
