"""A circuit stays open although the service is there: recreate once, then close it by hand and let it prove itself."""

from pointcall_runbook import (
    NO_SERVICE,
    CircuitStuck,
    CloseCircuit,
    Decision,
    Escalate,
    Recreate,
    Remember,
    channel,
    minutes,
    parameter,
    remembered,
    runbook,
    seconds,
)

ONCALL = channel("oncall")
PATIENCE = parameter(minutes(2), lo=seconds(1), hi=minutes(60))
STEP = remembered(0, hi=2)

STUCK = 1


@runbook
def stuck(e: CircuitStuck) -> Decision:
    if e.open_for < PATIENCE:
        return []
    if STEP == 0 and e.service != NO_SERVICE:
        return [Recreate(service=e.service), Remember(slot=STEP.slot, value=1)]
    if STEP <= 1:
        return [CloseCircuit(address=e.address, port=e.port), Remember(slot=STEP.slot, value=2)]
    return [Escalate(channel=ONCALL, code=STUCK), Remember(slot=STEP.slot, value=0)]
