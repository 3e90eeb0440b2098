"""The view itself: asks the executor every second from a thread, shows the picture, and takes three decisions.

Pausing, resuming and releasing a circuit are asked again before they are done. Everything that an executor says is
printed as text, never as markup.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen
from textual.widgets import Footer, OptionList, Static
from textual.widgets.option_list import Option

from pointcall_executor.api.client import Client
from pointcall_executor.cli.connection import reason_by
from pointcall_executor.cli.status import left, told_apart, where
from pointcall_executor.live.picture import Picture, Row, Seen, page, picture
from pointcall_runbook.errors import PointcallError

PAUSE_SECONDS: Final = 600
KEPT_ITEMS: Final = 200
TIMEOUT_S: Final = 3.0
STYLES: Final = {
    "head": "bold reverse", "title": "bold", "alarm": "bold red", "warning": "yellow", "info": "", "do": "bold cyan",
}  # fmt: skip
HELP: Final = """\
This node as it is now. Times are UTC. Any key ends this page.

 WRONG NOW   what is not as it should be; ‼ is worse than !
 DO NEXT     what a person can do about it
 HELD BACK   what was not done, and what would have allowed it
 LAST DONE   runs, actions by hand, circuits, newest first

 p  pause: no runbook acts for 10 minutes; circuits go on
 r  resume: end a pause
 c  release a circuit: let connects through now
 q  quit; nothing changes on the node"""


class Node(Protocol):
    """What the view asks of an executor. One method may be running at a time."""

    def look(self) -> tuple[Any, list[Any]]: ...
    def control(self, method: str, **fields: Any) -> str: ...


class Executor:
    """The executor behind a socket: every look on a connection of its own, so that a restart is no event."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._cursor = ""

    def look(self) -> tuple[Any, list[Any]]:
        """The status and what happened since the last look. PointcallError where it does not answer."""
        with Client(self.socket, timeout_s=TIMEOUT_S) as client:
            status = client.call("Status/GetStatus")
            answer = client.call("Events/ListEvents", cursor=self._cursor, last=0 if self._cursor else 100)
        self._cursor = answer.cursor
        return status, list(answer.items)

    def control(self, method: str, **fields: Any) -> str:
        """Change the node; one sentence about it."""
        with Client(self.socket, timeout_s=TIMEOUT_S) as client:
            answer = client.call(f"Control/{method}", **fields)
        return f"{answer.state}: {answer.detail}"


class Confirm(ModalScreen[bool]):
    """A question that only `y` answers with yes."""

    CSS = """
    Confirm { align: center middle; }
    #question { width: 70; padding: 1 2; border: heavy $warning; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "yes"),
        Binding("n,escape,q", "answer(False)", "no"),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        yield Static(Text(f"{self._question}\n\ny: yes    n: no"), id="question")

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)


class Choose(ModalScreen[int | None]):
    """One of several, or none."""

    CSS = """
    Choose { align: center middle; }
    #choices { width: 70; height: auto; max-height: 16; border: heavy $warning; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "none", "none")]

    def __init__(self, title: str, choices: list[str]) -> None:
        super().__init__()
        self._title, self._choices = title, choices

    def compose(self) -> ComposeResult:
        made = OptionList(*(Option(Text(choice)) for choice in self._choices), id="choices")
        made.border_title = Text(self._title).plain
        yield made

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option_index)

    def action_none(self) -> None:
        self.dismiss(None)


class Help(ModalScreen[None]):
    """What is what; any key ends it."""

    CSS = """
    Help { align: center middle; }
    #help { width: 76; padding: 1 2; border: heavy $primary; background: $surface; }
    """

    def compose(self) -> ComposeResult:
        yield Static(Text(HELP), id="help")

    def on_key(self) -> None:
        self.dismiss(None)


class View(App[None]):
    """The live view. `clock` gives the time, `node` the executor."""

    CSS = """
    Screen { layers: base; }
    #page { height: 1fr; width: 1fr; }
    #said { height: 1; width: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "pause", "pause"),
        Binding("r", "resume", "resume"),
        Binding("c", "release", "release circuit"),
        Binding("question_mark", "help", "help"),
        Binding("q", "quit", "quit"),
    ]
    ENABLE_COMMAND_PALETTE = False

    def __init__(
        self, node: Node, *, every_s: float = 1.0, socket: str = "", clock: Callable[[], datetime] | None = None
    ) -> None:
        super().__init__()
        self._node, self._every_s, self._socket = node, every_s, socket
        self._clock = clock or (lambda: datetime.now(UTC))
        self._status: Any | None = None
        self._items: list[Any] = []
        self._away_since: datetime | None = None
        self._away_why = ""
        self._stuck = False
        self._busy = False

    def compose(self) -> ComposeResult:
        yield Static(id="page")
        yield Static(id="said")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.look()
        self.set_interval(self._every_s, self.look)

    def on_resize(self) -> None:
        self.draw()

    # ---- looking ---------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Ask in a thread, unless the last question is still open."""
        if not self._busy:
            self._busy = True
            self.run_worker(self._ask, thread=True, exit_on_error=False)

    def _ask(self) -> None:
        try:
            status, items = self._node.look()
        except PointcallError as refusal:
            self.call_from_thread(self._no_answer, refusal.message)
        except Exception as error:  # a look that ended otherwise must not be the last one: the page would stand still
            self.call_from_thread(self._no_answer, f"{type(error).__name__}: {error}")
        else:
            self.call_from_thread(self._answered, status, items)

    def _no_answer(self, why: str) -> None:
        self._busy, self._away_why = False, why
        self._away_since = self._away_since or self._clock()
        self.draw()

    def _answered(self, status: Any, items: list[Any]) -> None:
        before = self._status
        same_life = before is not None and not self._away_since and status.uptime_ms >= before.uptime_ms
        self._stuck = bool(same_life and before is not None and status.beats == before.beats)
        self._status, self._away_since, self._busy = status, None, False
        self._items = [*self._items, *items][-KEPT_ITEMS:]
        self.draw()

    def seen(self) -> Picture:
        """What there is to say now."""
        now = self._clock()
        return picture(
            Seen(self._status, self._items, now, self._away_since, self._away_why, self._stuck, self._socket)
        )

    def draw(self) -> None:
        """The page in the size that the terminal has now."""
        shown = self.query_one("#page", Static)
        width, height = max(20, self.size.width), max(6, self.size.height - 2)
        text = Text(no_wrap=True, overflow="crop")
        if self._status is None and self._away_since is None:
            text.append("asking the executor ...")
        else:
            for row in page(self.seen(), width, height, self._clock()):
                _append(text, row)
        shown.update(text)

    def say(self, words: str) -> None:
        """One line above the keys."""
        self.query_one("#said", Static).update(Text(words, style="bold", no_wrap=True, overflow="ellipsis"))

    # ---- deciding --------------------------------------------------------------------------------------------------

    def action_help(self) -> None:
        self.push_screen(Help())

    def action_pause(self) -> None:
        question = (
            f"Pause ALL runbooks on {self._called()} for {PAUSE_SECONDS // 60} minutes?\n\n"
            "Nothing is recreated meanwhile. Circuits in the kernel go on. It ends by itself."
        )
        self._confirm(question, "Pause", seconds=PAUSE_SECONDS)

    def action_resume(self) -> None:
        self._confirm(f"Let the runbooks on {self._called()} act again?", "Resume")

    def action_release(self) -> None:
        circuits = [c for c in self._status.circuits if c.state != "closed"] if self._status else []
        if not circuits:
            self.say("no circuit is open")
            return
        choices = [f"{told_apart(c)} {c.service}: {c.state}, {left(c)}" for c in circuits]

        def chosen(index: int | None) -> None:
            if index is not None:
                circuit = circuits[index]
                question = (
                    f"Let connects to {where(circuit)} through now?\n\nIf it still fails, the circuit opens again."
                )
                self._confirm(question, "ReleaseCircuit", address=circuit.address, port=circuit.port)

        self.push_screen(Choose("Which circuit? Enter chooses, Escape leaves", choices), chosen)

    def _called(self) -> str:
        return str(self._status.node) if self._status is not None else "this node"

    def _confirm(self, question: str, method: str, **fields: Any) -> None:
        def answered(yes: bool | None) -> None:
            if not yes:
                self.say("nothing was done")
                return
            self.say("asking the executor ...")
            call = functools.partial(self._control, method, fields | {"reason": reason_by("pointcall top")})
            self.run_worker(call, thread=True, exit_on_error=False)

        self.push_screen(Confirm(question), answered)

    def _control(self, method: str, fields: dict[str, Any]) -> None:
        try:
            words = self._node.control(method, **fields)
        except PointcallError as refusal:
            words = f"NOT DONE: {refusal.message} [{refusal.id}]"
        self.call_from_thread(self.say, words)
        self.call_from_thread(self.look)


def _append(text: Text, row: Row) -> None:
    text.append(row.text + "\n", style=STYLES[row.style])


def watch(socket: Path, every_s: float) -> None:
    """Show the node behind this socket until `q`."""
    View(Executor(socket), every_s=every_s, socket=str(socket)).run()
