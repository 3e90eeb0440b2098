"""Recreate a refusing service at most twice an hour; then call a person instead of trying again."""

from pointcall_runbook import NO_SERVICE, CircuitOpened, Decision, Escalate, Recreate, channel, milliseconds, runbook


@runbook
def decide(e: CircuitOpened) -> Decision:
    if e.service == NO_SERVICE:
        return []
    if e.restarts >= 2:
        return [Escalate(channel=channel("ops"), code=7)]
    return [Recreate(service=e.service, grace=milliseconds(500))]
