"""The system calls that no executor needs, refused by the kernel for the rest of this process and its children.

A list of what is refused, not of what is permitted: Python, gRPC, SQLite and the Wasm engine use what the C library of
the day likes, and a recovery must not fail on an update of it. libseccomp makes the filter. The spawner is not under
it: services have what their declaration says. Spec: seccomp(2), docs/spec/config.md.
"""

from __future__ import annotations

import errno
from typing import Any, Final

from pointcall_runbook.errors import PointcallError

# By reason. Names that a kernel or a libseccomp does not know are left out: what does not exist cannot be called.
REFUSED: Final = {
    "other processes' memory": ("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp"),
    "file systems": (
        "mount", "umount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "fsopen", "fsconfig",
        "fsmount", "fspick", "mount_setattr", "open_by_handle_at", "quotactl", "quotactl_fd", "swapon", "swapoff",
    ),
    "the kernel itself": (
        "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "syslog", "acct",
        "iopl", "ioperm", "modify_ldt", "vm86", "vm86old", "uselib", "nfsservctl", "lookup_dcookie", "_sysctl",
    ),
    "the clock": ("settimeofday", "clock_settime", "clock_settime64", "clock_adjtime", "clock_adjtime64", "adjtimex",
                  "stime"),
    "other identities": (
        "setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setfsuid", "setfsgid", "setgroups",
        "capset", "sethostname", "setdomainname",
    ),
    "keys and namespaces": ("add_key", "request_key", "keyctl", "unshare", "setns", "personality"),
    "what exploits like": ("userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register", "vmsplice",
                           "remap_file_pages", "migrate_pages", "move_pages", "mbind", "set_mempolicy"),
}  # fmt: skip
# Address families that are permitted: Unix, IPv4, IPv6, netlink, and vsock, over which a TDX guest asks for its quote.
FAMILIES: Final = (1, 2, 10, 16, 40)
FAMILIES_END: Final = 46
_CLONE_NEW: Final = (0x10000000, 0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x20000000, 0x40000000, 0x00000080)


class FilterError(PointcallError):
    """The filter cannot be made here."""

    id = "privilege.seccomp"


def apply() -> int:
    """Load the filter for every thread; its number of rules. FilterError where libseccomp or the kernel has it not."""
    try:
        import pyseccomp as seccomp
    except (ImportError, RuntimeError, OSError) as missing:
        raise FilterError(
            "system calls cannot be filtered", want="libseccomp.so.2 and pyseccomp", got=str(missing),
            hint="install libseccomp2, or say seccomp = false in the settings",
        ) from None  # fmt: skip
    try:
        made = seccomp.SyscallFilter(seccomp.ALLOW)
        made.set_attr(seccomp.Attr.CTL_TSYNC, 1)
        rules = _fill(made, seccomp)
        made.load()
    except (OSError, ValueError, RuntimeError) as error:
        raise FilterError("the kernel takes no filter", want="seccomp", got=str(error)) from error
    return rules


def _fill(made: Any, seccomp: Any) -> int:
    refused, absent = seccomp.ERRNO(errno.EPERM), seccomp.ERRNO(errno.ENOSYS)
    count = 0
    for names in REFUSED.values():
        for name in names:
            count += _rule(made, refused, name)
    for family in range(3, FAMILIES_END):
        if family not in FAMILIES:
            count += _rule(made, refused, "socket", seccomp.Arg(0, seccomp.EQ, family))
    for flag in _CLONE_NEW:
        count += _rule(made, refused, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag))
    return count + _rule(made, absent, "clone3")  # its flags lie in memory; the C library goes back to clone


def _rule(made: Any, action: int, name: str, *args: Any) -> int:
    try:
        made.add_rule(action, name, *args)
    except (OSError, ValueError, RuntimeError):
        return 0
    return 1
