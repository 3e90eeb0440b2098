"""escalate: call a person. Like `notify` at the loudest level, and told again until somebody acknowledges it.

Not here: telling again, and the acknowledgement (messenger.py), which any operator can give:
`pointcall acknowledge RUN`.
"""

from __future__ import annotations

from typing import Final

from pointcall_executor.actions.world import Done, Verb, World
from pointcall_runbook.vocabulary import Escalate, Level, Outcome


def perform(action: Escalate, world: World) -> Done:
    target = world.channels.send(action.channel.number, Level.CRITICAL, action.code)
    return Done(Outcome.APPLIED, target, {"code": action.code}, postcondition="the channel took the message")


VERB: Final = Verb(perform)
