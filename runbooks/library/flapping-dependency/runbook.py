"""A circuit opens again and again: hold it open with a growing pause instead of restarting what does not help."""

from pointcall_runbook import (
    CircuitClosed,
    CircuitOpened,
    Decision,
    Level,
    Notify,
    OpenCircuit,
    channel,
    minutes,
    parameter,
    runbook,
    seconds,
)

OPS = channel("ops")
FLAPS = parameter(4, lo=2, hi=1000)  # openings in the last hour that count as flapping
FIRST_HOLD = parameter(seconds(10), lo=seconds(1), hi=minutes(5))

HELD = 1
RECOVERED = 2


@runbook
def opened(e: CircuitOpened) -> Decision:
    if e.opens < FLAPS:
        return []
    beyond = max(min(e.opens - FLAPS, 6), 0)
    return [
        OpenCircuit(address=e.address, port=e.port, hold=min(FIRST_HOLD << beyond, minutes(30))),
        Notify(channel=OPS, level=Level.WARNING, code=HELD),
    ]


@runbook
def closed(e: CircuitClosed) -> Decision:
    if e.open_for < minutes(1):
        return []
    return [Notify(channel=OPS, level=Level.INFO, code=RECOVERED)]
