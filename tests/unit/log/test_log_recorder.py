"""What the recorder reads back at a start: recreations in a row as they counted while it ran."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pointcall_attest import entry, run_id
from pointcall_executor.core import guard
from pointcall_executor.core.guard import Grant, GuardState, Limits, Request, Rules
from pointcall_executor.recorder import Recorder
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
