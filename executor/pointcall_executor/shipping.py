"""What leaves the node beside the executor: checkpoints go to witnesses, the log to its mirror. And what is too old
goes: clear texts are erased.

Nothing waits for any of it, neither recovery nor the end of the executor. A network that is gone is normal: it is tried
again, ever more rarely up to a minute, and who is behind for too long is said once in the log, and once when that is
over. Each destination has a thread, and who looks how far they are has another: none of them waits for a second one.
Only the journal's own failure ends it. Not here: how witnesses are asked (witnessing.py), how a mirror is brought up to
date (mirror.py). Spec: docs/spec/mirror.md.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from pydantic import JsonValue

from pointcall_attest import entry
from pointcall_attest.log.checkpoint import Checkpoint
from pointcall_attest.log.witness import WitnessPolicy
from pointcall_executor.config import Config
from pointcall_executor.journal import FORGET_S, FORGET_STEP_MS, Journal
from pointcall_executor.journal_reader import JournalError, JournalReader
from pointcall_executor.recorder import Recorder
from pointcall_executor.retention import first_within
from pointcall_runbook.errors import PointcallError

if TYPE_CHECKING:
    from pointcall_executor.mirror import Pace
    from pointcall_executor.witnessing import Asked

ROUND_S: Final = 1.0  # checkpoints come once a second
MAX_WAIT_S: Final = 60.0  # between two tries of what does not answer
ERASE_EVERY_S: Final = 3600.0
END_S: Final = 1.0  # for what is under way when the executor ends
_DESTINATIONS: Final = ("witnesses", "mirror")


class Say(Protocol):
    """One structured line for whoever watches the process."""

    def __call__(self, text: str, **facts: object) -> None: ...


@dataclass(frozen=True, slots=True)
class Gauge:
    """How one destination stands. `behind` entries it has not yet; `behind_s` seconds since it last had everything."""

    configured: bool = False
    covered: int = 0
    behind: int = 0
    behind_s: float = 0.0
    failures: int = 0
    last_error: str = ""


@dataclass(slots=True)
class _Destination:
    """One destination, as the thread sees it."""

    gauge: Gauge = field(default_factory=Gauge)
    since_s: float | None = None  # not everything is there since then
    due_s: float = 0.0
    wait_s: float = ROUND_S
    late: bool = False  # the log says that it is behind
    refused: str = ""  # the refusal that the log states


class Shipping:
    """Start it after the executor, stop it before. `settings` is asked each round, so they may change."""

    def __init__(self, journal: Journal, recorder: Recorder, settings: Callable[[], Config], say: Say) -> None:
        self._journal, self._recorder, self._settings, self._say = journal, recorder, settings, say
        self._known: dict[str, int] = {}  # witness -> how far it is
        self._cosigned = 0
        self._state = {name: _Destination() for name in _DESTINATIONS}
        self._erase_due_s = 0.0
        self._unforgotten = False  # erased, but a reader holds the old pages
        self._pace: Pace | None = None
        self._stopping = threading.Event()
        self._judging = threading.Lock()  # the state of a destination, as several threads see it
        self._writing = threading.Lock()  # held while the log is written; nothing is written after the end
        self._ended = False
        targets = (self._look, self._ship_to_witnesses, self._ship_to_mirror)
        self._threads = [
            threading.Thread(target=self._run, args=(each,), name="shipping", daemon=True) for each in targets
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """At most `END_S`, or until what is just being written to the log is durable: one entry, with what it erases.

        A request that a bad link holds up is left alone, and nothing comes of it. May be called twice.
        """
        self._stopping.set()
        end_s = time.monotonic() + END_S
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, end_s - time.monotonic()))
        with self._writing:
            self._ended = True

    def gauges(self) -> Mapping[str, Gauge]:
        """How far witnesses and mirror are, for metrics."""
        return {name: state.gauge for name, state in self._state.items()}

    def _run(self, turn: Callable[[JournalReader, float], None]) -> None:
        try:
            with closing(JournalReader.open(self._journal.path)) as reader:
                turn(reader, time.monotonic())
                while not self._stopping.wait(ROUND_S):
                    turn(reader, time.monotonic())
        except JournalError as error:
            self._say("the log is not shipped any more", error=error.id)
        except _Ended:
            pass

    def round(self, reader: JournalReader, now_s: float) -> None:
        """Whatever is due now, one after the other. JournalError if the journal has stopped."""
        for turn in (self._look, self._ship_to_witnesses, self._ship_to_mirror, self._look):
            turn(reader, now_s)

    def _look(self, reader: JournalReader, now_s: float) -> None:
        """How far behind everybody is, also while they are asked; and what is too old."""
        settings = self._settings()
        head = reader.head() if any(getattr(settings, name) for name in _DESTINATIONS) else None
        for name, state in self._state.items():
            self._judge(state, name, settings, head, now_s)
        if now_s >= self._erase_due_s:
            self._erase(reader, settings.clear_text_days)
            self._erase_due_s = now_s + (MAX_WAIT_S if self._unforgotten else ERASE_EVERY_S)

    def _ship_to_witnesses(self, reader: JournalReader, now_s: float) -> None:
        policy = self._settings().witnesses
        if policy:
            self._turn("witnesses", reader, now_s, lambda note: self._witness(policy, note))

    def _ship_to_mirror(self, reader: JournalReader, now_s: float) -> None:
        address = self._settings().mirror
        if address:
            self._turn("mirror", reader, now_s, lambda _: self._mirror(address, reader))

    def _turn(self, name: str, reader: JournalReader, now_s: float, work: Callable[[Checkpoint], int]) -> None:
        """One destination's turn: `work` brings it to a checkpoint and gives back how far it is now."""
        state, head = self._state[name], reader.head()
        if head is not None and head.size > state.gauge.covered and now_s >= state.due_s:
            self._try(state, name, head, now_s, work)

    def _try(
        self, state: _Destination, name: str, head: Checkpoint, now_s: float, work: Callable[[Checkpoint], int]
    ) -> None:
        try:
            covered = work(head)
        except (JournalError, _Ended):
            raise
        except PointcallError as refusal:  # not the network: the other side, or the settings, do not agree
            self._failed(state, now_s, f"{refusal.message} [{refusal.id}]")
            self._refused(state, name, refusal)
        except Exception as error:  # whatever a driver raises for a network that is gone
            self._failed(state, now_s, f"{type(error).__name__}: {error}")
        else:
            with self._judging:
                state.gauge = replace(state.gauge, covered=covered, last_error="")
                if covered >= head.size:
                    state.since_s = None
            state.wait_s, state.due_s, state.refused = ROUND_S, now_s, ""
            if covered < head.size:
                self._failed(state, now_s, "not enough of them answered")

    def _failed(self, state: _Destination, now_s: float, why: str) -> None:
        with self._judging:
            state.gauge = replace(state.gauge, failures=state.gauge.failures + 1, last_error=why[:200])
        state.due_s = now_s + state.wait_s
        state.wait_s = min(state.wait_s * 2, MAX_WAIT_S)

    def _refused(self, state: _Destination, name: str, refusal: PointcallError) -> None:
        """A refusal is an alarm, said once: this log and the other side do not have the same history."""
        if state.refused == refusal.id:
            return
        state.refused = refusal.id
        self._say(f"{name} refuse", check=refusal.id, got=repr(refusal.got))
        texts = (f"{name}: {refusal.message}", refusal.want, refusal.got, refusal.hint)
        what, want, got, hint = (text[:1000] for text in texts)
        with self._writes():
            self._recorder.record(entry.Refusal(check=refusal.id, what=what, want=want, got=got, hint=hint))

    def _judge(self, state: _Destination, name: str, settings: Config, head: Checkpoint | None, now_s: float) -> None:
        with self._judging:
            if not getattr(settings, name):
                state.gauge, state.since_s = Gauge(), None
                return
            behind = max(0, (head.size if head else 0) - state.gauge.covered)
            if behind and state.since_s is None:
                state.since_s = now_s
            behind_s = 0.0 if state.since_s is None else now_s - state.since_s
            state.gauge = replace(state.gauge, configured=True, behind=behind, behind_s=behind_s)
        if behind_s > settings.lag_seconds and not state.late:
            self._lag(state, name, late=True)
        elif state.since_s is None and state.late:
            self._lag(state, name, late=False)

    def _lag(self, state: _Destination, name: str, *, late: bool) -> None:
        """The gap is part of the log: that it began, and that it is over."""
        state.late = late
        what = f"{name} behind" if late else f"{name} caught up"
        gauge = state.gauge
        self._say(what, entries=gauge.behind, error=repr(gauge.last_error))
        detail: dict[str, JsonValue] = {"covered": gauge.covered, "behind": gauge.behind, "error": gauge.last_error}
        with self._writes():
            self._recorder.record(entry.Config(what=what, detail=detail))

    @contextmanager
    def _writes(self) -> Iterator[None]:
        """Around whatever is written to the log: nothing is once `stop` has returned."""
        with self._writing:
            if self._ended:
                raise _Ended
            yield

    def _witness(self, policy_file: str, note: Checkpoint) -> int:
        """Ask all witnesses; how many entries a quorum has signed."""
        from pointcall_executor.witnessing import cosigned

        try:
            policy = WitnessPolicy.parse(Path(policy_file).read_bytes())
        except OSError as error:
            raise WitnessAlarm("the witness policy cannot be read", id="witness.file", got=str(error)) from error
        signed, asked = cosigned(note, self._journal.tree(), policy, self._known)
        alarm = next((a for a in asked if a.outcome == "alarm"), None)
        if alarm is not None:
            raise WitnessAlarm(
                f"the witness {alarm.witness} has seen another history of this log",
                id="witness.alarm",
                want=f"a growth to {note.size} entries",
                got=alarm.detail,
                hint="the log or the witness was rolled back or forked: compare both before you trust either",
            )
        names = [a.witness for a in asked if a.outcome == "signed"]
        if names and policy.met_by(signed):
            with self._writes():
                self._journal.keep_cosigned(signed, [str(policy.witnesses[name][0]) for name in names])
            self._cosigned = signed.size
        elif not names:
            raise ConnectionError(_why(asked))
        return self._cosigned

    def _mirror(self, address: str, reader: JournalReader) -> int:
        from pointcall_executor.mirror import Mirror, Pace, connect, ship

        self._pace = self._pace or Pace()
        with connect(address) as db:
            return ship(reader, Mirror(db), self._pace).covered

    def _erase(self, reader: JournalReader, days: int) -> None:
        """Erase the clear texts of all entries that are older than the setting; their bytes too, once nobody reads."""
        first = max(reader.erased, reader.minimum)
        inside = first_within(reader, days, datetime.now(UTC), start=first)
        below = reader.size if inside is None else inside.index
        try:
            with self._writes():
                if first < below:
                    self._recorder.erase((), f"older than {days} days", below=below, forget=False)
            if first < below or self._unforgotten:
                self._forget()
            if first < below:
                self._say("clear texts erased", below=below)
        except JournalError as held:
            if held.id != "journal.readers":
                raise
            if not self._unforgotten:
                self._say("clear texts erased, but a reader holds the old pages", below=below)
            self._unforgotten = True
        else:
            self._unforgotten = False

    def _forget(self) -> None:
        """As `Journal.forget`, try by try: the end of the executor waits for one at most."""
        end_s = time.monotonic() + FORGET_S
        while True:
            last = self._stopping.is_set() or time.monotonic() > end_s
            try:
                with self._writes():
                    self._journal.forget(wait_s=0)
                return
            except JournalError as held:
                if last or held.id != "journal.readers":
                    raise
            self._stopping.wait(FORGET_STEP_MS / 1000)


class _Ended(Exception):
    """The executor has ended meanwhile."""


class WitnessAlarm(PointcallError):
    """A witness cannot be asked, or has seen a log that this one is not a growth of."""

    id = "witness.alarm"


def _why(asked: tuple[Asked, ...]) -> str:
    return "; ".join(f"{a.witness} {a.outcome} {a.detail}" for a in asked) or "the policy names no address"
