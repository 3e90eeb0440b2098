"""Most system calls of a watched service fail at once: isolate it from the network for a while and call a person."""

from pointcall_runbook import (
    NO_SERVICE,
    Decision,
    Escalate,
    Isolate,
    SyscallUnusual,
    Unusual,
    channel,
    minutes,
    parameter,
    runbook,
    seconds,
)

ONCALL = channel("oncall")
MIN_CALLS = parameter(100, lo=1, hi=1_000_000)
MAX_ERRORS_PERMILLE = parameter(500, lo=0, hi=1000)
HOLD = parameter(minutes(1), lo=seconds(1), hi=minutes(30))

ISOLATED = 1


@runbook
def unusual(e: SyscallUnusual) -> Decision:
    if e.kind != Unusual.ERRORS or e.service == NO_SERVICE:
        return []
    if e.calls < MIN_CALLS:
        return []
    if e.errors * 1000 // e.calls <= MAX_ERRORS_PERMILLE:
        return []
    return [Isolate(service=e.service, hold=HOLD), Escalate(channel=ONCALL, code=ISOLATED)]
