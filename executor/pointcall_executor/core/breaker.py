"""The circuit as a pure model: (circuit, event, parameters) -> (circuit, effects). No kernel, no clock.

The kernel program bpf/breaker.bpf.c is the real one; tests drive both side by side, and recorded runs are replayed
here. Times are microseconds of CLOCK_MONOTONIC. Spec: docs/spec/kernel-abi.md section 4.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Final, Self, assert_never

TIME_MASK: Final = 2**48 - 1
COUNT_MAX: Final = 0x3FFF
STREAK_MAX: Final = 0xFF
PROBES_MAX: Final = 8
GROWTH_MAX: Final = 16  # doublings of the open time


class State(enum.IntEnum):
    """The top two bits of the word."""

    CLOSED = 0
    OPEN = 1
    HALF = 2
    FORCED = 3


@dataclass(frozen=True, slots=True)
class Word:
    """A circuit's word. `count` and `time_us` mean different things in each state: bpf/circuit.h says which."""

    state: State = State.CLOSED
    count: int = 0
    time_us: int = 0

    @classmethod
    def unpack(cls, raw: int) -> Self:
        return cls(State(raw >> 62), raw >> 48 & COUNT_MAX, raw & TIME_MASK)

    def pack(self) -> int:
        return self.state << 62 | self.count << 48 | self.time_us & TIME_MASK

    @property
    def streak(self) -> int:
        """Openings in a row; meaningful in OPEN and HALF."""
        return self.count & STREAK_MAX

    @property
    def probes(self) -> int:
        """Probes that left; meaningful in HALF."""
        return self.count >> 8


@dataclass(frozen=True, slots=True)
class Circuit:
    """The word and, for the error rate, the results that were seen in its window."""

    word: Word = Word()
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Params:
    """The constants of the object; defaults are those of bpf/breaker.bpf.c."""

    threshold: int = 5
    window_us: int = 10_000_000
    cooldown_us: int = 1_000_000
    cooldown_max_us: int = 0
    probe_us: int = 3_000_000
    probe_budget: int = 1
    percent: int = 0
    min_attempts: int = 20


@dataclass(frozen=True, slots=True)
class Connect:
    """An attempt asks the gate."""

    at_us: int


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt failed. `probe`: its socket was one of the probes that left last."""

    at_us: int
    probe: bool = False


@dataclass(frozen=True, slots=True)
class Succeeded:
    """An attempt succeeded."""

    at_us: int
    probe: bool = False


@dataclass(frozen=True, slots=True)
class Force:
    """Refuse everything until a time."""

    until_us: int


@dataclass(frozen=True, slots=True)
class ProbeReady:
    """End the cool-down: the next attempt is the probe."""

    at_us: int


@dataclass(frozen=True, slots=True)
class Close:
    """Back to service, counting from zero."""


Event = Connect | Failed | Succeeded | Force | ProbeReady | Close


class Effect(enum.Enum):
    """What a step did besides changing the word."""

    PASSED = "passed"
    REFUSED = "refused"
    PROBE = "probe"  # passed as a probe
    OPENED = "opened"
    REOPENED = "reopened"
    CLOSED = "closed"
    EXPIRED = "expired"


Step = tuple[Circuit, tuple[Effect, ...]]


def step(circuit: Circuit, event: Event, params: Params) -> Step:
    """What the circuit becomes, and what that means for the one who asked."""
    match event:
        case Connect(at_us):
            return _connect(circuit, at_us, params)
        case Failed(at_us, probe):
            return _failed(circuit, at_us, probe, params)
        case Succeeded(at_us, probe):
            return _succeeded(circuit, at_us, probe, params)
        case Force(until_us):
            return replace(circuit, word=Word(State.FORCED, 0, until_us & TIME_MASK)), ()
        case ProbeReady(at_us):
            return _probe_ready(circuit, at_us, params), ()
        case Close():
            return replace(circuit, word=Word()), ()
        case _:
            assert_never(event)


def age_us(now_us: int, then_us: int) -> int:
    """Modular distance, 0 where `then` is later than `now`."""
    age = now_us - then_us & TIME_MASK
    return 0 if age > TIME_MASK // 2 else age


def cooldown_us(params: Params, streak: int) -> int:
    """The open time before the next probe: doubles with each opening in a row, where growth is allowed."""
    if params.cooldown_max_us <= params.cooldown_us:
        return params.cooldown_us
    return min(params.cooldown_us << min(max(streak - 1, 0), GROWTH_MAX), params.cooldown_max_us)


def left_us(word: Word, params: Params, now_us: int) -> int:
    """How long connects go on being refused: until a forced lease ends, or the next connect is a probe; 0: not."""
    match word.state:
        case State.FORCED:
            return age_us(word.time_us, now_us)
        case State.OPEN:
            return max(0, cooldown_us(params, word.streak) - age_us(now_us, word.time_us))
        case _:
            return 0


def _connect(circuit: Circuit, now: int, params: Params) -> Step:
    word = circuit.word
    match word.state:
        case State.CLOSED:
            return circuit, (Effect.PASSED,)
        case State.FORCED:
            if age_us(word.time_us, now):
                return circuit, (Effect.REFUSED,)
            return replace(circuit, word=Word()), (Effect.EXPIRED, Effect.PASSED)
        case State.OPEN:
            if age_us(now, word.time_us) < cooldown_us(params, word.streak):
                return circuit, (Effect.REFUSED,)
            return _probe(circuit, 1, now)
        case State.HALF:
            if age_us(now, word.time_us) >= params.probe_us:
                return _probe(circuit, 1, now)
            if word.probes >= min(params.probe_budget, PROBES_MAX):
                return circuit, (Effect.REFUSED,)
            return _probe(circuit, word.probes + 1, word.time_us)
        case _:
            assert_never(word.state)


def _probe(circuit: Circuit, probes: int, since_us: int) -> Step:
    word = Word(State.HALF, probes << 8 | circuit.word.streak, since_us & TIME_MASK)
    return replace(circuit, word=word), (Effect.PROBE,)


def _failed(circuit: Circuit, now: int, probe: bool, params: Params) -> Step:
    word = circuit.word
    if word.state is State.CLOSED:
        return _counted(circuit, now, params)
    if word.state is State.HALF and probe:
        opened = Word(State.OPEN, min(word.streak + 1, STREAK_MAX), now & TIME_MASK)
        return replace(circuit, word=opened), (Effect.REOPENED,)
    return circuit, ()


def _counted(circuit: Circuit, now: int, params: Params) -> Step:
    word = circuit.word
    fresh = age_us(now, word.time_us) > params.window_us or (not word.count and not params.percent)
    seen = 1 if fresh else circuit.attempts + 1
    count = 1 if fresh else min(word.count + 1, COUNT_MAX)
    if count >= params.threshold and _share_reached(count, seen, params):
        return Circuit(Word(State.OPEN, 1, now & TIME_MASK), circuit.attempts), (Effect.OPENED,)
    return Circuit(Word(State.CLOSED, count, now & TIME_MASK if fresh else word.time_us), seen), ()


def _share_reached(failures: int, seen: int, params: Params) -> bool:
    return not params.percent or (seen >= params.min_attempts and failures * 100 >= seen * params.percent)


def _succeeded(circuit: Circuit, now: int, probe: bool, params: Params) -> Step:
    word = circuit.word
    if word.state is State.HALF and probe:
        return replace(circuit, word=Word()), (Effect.CLOSED,)
    if word.state is not State.CLOSED:
        return circuit, ()
    if not params.percent:
        return (replace(circuit, word=Word()) if word.count else circuit), ()
    if age_us(now, word.time_us) <= params.window_us:
        return replace(circuit, attempts=circuit.attempts + 1), ()
    return Circuit(Word(State.CLOSED, 0, now & TIME_MASK), 1), ()


def _probe_ready(circuit: Circuit, now: int, params: Params) -> Circuit:
    word = circuit.word
    if word.state not in (State.OPEN, State.HALF):
        return circuit
    return replace(circuit, word=Word(State.OPEN, word.streak, now - cooldown_us(params, word.streak) & TIME_MASK))
