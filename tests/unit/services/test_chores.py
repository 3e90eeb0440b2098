"""Chores are done in order of time, at once when somebody waits; a failure or a bug of one does not stop the next."""

from __future__ import annotations

import threading

import pytest

from pointcall_executor.services.chores import Chores


def test_chores_wait_for_their_time_and_are_done_in_its_order() -> None:
    chores, did = Chores(), []
    done = threading.Event()
    chores.later(0.10, lambda: (did.append("late"), done.set())[1])
    chores.later(0.02, lambda: did.append("soon"))
    chores.later(60, lambda: did.append("much later"))
    assert done.wait(10)
    assert did == ["soon", "late"]
    assert chores.finish()
    assert did == ["soon", "late", "much later"]


def test_nothing_to_do_is_finished() -> None:
    assert Chores().finish()


def test_what_does_not_end_is_not_waited_for_for_ever() -> None:
    chores, go = Chores(), threading.Event()
    chores.later(0, lambda: go.wait(10) and None)
    assert not chores.finish(0.05)
    go.set()
    assert chores.finish()


def test_a_failure_is_dropped_and_a_chore_may_ask_for_another() -> None:
    chores, did = Chores(), []

    def fail() -> None:
        raise OSError(16, "busy")

    chores.later(0, fail)
    chores.later(0, lambda: chores.later(60, lambda: did.append("second")))
    assert chores.finish()
    assert did == ["second"]


def test_a_bug_is_shown_and_the_next_chore_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(args.exc_type))
    chores, did = Chores(), []

    def mistaken() -> None:
        raise AssertionError

    chores.later(0, mistaken)
    chores.finish()
    thread = chores._thread
    assert thread is not None
    thread.join(10)
    chores.later(0, lambda: did.append("next"))
    assert chores.finish()
    assert (did, shown) == (["next"], [AssertionError])
