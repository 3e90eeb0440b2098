"""What is known of an integer: the interval of its values. Pure arithmetic; a result is None where nothing is left.

Every rule here must be sound: the span of a result holds every value that the operation can give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

LOWEST: Final = -(2**63)
HIGHEST: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Span:
    """All integers from `lo` to `hi`; of an enum, those of `members` only."""

    lo: int
    hi: int
    members: frozenset[int] | None = None

    @classmethod
    def only(cls, value: int) -> Self:
        return cls(value, value)

    @classmethod
    def of(cls, members: frozenset[int]) -> Self:
        return cls(min(members), max(members), members)

    @property
    def constant(self) -> bool:
        return self.lo == self.hi

    @property
    def fits(self) -> bool:
        """Within a signed 64-bit integer."""
        return self.lo >= LOWEST and self.hi <= HIGHEST

    def within(self, lo: int, hi: int) -> bool:
        return lo <= self.lo and self.hi <= hi

    def joined(self, other: Span) -> Span:
        """Values of either."""
        if self.members is not None and other.members is not None:
            return Span.of(self.members | other.members)
        return Span(min(self.lo, other.lo), max(self.hi, other.hi))

    def cut(self, comparison: str, other: Span) -> Span | None:
        """The values x of self for which `x <comparison> y` can hold with some y of other."""
        match comparison:
            case "==":
                return self._between(other.lo, other.hi)
            case "<":
                return self._between(self.lo, other.hi - 1)
            case "<=":
                return self._between(self.lo, other.hi)
            case ">":
                return self._between(other.lo + 1, self.hi)
            case ">=":
                return self._between(other.lo, self.hi)
            case _:
                return self._without(other.lo) if other.constant else self

    def _between(self, lo: int, hi: int) -> Span | None:
        lo, hi = max(lo, self.lo), min(hi, self.hi)
        if self.members is not None:
            members = frozenset(m for m in self.members if lo <= m <= hi)
            return Span.of(members) if members else None
        return Span(lo, hi) if lo <= hi else None

    def _without(self, value: int) -> Span | None:
        if self.members is not None:
            members = self.members - {value}
            return Span.of(members) if members else None
        lo, hi = self.lo + (self.lo == value), self.hi - (self.hi == value)
        return Span(lo, hi) if lo <= hi else None

    def __str__(self) -> str:
        return str(self.lo) if self.constant else f"{self.lo}..{self.hi}"


def add(a: Span, b: Span) -> Span:
    return Span(a.lo + b.lo, a.hi + b.hi)


def subtract(a: Span, b: Span) -> Span:
    return Span(a.lo - b.hi, a.hi - b.lo)


def multiply(a: Span, b: Span) -> Span:
    corners = [x * y for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
    return Span(min(corners), max(corners))


def divide(a: Span, b: Span) -> Span:
    """Both not negative, b not zero."""
    return Span(a.lo // b.hi, a.hi // b.lo)


def modulo(a: Span, b: Span) -> Span:
    """Both not negative, b not zero."""
    if a.hi < b.lo:
        return Span(a.lo, a.hi)
    if a.constant and b.constant:
        return Span.only(a.lo % b.lo)
    return Span(0, min(a.hi, b.hi - 1))


def shift_left(a: Span, b: Span) -> Span:
    """Both not negative."""
    return Span(a.lo << b.lo, a.hi << b.hi)


def shift_right(a: Span, b: Span) -> Span:
    """b not negative."""
    corners = [x >> n for x in (a.lo, a.hi) for n in (b.lo, b.hi)]
    return Span(min(corners), max(corners))


def bits_and(a: Span, b: Span) -> Span:
    """Both not negative."""
    return Span.only(a.lo & b.lo) if a.constant and b.constant else Span(0, min(a.hi, b.hi))


def bits_or(a: Span, b: Span) -> Span:
    """Both not negative."""
    if a.constant and b.constant:
        return Span.only(a.lo | b.lo)
    return Span(max(a.lo, b.lo), (1 << max(a.hi, b.hi).bit_length()) - 1)


def bits_xor(a: Span, b: Span) -> Span:
    """Both not negative."""
    if a.constant and b.constant:
        return Span.only(a.lo ^ b.lo)
    return Span(0, (1 << max(a.hi, b.hi).bit_length()) - 1)


def smaller(a: Span, b: Span) -> Span:
    return Span(min(a.lo, b.lo), min(a.hi, b.hi))


def larger(a: Span, b: Span) -> Span:
    return Span(max(a.lo, b.lo), max(a.hi, b.hi))


def negate(a: Span) -> Span:
    return Span(-a.hi, -a.lo)


def absolute(a: Span) -> Span:
    ends = (abs(a.lo), abs(a.hi))
    return Span(0 if a.lo <= 0 <= a.hi else min(ends), max(ends))
