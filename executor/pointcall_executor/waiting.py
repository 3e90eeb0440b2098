"""What waits for a person: actions held back for want of an approval, and escalations that nobody has acknowledged.

Bounded, in memory, owned by the loop. An approval asked for is forgotten at a restart, so that no approval can be used
twice; an escalation is taken up again from the log (recorder.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from pointcall_executor.run import Run

ASKED_MAX: Final = 64  # the oldest is forgotten first: its runbook will ask again
ASKED_NS: Final = 3_600_000_000_000
TELL_AGAIN_NS: Final = 300_000_000_000
ESCALATIONS_MAX: Final = 1024  # the oldest is forgotten first: nobody has answered so many


@dataclass(frozen=True, slots=True)
class Asked:
    """One call that the guard held back with `guard.approval`."""

    run: Run
    index: int
    at_ns: int


@dataclass(frozen=True, slots=True)
class Escalation:
    """A person was called because of a run, and has not answered."""

    run: str
    channels: tuple[int, ...]
    code: int
    due_ns: int  # when to call again


@dataclass(slots=True)
class Waiting:
    """Both lists. Times are CLOCK_MONOTONIC ns and come from the caller."""

    _asked: dict[tuple[str, int], Asked] = field(default_factory=dict)
    _escalations: dict[str, Escalation] = field(default_factory=dict)

    def ask(self, run: Run, index: int, now_ns: int) -> None:
        """Remember that call `index` of `run` needs an approval."""
        self._asked[(run.id, index)] = Asked(run, index, now_ns)
        while len(self._asked) > ASKED_MAX:
            del self._asked[next(iter(self._asked))]

    def asked(self, now_ns: int) -> tuple[Asked, ...]:
        """What can be approved now, oldest first."""
        return tuple(a for a in list(self._asked.values()) if now_ns - a.at_ns < ASKED_NS)

    def take(self, run: str, index: int, now_ns: int) -> Asked | None:
        """The call, once: who takes it has it."""
        found = self._asked.pop((run, index), None)
        return found if found is not None and now_ns - found.at_ns < ASKED_NS else None

    def forget_asked(self) -> None:
        """Another manifest is armed, or none: nothing of the old one can be approved."""
        self._asked.clear()

    def call(self, run: str, channels: tuple[int, ...], code: int, now_ns: int) -> bool:
        """Remember that a person was called for `run`; False where that is known already."""
        if run in self._escalations:
            return False
        self._escalations[run] = Escalation(run, channels, code, now_ns + TELL_AGAIN_NS)
        while len(self._escalations) > ESCALATIONS_MAX:
            del self._escalations[next(iter(self._escalations))]
        return True

    def due(self, now_ns: int) -> tuple[Escalation, ...]:
        """Who must be called again now, the longest overdue first; `called_again` says that it was done."""
        return tuple(sorted((e for e in self._escalations.values() if e.due_ns <= now_ns), key=lambda e: e.due_ns))

    def called_again(self, run: str, now_ns: int) -> None:
        """They were called for this run just now: the next time is set."""
        self._escalations[run] = replace(self._escalations[run], due_ns=now_ns + TELL_AGAIN_NS)

    def acknowledge(self, run: str) -> bool:
        """A person has answered; False if nobody was called for this run."""
        return self._escalations.pop(run, None) is not None

    @property
    def escalations(self) -> Mapping[str, Escalation]:
        """What nobody has acknowledged, by run."""
        return dict(self._escalations)
