"""The kernel's out-of-memory killer took a process of a service: recreate it, and tell people when that repeats."""

from pointcall_runbook import (
    NO_SERVICE,
    Decision,
    Level,
    Notify,
    OomKilled,
    Recreate,
    channel,
    parameter,
    runbook,
)

OPS = channel("ops")
MAX_RESTARTS = parameter(5, lo=0, hi=100)  # in the last hour
LOUD_AFTER = parameter(2, lo=1, hi=100)  # kills in the last hour

RECREATED = 1
GAVE_UP = 2


@runbook
def killed(e: OomKilled) -> Decision:
    if e.service == NO_SERVICE:
        return []
    if e.restarts >= MAX_RESTARTS:
        return [Notify(channel=OPS, level=Level.CRITICAL, code=GAVE_UP)]
    level = Level.ERROR if e.kills >= LOUD_AFTER else Level.INFO
    return [
        Recreate(service=e.service),
        Notify(channel=OPS, level=level, code=RECREATED),
    ]
