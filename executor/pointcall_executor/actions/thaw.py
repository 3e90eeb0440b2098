"""thaw: end a freeze now. Thawing what is not frozen is no error.

Post-condition: the service is as healthy as its declaration asks.
"""

from __future__ import annotations

from typing import Final

from pointcall_executor.actions.world import Done, Verb, World
from pointcall_runbook.vocabulary import Outcome, Thaw


def perform(action: Thaw, world: World) -> Done:
    number = action.service.number
    world.services.thaw(number)
    return Done(Outcome.APPLIED, world.services.name(number), postcondition="it runs, as ready as it is declared")


def amiss(action: Thaw, world: World) -> str:
    return world.services.healthy(action.service.number)


VERB: Final = Verb(perform, amiss)
