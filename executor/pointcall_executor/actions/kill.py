"""kill: send a signal to the main process of a service. Cannot be undone; what the signal does is the service's own
matter, so the post-condition is that it was delivered.
"""

from __future__ import annotations

from typing import Final

from pointcall_executor.actions.world import Done, Verb, World
from pointcall_runbook.vocabulary import Kill, Outcome


def perform(action: Kill, world: World) -> Done:
    number = action.service.number
    world.services.signal(number, action.signal)
    detail = {"signal": action.signal}
    return Done(Outcome.APPLIED, world.services.name(number), detail, postcondition="the signal was delivered")


VERB: Final = Verb(perform)
