"""Connects to a dependency time out: open its circuit for a while, longer each time, and call a person in the end."""

from pointcall_runbook import (
    ConnectSlow,
    Decision,
    Escalate,
    Level,
    Notify,
    OpenCircuit,
    Remember,
    channel,
    minutes,
    parameter,
    remembered,
    runbook,
    seconds,
)

OPS = channel("ops")
ONCALL = channel("oncall")
MIN_ATTEMPTS = parameter(20, lo=1, hi=1_000_000)
MAX_TIMEOUTS_PERCENT = parameter(50, lo=0, hi=100)
OPENED = remembered(0, hi=6)  # times in a row

HELD = 1
STILL_SLOW = 2


def percent(part: int, whole: int) -> int:
    return part * 100 // max(whole, 1)


@runbook
def slow(e: ConnectSlow) -> Decision:
    if e.attempts < MIN_ATTEMPTS:
        return []
    if percent(e.timeouts, e.attempts) <= MAX_TIMEOUTS_PERCENT:
        return [Remember(slot=OPENED.slot, value=0)] if OPENED > 0 else []
    if OPENED >= 6:
        return [Escalate(channel=ONCALL, code=STILL_SLOW)]
    return [
        OpenCircuit(address=e.address, port=e.port, hold=min(seconds(5) << OPENED, minutes(5))),
        Remember(slot=OPENED.slot, value=OPENED + 1),
        Notify(channel=OPS, level=Level.WARNING, code=HELD),
    ]
