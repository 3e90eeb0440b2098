"""A new state does not hold: a canary that dies young is recreated from the declared state and watched for a while.

The declared state is the one of the armed manifest, so this goes back to what was signed, not to what was running.
"""

from pointcall_runbook import (
    Again,
    Decision,
    Escalate,
    Level,
    Notify,
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
    service,
)

CANARY = service("canary")
OPS = channel("ops")
ONCALL = channel("oncall")
YOUNG = parameter(minutes(2), lo=seconds(1), hi=minutes(60))
WATCH = parameter(minutes(5), lo=seconds(10), hi=minutes(60))
DEATHS = remembered(0, hi=3)  # while it is watched

WATCHING = 1
ROLLED_BACK = 2
HOLDS = 3


@runbook
def exited(e: ProcessExited) -> Decision:
    if e.service != CANARY or e.lifetime >= YOUNG:
        return []
    if DEATHS >= 3:
        return [Escalate(channel=ONCALL, code=ROLLED_BACK)]
    return [
        Recreate(service=CANARY),
        Remember(slot=DEATHS.slot, value=DEATHS + 1),
        Again(after=WATCH, tag=WATCHING),
        Notify(channel=OPS, level=Level.WARNING, code=ROLLED_BACK),
    ]


@runbook
def watched(e: Timer) -> Decision:
    if e.tag != WATCHING or e.service != CANARY:
        return []
    return [Remember(slot=DEATHS.slot, value=0), Notify(channel=OPS, level=Level.INFO, code=HOLDS)]
