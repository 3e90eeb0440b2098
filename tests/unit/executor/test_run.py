"""When a run is finished."""

from __future__ import annotations

from tests.unit.telemetry.runs import act, finished


def test_an_outcome_that_the_loop_does_not_know_yet_does_not_finish_a_run() -> None:
    """An action on another thread has an outcome before the loop has done what follows from it: a person is called
    before the receipt is written."""
    one, other = act(), act()
    run = finished(one, other)
    assert not run.finished
    one.over = True
    assert not run.finished
    other.over = True
    assert run.finished
    assert finished().finished, "a decision to do nothing"
