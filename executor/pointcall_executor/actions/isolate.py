"""isolate: refuse all traffic of a service's cgroup for a time, in the kernel.

A lease: the kernel ends it at its expiry even if the executor is dead. It ends earlier when the service is recreated,
because the new one has another cgroup. Undo: end the isolation. Post-condition: the kernel says that it holds.
"""

from __future__ import annotations

from typing import Final

from pointcall_executor.actions.world import Done, Verb, World
from pointcall_runbook.vocabulary import Isolate, Outcome


def perform(action: Isolate, world: World) -> Done:
    number = action.service.number
    until_ns = world.now_ns + action.hold
    world.circuits.isolate(world.cgroup_of(number), until_ns)
    detail = {"until_ns": str(until_ns), "hold_ns": str(action.hold)}
    return Done(Outcome.APPLIED, world.services.name(number), detail, "end_isolation", "its traffic is refused")


def amiss(action: Isolate, world: World) -> str:
    held = world.circuits.isolated_until(world.cgroup_of(action.service.number))
    wanted = world.now_ns + action.hold
    return "" if held >= wanted else f"isolated until {held}, not until {wanted}"


def undo(action: Isolate, world: World) -> None:
    world.circuits.end_isolation(world.cgroup_of(action.service.number))


VERB: Final = Verb(perform, amiss, undo)
