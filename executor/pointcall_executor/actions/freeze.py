"""freeze: let no task of a service's cgroup run, for a time.

A lease: it ends at its expiry, and when the executor dies. Undo: thaw. Post-condition: the kernel says that every task
is stopped. One that waits in the kernel, for a disk say, stops when that lets it go, which may be too late.
"""

from __future__ import annotations

from typing import Final

from pointcall_executor.actions.world import Done, Verb, World
from pointcall_runbook.vocabulary import Freeze, Outcome


def perform(action: Freeze, world: World) -> Done:
    number = action.service.number
    until_ns = world.now_ns + action.hold
    world.services.freeze(number, until_ns)
    detail = {"until_ns": str(until_ns), "hold_ns": str(action.hold)}
    return Done(Outcome.APPLIED, world.services.name(number), detail, "thaw", "no task of it runs")


def amiss(action: Freeze, world: World) -> str:
    held = world.services.frozen(action.service.number, world.now_ns + action.hold)
    return "" if held else "a task of it still runs"


def undo(action: Freeze, world: World) -> None:
    world.services.thaw(action.service.number)


VERB: Final = Verb(perform, amiss, undo)
