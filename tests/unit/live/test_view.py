"""The view at a terminal, driven by key presses: what it shows, what it asks, what it does only after a yes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from textual.pilot import Pilot

from pointcall_executor.live.view import View
from pointcall_runbook.errors import PointcallError
from tests.unit.live import night
from tests.unit.live.night import BAD, BEGIN, END, HAPPENED, NOW, PAGE, QUIET, FakeNode, screen

SMALL = (80, 24)


async def until(pilot: Pilot[Any], app: View, words: str) -> str:
    """The screen once these words are on it."""
    for _ in range(100):
        await pilot.pause(0.02)
        if words in (text := screen(app)):
            return text
    raise AssertionError(f"{words!r} is not on the screen:\n{screen(app)}")


def on_a_terminal(story: Callable[[Pilot[Any], View, FakeNode], Awaitable[None]], node: FakeNode) -> None:
    import asyncio

    async def told() -> None:
        app = View(node, every_s=0.05, clock=lambda: NOW)
        async with app.run_test(size=SMALL) as pilot:
            await story(pilot, app, node)

    asyncio.run(told())


def test_it_shows_what_is_wrong_and_what_to_do() -> None:
    async def story(pilot: Pilot[Any], app: View, _: FakeNode) -> None:
        await until(pilot, app, "DO NEXT")
        text = await until(pilot, app, "p pause")
        assert "‼ service db does not run, recreated 3 times in 1 h" in text
        assert "! circuit to 10.0.0.7:5432 (db) is open: probe in 3 s" in text
        assert "[guard.flapping]" in text

    on_a_terminal(story, FakeNode(BAD, HAPPENED))


def test_it_pauses_only_after_yes_and_says_what_the_executor_said() -> None:
    async def story(pilot: Pilot[Any], app: View, node: FakeNode) -> None:
        await until(pilot, app, "nothing is wrong")
        await pilot.press("p")
        await until(pilot, app, "Pause ALL runbooks on node-7 for 10 minutes?")
        await pilot.press("n")
        await until(pilot, app, "nothing was done")
        await pilot.press("p", "enter", "x")
        await until(pilot, app, "y: yes")
        assert node.asked == []
        await pilot.press("y")
        await until(pilot, app, "Pause done")
        ((method, fields),) = node.asked
        assert (method, fields["seconds"]) == ("Pause", 600)
        assert fields["reason"].startswith("from pointcall top by ")

    on_a_terminal(story, FakeNode())


def test_it_resumes_after_yes() -> None:
    async def story(pilot: Pilot[Any], app: View, node: FakeNode) -> None:
        await until(pilot, app, "ALL ACTIONS PAUSED: look")
        await pilot.press("r", "y")
        await until(pilot, app, "Resume done")
        assert node.asked[0][0] == "Resume"

    on_a_terminal(story, FakeNode(replace(QUIET, state="paused", reason="look", paused_left_ms=9000)))


def test_it_releases_the_circuit_that_was_chosen() -> None:
    async def story(pilot: Pilot[Any], app: View, node: FakeNode) -> None:
        await until(pilot, app, "WRONG NOW")
        await pilot.press("c")
        await until(pilot, app, "10.0.0.7:5432 db: open, probe in 3 s")
        await pilot.press("enter")
        await until(pilot, app, "Let connects to 10.0.0.7:5432 through now?")
        await pilot.press("y")
        await until(pilot, app, "ReleaseCircuit done")
        assert node.asked[0][1]["address"] == "10.0.0.7"
        assert node.asked[0][1]["port"] == 5432

    on_a_terminal(story, FakeNode(BAD))


def test_a_look_that_fails_in_another_way_is_not_the_last_one() -> None:
    """The page would stand still, with the clock of then, and look well."""

    async def story(pilot: Pilot[Any], app: View, node: FakeNode) -> None:
        await until(pilot, app, "nothing is wrong")
        look, node.look = node.look, broken  # type: ignore[method-assign]
        await until(pilot, app, "does not answer since 03:04:05 (ValueError: no such field)")
        node.look = look  # type: ignore[method-assign]
        await until(pilot, app, "nothing is wrong")

    def broken() -> Any:
        raise ValueError("no such field")

    on_a_terminal(story, FakeNode())


def test_without_an_open_circuit_there_is_nothing_to_release() -> None:
    async def story(pilot: Pilot[Any], app: View, node: FakeNode) -> None:
        await until(pilot, app, "nothing is wrong")
        await pilot.press("c")
        await until(pilot, app, "no circuit is open")
        assert node.asked == []

    on_a_terminal(story, FakeNode())


def test_a_refusal_is_not_shown_as_done() -> None:
    async def story(pilot: Pilot[Any], app: View, node: FakeNode) -> None:
        node.refuse = PointcallError("this caller may not call that method", id="api.denied")
        await until(pilot, app, "nothing is wrong")
        await pilot.press("p", "y")
        await until(pilot, app, "NOT DONE: this caller may not call that method [api.denied]")

    on_a_terminal(story, FakeNode())


def test_an_executor_that_goes_away_and_comes_back_is_said_honestly() -> None:
    async def story(pilot: Pilot[Any], app: View, node: FakeNode) -> None:
        await until(pilot, app, "node-7  ARMED")
        node.away = True
        text = await until(pilot, app, "the executor does not answer since 03:04:05")
        assert "NO ANSWER" in text
        assert "ARMED" not in text.splitlines()[0]
        node.away = False
        await until(pilot, app, "node-7  ARMED")

    on_a_terminal(story, FakeNode())


def test_one_that_never_answered_is_said_too() -> None:
    async def story(pilot: Pilot[Any], app: View, _: FakeNode) -> None:
        await until(pilot, app, "nothing is known about this node")

    node = FakeNode()
    node.away = True
    on_a_terminal(story, node)


def test_text_of_the_executor_is_never_markup() -> None:
    async def story(pilot: Pilot[Any], app: View, _: FakeNode) -> None:
        await until(pilot, app, "[red]x[/red] [link=http://e/]y")

    on_a_terminal(story, FakeNode(replace(QUIET, state="failed", reason="[red]x[/red] [link=http://e/]y")))


def test_help_and_quit() -> None:
    async def story(pilot: Pilot[Any], app: View, _: FakeNode) -> None:
        await until(pilot, app, "nothing is wrong")
        await pilot.press("question_mark")
        await until(pilot, app, "what would have allowed it")
        await pilot.press("x")
        await until(pilot, app, "nothing is wrong")
        await pilot.press("q")
        await pilot.pause()
        assert not app.is_running

    on_a_terminal(story, FakeNode())


def test_the_picture_in_the_docs_is_what_the_view_shows() -> None:
    """Made by `python -m tests.unit.live.night`."""
    import asyncio

    shown = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    assert shown == asyncio.run(night.shot())
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert len(shown.splitlines()) == 24


@pytest.mark.parametrize("verb", ["status", "events", "pause", "doctor"])
def test_other_verbs_do_not_load_the_library_of_the_view(verb: str) -> None:
    code = (
        "import sys\nfrom pointcall_executor import cli\n"
        f"try: cli.main(['{verb}', '--help'])\nexcept SystemExit: pass\n"
        "print('textual' in sys.modules, file=sys.stderr)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert done.stderr.split() == ["False"]
