"""What the recorder reads back at a start: recreations in a row as they counted while it ran, and who has disarmed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pointcall_attest import entry, run_id
from pointcall_executor.core import guard
from pointcall_executor.core.guard import Grant, GuardState, Limits, Request, Rules
from pointcall_executor.recorder import Left, Recorder, disarmed
from pointcall_runbook.vocabulary import Outcome, Recreate, service
from tests.unit.log import world

SECOND = 1_000_000_000
RULES = Rules(services=4, services_at_once=4, healthy_delay_ns=60 * SECOND)
Word = Literal["applied", "failed", "unconfirmed", "refused"]
RECREATIONS = st.lists(
    st.tuples(
        st.sampled_from(["api", "db"]),
        st.sampled_from(["applied", "failed", "unconfirmed", "refused"]),
        st.integers(1, 120),
    ),
    max_size=12,
)


@contextmanager
def recorder_of(folder: Path) -> Iterator[Recorder]:
    node = world.Node.boot(folder)
    with closing(node.journal):
        recorder = Recorder(node.journal)
        recorder._keys = node.keys
        yield recorder


def lived(acted: list[tuple[str, Word, int]]) -> GuardState:
    """What the guard holds of recreations that it let through one after the other."""
    state, now_ns = GuardState(), 1000 * SECOND
    for name, word, seconds in acted:
        action, now_ns = Recreate(service(name)), now_ns + seconds * SECOND
        asked = Request("fix", "run-1", action, "enforce", Grant(), Limits(), now_ns)
        state = guard.ended(guard.permitted(state, asked, RULES), "run-1", action)
        state = guard.settled(state, action, Outcome[word.upper()], now_ns, rolled_back=False)
    return state


@given(RECREATIONS)
@example([("api", "failed", 1), ("api", "refused", 1), ("api", "applied", 100)])
@example([("api", "failed", 1), ("api", "refused", 1), ("api", "refused", 100)])
@example([("api", "refused", 1), ("api", "applied", 1), ("api", "refused", 100)])
@settings(max_examples=40, deadline=None)
def test_what_was_refused_at_the_last_moment_counts_after_a_restart_as_it_did_before(
    acted: list[tuple[str, Word, int]],
) -> None:
    """It was let through, so it counts; it was not begun, so it says nothing about the health of the service."""
    with tempfile.TemporaryDirectory() as folder, recorder_of(Path(folder)) as recorder:
        for number, (name, word, _) in enumerate(acted):
            run = run_id.run_id(1_800_000_000_000, number.to_bytes(10))
            recorder.record(entry.Intent(action="recreate", target=name, args={}, grant=f"recreate:{name}"), run)
            body = entry.OutcomeBody(
                action="recreate", target=name, outcome=word, detail={}, postcondition="", undo=None
            )
            recorder.record(body, run)
        left = recorder.reconcile()
    times, now_ns = [], 1000 * SECOND
    for (name, _, seconds), (action, target, _) in zip(acted, left.acted, strict=True):
        now_ns += seconds * SECOND
        assert (action, target) == ("recreate", name)
        times.append((action, target, now_ns))
    after, before = guard.rows_recalled(GuardState(), times, RULES, left.failed), lived(acted)
    assert (after.recreated, after.unwell) == (before.recreated, before.unwell)


ARMED = entry.Config(what="kernel programs", detail={})


def old_log(recorder: Recorder) -> int:
    """A person has disarmed long ago; where to prune."""
    recorder.record(disarmed("the night shift", stays=True))
    for _ in range(3):
        recorder.record(entry.Lost(sensor="s", count=1))
    recorder.checkpoint(force=True)
    return recorder.journal.size


def test_what_a_person_has_disarmed_stays_so_when_the_log_is_pruned(tmp_path: Path) -> None:
    with recorder_of(tmp_path) as recorder:
        recorder.prune(old_log(recorder), "old", 400)
        assert recorder.reconcile().disarmed == "the night shift"
        assert [e.kind for e in recorder.journal.entries()][-2:] == ["config", "prune"]


@pytest.mark.parametrize("durable", [True, False])
def test_who_arms_while_the_log_is_pruned_has_armed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    """Between the look at who has disarmed and the entry that says it once more. `durable`: or is still queued."""
    with recorder_of(tmp_path) as recorder:
        minimum, real, looked = old_log(recorder), recorder._disarmed, []

        def arming(*args: int) -> Left:
            left = real(*args)
            if not looked:
                recorder.record(ARMED) if durable else recorder.journal.enqueue(*recorder._signed(ARMED))
            looked.append(left)
            return left

        with monkeypatch.context() as patch:
            patch.setattr(recorder, "_disarmed", arming)
            recorder.prune(minimum, "old", 400)
        assert [left.disarmed for left in looked] == ["the night shift", None]
        assert recorder.reconcile().disarmed is None


def test_nobody_arms_between_the_look_and_the_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with recorder_of(tmp_path) as recorder, ThreadPoolExecutor(1) as pool:
        minimum, real, arming = old_log(recorder), recorder._disarmed, []

        def looks(*args: int) -> Left:
            left = real(*args)
            arming.append(left)
            if len(arming) == 2:
                armed = pool.submit(recorder.record, ARMED)
                assert not wait([armed], 0.2).done
            return left

        monkeypatch.setattr(recorder, "_disarmed", looks)
        recorder.prune(minimum, "old", 400)
        pool.shutdown()
        monkeypatch.undo()
        assert recorder.reconcile().disarmed is None
