"""A verdict: the list of checks that were made, each with what was expected and what was seen.

It is data, not an answer: the same value feeds the CLI, receipts and reports. It cannot be misread as a bool,
and a verdict in which nothing was checked has not passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, Self

from pointcall_attest.errors import RefusedError

Outcome = Literal["pass", "fail", "not-checked"]
Tier = Literal["hardware", "emulated", "none"]


@dataclass(frozen=True, slots=True)
class Check:
    """One check. `id` is stable and documented in docs/checks.md; `spec` names the clause that demands it."""

    id: str
    outcome: Outcome
    expected: str = ""
    observed: str = ""
    spec: str = ""
    hint: str = ""

    @classmethod
    def of(
        cls, id: str, passed: bool, *, expected: object = "", observed: object = "", spec: str = "", hint: str = ""
    ) -> Self:
        return cls(id, "pass" if passed else "fail", str(expected), str(observed), spec, hint)

    @classmethod
    def skipped(cls, id: str, why: str, *, spec: str = "") -> Self:
        """Not made, and why: a reader must see what was not looked at."""
        return cls(id, "not-checked", observed=why, spec=spec)

    def as_dict(self) -> dict[str, str]:
        row = {
            "id": self.id,
            "spec": self.spec,
            "expected": self.expected,
            "observed": self.observed,
            "outcome": self.outcome,
        }
        return row | ({"hint": self.hint} if self.hint else {})


@dataclass(frozen=True, slots=True)
class Verdict:
    """Every check of one appraisal. `tier` comes from the root that verified, never from the evidence's own words."""

    checks: tuple[Check, ...]
    tier: Tier = "none"
    platform: str = ""
    claims: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> NoReturn:
        raise TypeError("a verdict has no truth value: use .passed or .require()")

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(c for c in self.checks if c.outcome == "fail")

    @property
    def not_checked(self) -> tuple[Check, ...]:
        return tuple(c for c in self.checks if c.outcome == "not-checked")

    @property
    def passed(self) -> bool:
        return any(c.outcome == "pass" for c in self.checks) and not self.failed

    def require(self) -> Self:
        """Itself, or RefusedError with every failed check."""
        if not self.passed:
            raise RefusedError(self)
        return self

    def joined(self, others: Iterable[Verdict]) -> Verdict:
        """All checks of several verdicts in order; the tier and platform are those of the first that has one."""
        parts = [self, *others]
        first = next((v for v in parts if v.tier != "none"), self)
        return Verdict(tuple(c for v in parts for c in v.checks), first.tier, first.platform, first.claims)

    def as_dict(self) -> dict[str, Any]:
        """The JSON form: docs/spec/verdict.md."""
        return {
            "verdict": "accept" if self.passed else "reject",
            "tier": self.tier,
            "platform": self.platform,
            "checks": [c.as_dict() for c in self.checks],
            "not_checked": [c.id for c in self.not_checked],
            "claims": dict(self.claims),
        }
