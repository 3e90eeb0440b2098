"""A file system is slow for its users: freeze the heaviest writer for a moment; when that does not help, escalate."""

from pointcall_runbook import (
    NO_SERVICE,
    Decision,
    Escalate,
    FilesystemSlow,
    Freeze,
    Level,
    Notify,
    Operation,
    Remember,
    channel,
    milliseconds,
    minutes,
    parameter,
    remembered,
    runbook,
    seconds,
)

OPS = channel("ops")
ONCALL = channel("oncall")
LIMIT = parameter(milliseconds(500), lo=milliseconds(1), hi=minutes(10))
MIN_SLOW = parameter(10, lo=1, hi=1_000_000)
FROZEN = remembered(0, hi=3)

FROZE = 1
STALLED = 2


@runbook
def slow(e: FilesystemSlow) -> Decision:
    if e.slow < MIN_SLOW and e.longest < LIMIT:
        return []
    match e.operation:
        case Operation.READ | Operation.OTHER:
            return [Notify(channel=OPS, level=Level.WARNING, code=STALLED)]
        case Operation.WRITE | Operation.FSYNC:
            if e.service == NO_SERVICE or FROZEN >= 3:
                return [Escalate(channel=ONCALL, code=STALLED)]
            return [
                Freeze(service=e.service, hold=seconds(2) << FROZEN),
                Remember(slot=FROZEN.slot, value=FROZEN + 1),
                Notify(channel=OPS, level=Level.WARNING, code=FROZE),
            ]
