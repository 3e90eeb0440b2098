"""A dependency refuses connections: recreate the declared service behind it, and tell the channel.

The kernel's breaker has already opened the circuit, so clients fail fast while this decides. A service that was
recreated too often is left alone; then people are told, and the circuit stays open.
"""

from pointcall_runbook import (
    NO_SERVICE,
    CircuitOpened,
    Decision,
    Level,
    Notify,
    Recreate,
    channel,
    minutes,
    parameter,
    runbook,
    seconds,
)

OPS = channel("ops")
MAX_RESTARTS = parameter(3, lo=0, hi=100)  # in the last hour
GRACE = parameter(seconds(1), lo=0, hi=minutes(1))

RECREATED = 1
GAVE_UP = 2
UNKNOWN_SERVICE = 3


@runbook
def opened(e: CircuitOpened) -> Decision:
    if e.service == NO_SERVICE:
        return [Notify(channel=OPS, level=Level.WARNING, code=UNKNOWN_SERVICE)]
    if e.restarts >= MAX_RESTARTS:
        return [Notify(channel=OPS, level=Level.CRITICAL, code=GAVE_UP)]
    return [
        Recreate(service=e.service, grace=GRACE),
        Notify(channel=OPS, level=Level.INFO, code=RECREATED),
    ]
