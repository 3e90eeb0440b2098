"""Giving up what the executor does not need: user, groups, capabilities, new privileges, core dumps, system calls.

Called once, early: after the spawner was started, which alone keeps what starting services takes (docs/adr/0007), and
before any other thread, since capabilities belong to threads. What is given up cannot be had again. Everything is
looked at afterwards; what did not take effect is an error, never a warning. Spec: capabilities(7), docs/spec/config.md.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import resource
import struct
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

from pointcall_runbook.errors import PointcallError

# Numbers of linux/capability.h.
CAPABILITIES: Final = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_KILL": 5,
    "CAP_SETPCAP": 8,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
# BPF and PERFMON load and trace, NET_ADMIN attaches gates, KILL ends services that run as other users.
NEEDED: Final = ("CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN", "CAP_KILL")
OPEN_FILES: Final = 8192  # a service has about four descriptors, a session of 512 circuits about forty
CORE_BYTES: Final = 0  # a core file would hold the epoch's key

_PR_SET_KEEPCAPS, _PR_CAPBSET_READ, _PR_CAPBSET_DROP = 8, 23, 24
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 4, 38, 47, 4
_VERSION_3: Final = 0x20080522


class PrivilegeError(PointcallError):
    """A privilege could not be given up, or what is needed is not there."""

    id = "privilege.error"


def limit(memory_mb: int) -> None:
    """Own limits: open files, no core files, `memory_mb` of writable memory of our own (RLIMIT_DATA)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (CORE_BYTES, CORE_BYTES))
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = memory_mb * 1024 * 1024
    data = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))


def drop(user: str, groups: Collection[int], extra: Iterable[str] = ()) -> tuple[str, ...]:
    """Become `user` (empty: stay who we are) in `groups`, and keep only NEEDED and `extra`; the names that are kept.

    What the process has not is not asked for. PrivilegeError where it did not take effect in every thread.
    """
    held = effective()
    wanted = {CAPABILITIES[name] for name in (*NEEDED, *extra)}
    kept = wanted & held
    libc = ctypes.CDLL(None, use_errno=True)
    if CAPABILITIES["CAP_SETPCAP"] in held:
        for number in range(64):
            if number not in wanted and libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) == 1:
                _check(libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0), "PR_CAPBSET_DROP")
    if os.getuid() == 0:
        _become(libc, user, groups)
    elif user and user != _name():
        want, hint = user, "start it as root, or let the service manager set the user"
        raise PrivilegeError(
            "only root can become another user", id="privilege.user", want=want, got=_name(), hint=hint
        )
    _set(libc, kept)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    _check(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "PR_SET_DUMPABLE")
    _look(kept)
    return tuple(name for name, number in CAPABILITIES.items() if number in kept)


def effective(task: str = "self") -> set[int]:
    """Capabilities that are in effect, by number."""
    text = Path(f"/proc/{task}/status").read_text()
    bits = int(text.split("CapEff:")[1].split()[0], 16)
    return {number for number in range(64) if bits >> number & 1}


def _name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _become(libc: ctypes.CDLL, user: str, groups: Collection[int]) -> None:
    """`groups` are those of the API's sockets: an owner may give a file to a group that it is in."""
    if not user:
        os.setgroups(sorted({os.getgid(), *groups}))
        return
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        hint = "deploy/systemd/pointcall.sysusers.conf makes it"
        raise PrivilegeError(f"no account {user}", id="privilege.user", want=user, hint=hint) from None
    _check(libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0), "PR_SET_KEEPCAPS")
    os.setgroups(sorted({account.pw_gid, *groups}))
    os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
    os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)


def _set(libc: ctypes.CDLL, numbers: Collection[int]) -> None:
    """capset(2): effective and permitted are `numbers`, nothing is inheritable."""
    bits = sum(1 << number for number in numbers)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0))
    data = ctypes.create_string_buffer(struct.pack("=6I", low, low, 0, high, high, 0))
    _check(libc.capset(header, data), "capset")


def _check(result: int, what: str) -> None:
    if result:
        got = f"{what}: {os.strerror(ctypes.get_errno())}"
        raise PrivilegeError("a privilege could not be given up", id="privilege.drop", want="success", got=got)


def _look(kept: Collection[int]) -> None:
    """Every thread of this process has exactly `kept`, and can get nothing new."""
    for task in sorted(Path("/proc/self/task").iterdir()):
        text = (task / "status").read_text()
        had = effective(f"self/task/{task.name}")
        if had != set(kept) or "NoNewPrivs:\t1" not in text:
            got = f"thread {task.name} has {sorted(had)}"
            raise PrivilegeError(
                "a thread keeps privileges", id="privilege.thread", want=str(sorted(kept)), got=got,
                hint="privileges are dropped before any thread is started",
            )  # fmt: skip
