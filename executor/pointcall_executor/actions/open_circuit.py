"""open_circuit: refuse connects to a destination for a time, in the kernel.

A lease: the kernel ends it at its expiry even if the executor is dead. Undo: close_circuit. Post-condition: the kernel
says that the circuit is forced open, for at least as long as was asked.
"""

from __future__ import annotations

from typing import Final

from pointcall_executor.actions.world import Done, Verb, World
from pointcall_runbook.vocabulary import OpenCircuit, Outcome

TICK_NS: Final = 1000  # the kernel keeps microseconds


def perform(action: OpenCircuit, world: World) -> Done:
    until_ns = world.now_ns + action.hold
    world.circuits.force(action.address, action.port, until_ns)
    target = f"{action.address}:{action.port}"
    detail = {"until_ns": str(until_ns), "hold_ns": str(action.hold)}
    return Done(Outcome.APPLIED, target, detail, undo="close_circuit", postcondition="the circuit is forced open")


def amiss(action: OpenCircuit, world: World) -> str:
    held = world.circuits.forced_until(action.address, action.port)
    wanted = world.now_ns + action.hold
    return "" if held + TICK_NS > wanted or action.hold == 0 else f"forced open until {held}, not until {wanted}"


def undo(action: OpenCircuit, world: World) -> None:
    world.circuits.close_circuit(action.address, action.port)


VERB: Final = Verb(perform, amiss, undo)
