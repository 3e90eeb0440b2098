"""recreate: destroy a declared service and start it from its declared, hashed state. Never patches, never a shell.

Post-condition: what its declaration calls ready, and nothing more. Circuits to it then let one probe through.
"""

from __future__ import annotations

from typing import Final

from pointcall_executor.actions.world import Done, Verb, World
from pointcall_executor.services.managed import ServiceError
from pointcall_runbook.vocabulary import Outcome, Recreate


def perform(action: Recreate, world: World) -> Done:
    """Twice without harm: the second one destroys and starts again."""
    number = action.service.number
    name = world.services.name(number)
    stopped_ns = world.services.destroy(number, action.grace)
    try:
        started = world.services.start(number)
    except ServiceError as error:
        return Done(Outcome.FAILED, name, {"error": error.as_dict(), "stopped_ns": str(stopped_ns)})
    probes = world.circuits.probe_service(number)
    detail = {
        "pid": started.pid,
        "files_verified": started.files,
        "stopped_ns": str(stopped_ns),
        "verified_ns": str(started.verified_ns),
        "spawned_ns": str(started.spawned_ns),
        "ready_ns": str(started.ready_ns),
        "circuits_half_open": probes,
    }
    return Done(Outcome.APPLIED, name, detail, postcondition=started.ready_for)


def amiss(action: Recreate, world: World) -> str:
    return world.services.healthy(action.service.number)


VERB: Final = Verb(perform, amiss)
