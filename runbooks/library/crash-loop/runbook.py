"""A service's main process ends again and again: restart with back-off, check, and call a person in the end."""

from pointcall_runbook import (
    NO_SERVICE,
    ActionDone,
    ActionKind,
    Again,
    Decision,
    Escalate,
    Level,
    Notify,
    Outcome,
    ProcessExited,
    Recreate,
    Remember,
    Timer,
    channel,
    minutes,
    parameter,
    remembered,
    runbook,
    seconds,
)

OPS = channel("ops")
ONCALL = channel("oncall")
MAX_EXITS = parameter(6, lo=1, hi=1000)  # in the last hour
HEALTHY = parameter(minutes(5), lo=seconds(1), hi=minutes(60))
ATTEMPT = remembered(0, hi=6)

RESTART = 1  # the tag of the timer
GAVE_UP = 2
FAILED = 3


@runbook
def exited(e: ProcessExited) -> Decision:
    if e.service == NO_SERVICE:
        return []
    if e.exits > MAX_EXITS:
        return [Escalate(channel=ONCALL, code=GAVE_UP)]
    if e.lifetime >= HEALTHY:
        return [Recreate(service=e.service), Remember(slot=ATTEMPT.slot, value=0)]
    return [Again(after=min(seconds(1) << ATTEMPT, minutes(1)), tag=RESTART)]


@runbook
def due(e: Timer) -> Decision:
    if e.tag != RESTART or e.service == NO_SERVICE:
        return []
    return [Recreate(service=e.service), Remember(slot=ATTEMPT.slot, value=min(ATTEMPT + 1, 6))]


@runbook
def done(e: ActionDone) -> Decision:
    if e.action != ActionKind.RECREATE:
        return []
    match e.outcome:
        case Outcome.APPLIED | Outcome.MONITORED:
            return []
        case Outcome.REFUSED:
            return [Notify(channel=OPS, level=Level.WARNING, code=FAILED)]
        case Outcome.FAILED | Outcome.UNCONFIRMED:
            return [Escalate(channel=ONCALL, code=FAILED)]
