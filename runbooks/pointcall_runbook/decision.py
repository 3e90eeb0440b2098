"""What one run of a handler gives: its calls in order and the fuel it used, or a trap. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from pointcall_runbook.errors import PointcallError
from pointcall_runbook.vocabulary import Call

TrapKind = Literal["division by zero", "overflow", "unreachable", "fuel"]

TRAP_HINTS: Final = {
    "division by zero": "a divisor was zero; modules of `pointcall build` cannot do that",
    "overflow": "a signed division does not fit; modules of `pointcall build` cannot do that",
    "unreachable": "the module gave up by itself",
    "fuel": "more was used than was proven: the engine or the verifier is wrong",
}


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision. `calls` are what the module asked for, not yet checked against ranges and grants."""

    calls: tuple[Call, ...]
    fuel: int


class Trap(PointcallError):
    """The handler did not return. The runbook is quarantined; nothing it asked for before is done."""

    id = "runbook.trap"

    def __init__(self, kind: TrapKind) -> None:
        super().__init__(f"the handler trapped: {kind}", hint=TRAP_HINTS[kind])
        self.kind = kind
