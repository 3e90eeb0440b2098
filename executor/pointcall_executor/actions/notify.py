"""notify: tell a channel of the manifest. Changes nothing; failing to tell is an outcome, never an exception."""

from __future__ import annotations

from typing import Final

from pointcall_executor.actions.world import Done, Verb, World
from pointcall_runbook.vocabulary import Notify, Outcome


def perform(action: Notify, world: World) -> Done:
    target = world.channels.send(action.channel.number, action.level, action.code)
    detail = {"level": action.level.name, "code": action.code}
    return Done(Outcome.APPLIED, target, detail, postcondition="the channel took the message")


VERB: Final = Verb(perform)
