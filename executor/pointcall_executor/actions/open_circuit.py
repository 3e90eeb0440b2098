"""open_circuit: refuse connects to a destination for a time, in the kernel.

A lease: the kernel ends it at its expiry even if the executor is dead. Undo: close_circuit.
"""

from __future__ import annotations

from pointcall_executor.actions.world import Done, World
from pointcall_runbook.vocabulary import OpenCircuit, Outcome


def perform(action: OpenCircuit, world: World) -> Done:
    until_ns = world.now_ns + action.hold
    world.circuits.force(action.address, action.port, until_ns)
    target = f"{action.address}:{action.port}"
    detail = {"until_ns": str(until_ns), "hold_ns": str(action.hold)}
    return Done(Outcome.APPLIED, target, detail, undo="close_circuit", postcondition="the circuit is forced open")
