"""A watched service makes a system call it never made while learning: tell people; act on none of it."""

from pointcall_runbook import Decision, Level, Notify, SyscallUnusual, Unusual, channel, runbook

OPS = channel("ops")
SECURITY = channel("security")

# System call numbers of x86_64 that a service rarely has a good reason for.
PTRACE = 101
MOUNT = 165
INIT_MODULE = 175
BPF = 321
FINIT_MODULE = 313


@runbook
def unusual(e: SyscallUnusual) -> Decision:
    match e.kind:
        case Unusual.ERRORS:
            return []
        case Unusual.NOVEL:
            if e.number in (PTRACE, MOUNT, INIT_MODULE, FINIT_MODULE, BPF):
                return [Notify(channel=SECURITY, level=Level.CRITICAL, code=e.number)]
            return [Notify(channel=OPS, level=Level.INFO, code=e.number)]
