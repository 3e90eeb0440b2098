"""kill_connections: reset established connections to a destination, so that clients come back to the circuit's gate.

Cannot be undone. New connections are not held back: `open_circuit` first, then this. Post-condition: what was there is
gone; it is checked by looking again where the circuit is open, since nothing new can be there then.
"""

from __future__ import annotations

from typing import Final

from pointcall_executor.actions.world import Done, Verb, World
from pointcall_runbook.vocabulary import KillConnections, Outcome


def perform(action: KillConnections, world: World) -> Done:
    killed = world.circuits.kill_connections(action.address, action.port)
    target = f"{action.address}:{action.port}"
    return Done(Outcome.APPLIED, target, {"killed": killed}, postcondition="no established connection is left")


def amiss(action: KillConnections, world: World) -> str:
    if not world.circuits.still_forced(action.address, action.port):
        return ""
    left = world.circuits.kill_connections(action.address, action.port)
    return f"{left} connections were left" if left else ""


VERB: Final = Verb(perform, amiss)
