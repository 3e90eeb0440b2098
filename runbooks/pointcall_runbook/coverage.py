"""Which source lines and branches a set of inputs reaches, and a search for inputs that reach the rest.

A branch is one outcome of one conditional instruction, so `a and b` has branches of its own. The search is random with
a seed that is given: boundary values, the constants of the code, and small steps from inputs that already reach much.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias, TypeVar

from pointcall_runbook.compiler import Compiled
from pointcall_runbook.interpreter import Interpreter
from pointcall_runbook.opcode import BR_IF, I64_CONST, IF
from pointcall_runbook.sections import take_apart
from pointcall_runbook.vocabulary import EVENTS, Kind, fields

Branch: TypeAlias = tuple[int, bool]
_Item = TypeVar("_Item")
SEARCH_RUNS: Final = 4_000


@dataclass(slots=True)
class Coverage:
    """What was reached of one module; `seen` are offsets, `taken` outcomes of conditions."""

    compiled: Compiled
    seen: set[int] = field(default_factory=set)
    taken: set[Branch] = field(default_factory=set)
    _conditions: dict[int, int] = field(init=False)  # offset of each conditional instruction, and its source line

    def __post_init__(self) -> None:
        lines = dict(self.compiled.lines)
        bodies = take_apart(self.compiled.wasm).bodies
        self._conditions = {at.offset: lines[at.offset] for b in bodies for at in b.code if at.op.code in (IF, BR_IF)}

    @property
    def lines(self) -> tuple[set[int], set[int]]:
        """Source lines that were reached, and those that were not."""
        by_offset = {offset: line for offset, line in self.compiled.lines if line}
        reached = {line for offset, line in by_offset.items() if offset in self.seen}
        return reached, set(by_offset.values()) - reached

    @property
    def missing(self) -> list[tuple[int, bool, int]]:
        """Branches that were not taken: line, outcome, offset."""
        pairs = ((line, truth, at) for at, line in self._conditions.items() for truth in (True, False))
        return sorted(p for p in pairs if (p[2], p[1]) not in self.taken)

    @property
    def total(self) -> int:
        return 2 * len(self._conditions)

    def add(self, trace: Iterable[tuple[int, bool]]) -> bool:
        """Add one run; True if it reached a new branch."""
        before = len(self.taken)
        for offset, truth in trace:
            self.seen.add(offset)
            if offset in self._conditions:
                self.taken.add((offset, truth))
        return len(self.taken) > before


@dataclass(frozen=True, slots=True)
class Found:
    """An input that reached a branch which nothing before it reached."""

    event: str
    args: tuple[int, ...]


class _Chance:
    """SplitMix64: the same numbers for the same seed, everywhere. Not for secrets."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def bits(self) -> int:
        """The next 64."""
        self._state = (self._state + 0x9E3779B97F4A7C15) % 2**64
        z = self._state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    def between(self, lo: int, hi: int) -> int:
        return lo + self.bits() % (hi - lo + 1)

    def one_of(self, items: Sequence[_Item]) -> _Item:
        return items[self.bits() % len(items)]

    def mostly(self) -> bool:
        """True in seven of ten."""
        return self.bits() % 10 < 7


def search(coverage: Coverage, *, seed: int = 0, runs: int = SEARCH_RUNS) -> list[Found]:
    """Inputs that reach branches missing in `coverage`, which is extended by them."""
    interpreter, chance = Interpreter(coverage.compiled.wasm), _Chance(seed)
    constants = _constants(coverage.compiled.wasm)
    out: list[Found] = []
    pools: dict[str, list[tuple[int, ...]]] = {event: [] for event in interpreter.info.handlers}
    for number in range(runs):
        if not coverage.missing:
            break
        event = sorted(pools)[number % len(pools)]
        ranges = _ranges(event, interpreter)
        args = _drawn(ranges, constants, pools[event], chance)
        trace: list[tuple[int, bool]] = []
        interpreter.run(event, args, trace=trace)
        if coverage.add(trace):
            pools[event].append(args)
            out.append(Found(event, args))
    return out


def _constants(wasm: bytes) -> list[int]:
    """The numbers that the code compares with, and their neighbours."""
    found = {at.value for body in take_apart(wasm).bodies for at in body.code if at.op.code == I64_CONST}
    return sorted({n + d for n in found for d in (-1, 0, 1)})


def _ranges(event: str, interpreter: Interpreter) -> list[tuple[int, int]]:
    info = interpreter.info
    own = [(f.lo, f.hi) for f in fields(EVENTS[event]) for _ in range(2 if f.kind is Kind.ADDRESS else 1)]
    return own + [(p.lo, p.hi) for p in info.parameters] + [(s.lo, s.hi) for s in info.slots]


def _drawn(
    ranges: list[tuple[int, int]], constants: list[int], pool: list[tuple[int, ...]], chance: _Chance
) -> tuple[int, ...]:
    """A new input, or one from the pool with a few numbers drawn again."""
    old = chance.one_of(pool) if pool and chance.mostly() else None
    out = []
    for i, (lo, hi) in enumerate(ranges):
        out.append(old[i] if old is not None and chance.mostly() else _number(lo, hi, constants, chance))
    return tuple(out)


def _number(lo: int, hi: int, constants: list[int], chance: _Chance) -> int:
    fitting = [n for n in constants if lo <= n <= hi]
    match chance.between(0, 4):
        case 0:
            return chance.one_of((lo, hi))
        case 1 | 2 if fitting:
            return chance.one_of(fitting)
        case 3:
            return chance.between(lo, min(hi, lo + 20))
        case _:
            return chance.between(lo, hi)


def summary(coverage: Coverage) -> Mapping[str, int]:
    """Counts for a report."""
    reached, missed = coverage.lines
    total = coverage.total
    return {
        "lines": len(reached) + len(missed),
        "lines_reached": len(reached),
        "branches": total,
        "branches_reached": total - len(coverage.missing),
    }
