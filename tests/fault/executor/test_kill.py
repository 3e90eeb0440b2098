"""kill -9 of the real executor at every labelled step of a run, on recorded events; `make test-crash` sweeps more.

After the restart no action is lost, none is done twice, and the executor works.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fault.executor import evidence
from tests.fault.executor.setting import Teller, copy, why

# The first time of each step of a short life: start, arm, an event through to its receipts, close.
STEPS = (
    *("log-roll", "commit", "log-reconcile", "decide", "record-intent", "service-start", "record-outcome", "keep"),
    *("sequence", "record-config", "switch", "event", "act-open_circuit", "act-notify", "submit-outcome"),
    *("act-recreate", "service-destroy", "log-receipt", "stop", "leave", "disarm", "log-close"),
)
LABELS = (*(f"{step}.{side}#1" for step in STEPS for side in ("before", "after")), "told.before#1")
LATER = ("record-intent.after#2", "record-intent.after#3", "service-start.before#2", "service-start.after#2")
KILLED = -9


@pytest.mark.parametrize("label", [*LABELS, *LATER])
def test_after_a_kill_nothing_is_lost_and_nothing_is_done_twice(
    label: str, prepared: Path, teller: Teller, tmp_path: Path
) -> None:
    state = copy(prepared, tmp_path / "state")
    assert teller.tell(state, "live", label, short=True) == KILLED, why(state)
    assert teller.tell(state, "restart") == 0, why(state)
    assert evidence.objections(state) == []
    truth = [line["what"] for line in evidence.truth_of(state)]
    again = truth[truth.index("restarted") :]
    assert again.count("told") == 3, "after the restart an event has its run and the two that follow"


def test_every_step_of_a_short_life_is_cut(prepared: Path, teller: Teller, tmp_path: Path) -> None:
    state = copy(prepared, tmp_path / "state")
    assert teller.tell(state, "live", short=True) == 0, why(state)
    assert evidence.objections(state) == []
    assert {f"{step}#1" for step in json.loads((state / "labels.json").read_text())} == set(LABELS)


def test_what_is_wrong_is_seen(prepared: Path, teller: Teller, tmp_path: Path) -> None:
    """The check of the other tests speaks up where an outcome is missing and where something began twice."""
    state = copy(prepared, tmp_path / "state")
    assert teller.tell(state, "live", "record-outcome.before#1", short=True) == KILLED, why(state)
    assert any("without outcome" in line for line in evidence.objections(state))
    assert teller.tell(state, "restart") == 0, why(state)
    truth = state / "truth.jsonl"
    begin = next(line for line in truth.read_text().splitlines() if '"recreate"' in line)
    truth.write_text(truth.read_text() + begin + "\n" + begin + "\n")
    assert any("began" in line for line in evidence.objections(state))
