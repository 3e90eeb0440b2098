"""A block device reports errors: nothing is restarted on a bad disk. People are called, louder with the count."""

from pointcall_runbook import Decision, DiskError, Escalate, Level, Notify, channel, parameter, runbook

OPS = channel("ops")
ONCALL = channel("oncall")
CALL_AFTER = parameter(5, lo=1, hi=1_000_000)

ERRORS = 1


@runbook
def errors(e: DiskError) -> Decision:
    if e.errors == 0:
        return []
    if e.errors < CALL_AFTER:
        return [Notify(channel=OPS, level=Level.ERROR, code=ERRORS)]
    return [Escalate(channel=ONCALL, code=ERRORS), Notify(channel=OPS, level=Level.CRITICAL, code=ERRORS)]
