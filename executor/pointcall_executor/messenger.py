"""The messenger: tells channels that may be slow, beside everything else, and calls people until somebody answers.

One thread sends; the loop owns everything else here. A channel that hangs holds up no decision, and cannot pile up
calls: after one that took long and failed, notifications fail at once that were waiting meanwhile. Not here: what is
remembered about who was called (waiting.py), how a channel is told (channels.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from pydantic import JsonValue

from pointcall_attest import entry
from pointcall_executor.loop import Loop, StoppedError
from pointcall_executor.recorder import Recorder
from pointcall_executor.run import Act, Run
from pointcall_executor.session import Session
from pointcall_executor.waiting import Waiting
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.vocabulary import Level

MESSAGES_MAX: Final = 64  # notifications on their way; a slow channel must not hold up anything else
SLOW_NS: Final = 1_000_000_000  # a failure after so long says that nobody answers there
OWN_CODE: Final = 0  # of an escalation by the executor itself: an action of the run did not do what it should


class Messenger:
    """All methods on the loop thread, but `close`."""

    def __init__(self, loop: Loop, recorder: Recorder, waiting: Waiting) -> None:
        self._loop, self._recorder, self._waiting = loop, recorder, waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="messenger")
        self._telling = 0  # notifications on their way
        self._silent: dict[int, int] = {}  # channel -> when it was found not to answer; its own thread's

    def send(self, number: int, tell: Callable[[], bool], skip: Callable[[str], None], told: Callable[[], None]) -> str:
        """`tell` channel `number` on the messenger's thread (False: in vain), then `told` on the loop. What speaks
        against it, empty if nothing does. `skip` instead of `tell`, with the reason, where the channel was found not to
        answer while this one waited."""
        if self._telling >= MESSAGES_MAX:
            return f"{MESSAGES_MAX} notifications are on their way"
        self._telling += 1

        def ended() -> None:
            self._telling -= 1
            told()

        asked_ns = time.monotonic_ns()

        def work() -> None:
            try:
                if self._answers(number, asked_ns):
                    self._timed(number, tell)
                else:
                    skip("the channel did not answer the message before")
            except BaseException as error:
                self._loop.fail(error)
            else:
                self._loop.post(ended)

        self._thread.submit(work)
        return ""

    def _answers(self, number: int, asked_ns: int) -> bool:
        return asked_ns > self._silent.get(number, -1)

    def _timed(self, number: int, tell: Callable[[], bool]) -> None:
        begun_ns = time.monotonic_ns()
        if not tell() and time.monotonic_ns() - begun_ns >= SLOW_NS:
            self._silent[number] = time.monotonic_ns()

    def called(self, run: Run, channels: tuple[int, ...], code: int, why: str) -> None:
        """A person was called because of this run: call again until somebody answers."""
        if self._waiting.call(run.id, channels, code, time.monotonic_ns()):
            detail: dict[str, JsonValue] = {"run": run.id, "code": code, "why": why}
            self._recorder.submit(entry.Config(what="escalated", detail=detail), run.id)

    def escalate(self, run: Run, act: Act) -> None:
        """An action did not do what it should: call a person, through the runbook's channels or else all."""
        assert act.outcome is not None
        channels = tuple(sorted(run.runbook.grant.channels)) or run.session.channel_numbers
        self.called(run, channels, OWN_CODE, f"{act.call.action} {act.target}: {act.outcome.name.lower()}")
        for number in channels:
            self._tell(run.session, number, OWN_CODE)

    def call_again(self, session: Session, now_ns: int) -> None:
        """Whom nobody has answered: one message for each channel and code, however many runs wait for an answer."""
        told: set[tuple[int, int]] = set()
        for escalation in self._waiting.due(now_ns):
            missing = {(n, escalation.code) for n in escalation.channels or session.channel_numbers} - told
            if self._telling and self._telling + len(missing) > MESSAGES_MAX:
                break  # a channel is slow: whoever is left is called as soon as there is room
            for number, code in sorted(missing):
                self._tell(session, number, code)
            told |= missing
            self._waiting.called_again(escalation.run, now_ns)
        for escalation in self._waiting.escalations.values() if told else ():
            if told.issuperset((n, escalation.code) for n in escalation.channels or session.channel_numbers):
                self._waiting.called_again(escalation.run, now_ns)

    def acknowledge(self, run: str, reason: str) -> None:
        """A person has seen it. StoppedError `escalation.unknown` where nobody was called for this run."""
        if not self._waiting.acknowledge(run):
            raise StoppedError(
                "nobody waits for an answer there", id="escalation.unknown", want="a run that called a person",
                got=run, hint="pointcall status has who waits",
            )  # fmt: skip
        self._recorder.record(entry.Config(what="acknowledged", detail={"run": run, "reason": reason}), run)

    def close(self) -> None:
        """Wait for the message on its way; what has not begun is not sent. After the loop, which gives it work."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _tell(self, session: Session, number: int, code: int) -> None:
        """Tell a channel, without an outcome: it is told again as long as nobody answers.

        Not where too many notifications are on their way already: a channel that hangs would only pile them up.
        """
        if self._telling >= MESSAGES_MAX:
            return

        def told() -> None:
            self._telling -= 1

        def tell() -> bool:
            with contextlib.suppress(PointcallError, OSError):
                session.channels.send(number, Level.CRITICAL, code)
                return True
            return False

        def work() -> None:
            try:
                self._timed(number, tell)  # whoever waits for a person is not passed over, and waits for nothing else
            finally:
                self._loop.post(told)

        with contextlib.suppress(RuntimeError):  # the messenger is closed: the executor ends
            self._thread.submit(work)
            self._telling += 1
