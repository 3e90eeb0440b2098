"""What a runbook's author imports: the decorator, durations, parameters, remembered slots. Pure; no state.

The same file runs under CPython (pytest, an editor) and through the compiler. Here is the CPython side: a parameter is
its default, a remembered slot its initial value. What the language accepts: docs/spec/language.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Self, TypeAlias, TypeVar

from pointcall_runbook.vocabulary import (
    ACTIONS,
    EVENTS,
    NO_SERVICE,
    Action,
    ActionKind,
    Address,
    Channel,
    Level,
    Network,
    Operation,
    Outcome,
    Resource,
    Service,
    Unusual,
    channel,
    service,
)

Decision: TypeAlias = list[Action]
_Handler = TypeVar("_Handler", bound=Callable[..., Decision])

ENUMS: Final = (Level, Outcome, Operation, Resource, Unusual, ActionKind)
DURATIONS: Final[Mapping[str, int]] = {"milliseconds": 1_000_000, "seconds": 1_000_000_000, "minutes": 60_000_000_000}


def runbook(handler: _Handler) -> _Handler:
    """Mark a function as the handler of the event that its one argument names."""
    return handler


def milliseconds(count: int) -> int:
    """Nanoseconds."""
    return count * DURATIONS["milliseconds"]


def seconds(count: int) -> int:
    """Nanoseconds."""
    return count * DURATIONS["seconds"]


def minutes(count: int) -> int:
    """Nanoseconds."""
    return count * DURATIONS["minutes"]


def parameter(default: int, *, lo: int = 0, hi: int) -> int:
    """A number that the manifest may set within `lo..hi`, without a rebuild."""
    if not lo <= default <= hi:
        raise ValueError(f"the default {default} is outside {lo}..{hi}")
    return default


class Remembered(int):
    """The value of a remembered slot. `slot` is its number, for `Remember(slot=NAME.slot, value=...)`."""

    slot: int

    @classmethod
    def of(cls, slot: int, value: int) -> Self:
        made = cls(value)
        made.slot = slot
        return made


def remembered(slot: int, *, lo: int = 0, hi: int, initial: int = 0) -> Remembered:
    """A number that this runbook keeps for each target between decisions. `slot` counts from 0."""
    if not lo <= initial <= hi:
        raise ValueError(f"the initial value {initial} is outside {lo}..{hi}")
    return Remembered.of(slot, initial)


NAMES: Final[Mapping[str, object]] = {
    **EVENTS,
    **{cls.__name__: cls for cls in ACTIONS.values()},
    **{cls.__name__: cls for cls in ENUMS},
    **{cls.__name__: cls for cls in (Address, Network, Service, Channel)},
    **{f.__name__: f for f in (runbook, milliseconds, seconds, minutes, parameter, remembered, service, channel)},
    "Decision": Decision,
    "NO_SERVICE": NO_SERVICE,
}
