"""close_circuit: end an open or forced circuit and count its failures from zero.

Post-condition: nobody holds it open. Failures may open it again at once; that is the breaker's own decision.
"""

from __future__ import annotations

from typing import Final

from pointcall_executor.actions.world import Done, Verb, World
from pointcall_runbook.vocabulary import CloseCircuit, Outcome


def perform(action: CloseCircuit, world: World) -> Done:
    world.circuits.close_circuit(action.address, action.port)
    return Done(Outcome.APPLIED, f"{action.address}:{action.port}", postcondition="the circuit is not forced open")


def amiss(action: CloseCircuit, world: World) -> str:
    return "it is forced open" if world.circuits.still_forced(action.address, action.port) else ""


VERB: Final = Verb(perform, amiss)
