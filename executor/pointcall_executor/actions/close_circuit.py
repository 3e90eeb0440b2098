"""close_circuit: end an open or forced circuit and count its failures from zero."""

from __future__ import annotations

from pointcall_executor.actions.world import Done, World
from pointcall_runbook.vocabulary import CloseCircuit, Outcome


def perform(action: CloseCircuit, world: World) -> Done:
    world.circuits.close_circuit(action.address, action.port)
    return Done(Outcome.APPLIED, f"{action.address}:{action.port}", postcondition="the circuit is closed")
