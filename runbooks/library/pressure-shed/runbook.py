"""A service's tasks stall on memory or I/O (PSI): freeze it briefly to let its neighbours breathe, or recreate it."""

from pointcall_runbook import (
    NO_SERVICE,
    Decision,
    Freeze,
    Level,
    Notify,
    PressureHigh,
    Recreate,
    Resource,
    channel,
    milliseconds,
    parameter,
    runbook,
    seconds,
)

OPS = channel("ops")
SHED_PERCENT = parameter(60, lo=1, hi=100)  # of the window
MAX_RESTARTS = parameter(2, lo=0, hi=100)

SHED = 1
RECREATED = 2


def percent(stalled: int, window: int) -> int:
    return min(stalled, seconds(3600)) * 100 // max(window, 1)


@runbook
def pressed(e: PressureHigh) -> Decision:
    if e.service == NO_SERVICE or percent(e.stalled, e.window) < SHED_PERCENT:
        return []
    match e.resource:
        case Resource.CPU:
            return [Notify(channel=OPS, level=Level.WARNING, code=SHED)]
        case Resource.IO:
            return [Freeze(service=e.service, hold=milliseconds(500))]
        case Resource.MEMORY:
            if e.restarts >= MAX_RESTARTS:
                return [Freeze(service=e.service, hold=seconds(2)), Notify(channel=OPS, level=Level.ERROR, code=SHED)]
            return [
                Recreate(service=e.service, grace=seconds(5)),
                Notify(channel=OPS, level=Level.WARNING, code=RECREATED),
            ]
