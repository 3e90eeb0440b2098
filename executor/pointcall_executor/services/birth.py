"""How a service is born: cloned straight into its cgroup and namespaces, prepared, executed by descriptor.

In two parts, since the first is slow: an unborn process waits for one byte. It is cloned with CLONE_INTO_CGROUP: it
never runs outside its cgroup, and is not moved there (moving a task, as into a v1 cgroup, makes the kernel wait for a
grace period, 10 to 20 ms). It ends by itself if the executor or the spawner does. It waits in one of two ways:

  held     it has executed its program, and the kernel (ptrace) holds it before the first instruction. To execute is
           slow, 0.8 ms, since the copy of the spawner's memory is torn down then.
  waiting  it has done everything but execute. For programs that may gain privileges when they are executed, which the
           kernel does not grant to what is traced; and where tracing is forbidden.

Runs in the spawner only: one thread, the standard library.
Source: linux/sched.h, linux/ptrace.h, clone3(2), execveat(2), ptrace(2), namespaces(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import itertools
import json
import os
import resource
import signal
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_SYS_CLONE3: Final = 435  # on every architecture
_AT_EMPTY_PATH: Final = 0x1000
_PR_CAPBSET_DROP: Final = 24
_CAP_SYS_PTRACE: Final = 19
_PR_SET_DUMPABLE: Final = 4
_CLONE_PIDFD: Final = 0x00001000
_CLONE_INTO_CGROUP: Final = 0x200000000
_CLONE_ARGS: Final = struct.Struct(
    "=11Q"
)  # flags pidfd child_tid parent_tid exit_signal stack stack_size tls set_tid n cgroup
_NAMESPACES: Final = {
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "pid": 0x20000000,
    "network": 0x40000000,
}
_PR_SET_NO_NEW_PRIVS: Final = 38
_MS_SLAVE_REC: Final = (1 << 19) | 0x4000
_MS_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1
_IFREQ: Final = struct.Struct("=16sh22x")
_MAX_FAILURE_BYTES: Final = 4096
_SILENT: Final = b'{"step": "killed", "errno": 3}'  # ESRCH
_FD_END: Final = 1 << 20
_TRACEME: Final = 0
_CONT: Final = 7
_DETACH: Final = 17
_SETOPTIONS: Final = 0x4200
_END_WITH_TRACER: Final = 0x00100000  # PTRACE_O_EXITKILL
_STOP_AT_EXEC: Final = 0x00000010  # PTRACE_O_TRACEEXEC
_AT_EXEC: Final = signal.SIGTRAP | (4 << 8)  # the status, without its low byte, of a stop by PTRACE_EVENT_EXEC
READY: Final = b"+"  # it waits
TRACED: Final = b"="  # it waits, and its parent may trace it
HEARD: Final = b"!"  # it executes now, unless a failure follows

Mapped = tuple[bytes, tuple[tuple[int, int, int] | None, ...]]

# Not CDLL: that would give up the interpreter's lock around the call, and the child has no other thread to return it.
LIBC: Final = ctypes.PyDLL(None, use_errno=True)


def _clone(namespaces: Sequence[str], cgroup: int) -> tuple[int, int]:
    """(pid, pidfd) in the parent, (0, -1) in the child."""
    pidfd = ctypes.c_int(-1)
    flags = functools.reduce(int.__or__, (_NAMESPACES[n] for n in namespaces), _CLONE_PIDFD | _CLONE_INTO_CGROUP)
    words = (flags, ctypes.addressof(pidfd), 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, cgroup)
    raw = ctypes.create_string_buffer(_CLONE_ARGS.pack(*words), _CLONE_ARGS.size)
    pid = int(LIBC.syscall(_SYS_CLONE3, raw, ctypes.c_size_t(_CLONE_ARGS.size)))
    if pid < 0:
        raise OSError(ctypes.get_errno(), "clone3")
    return pid, pidfd.value


def _call(result: int, name: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), name)


def _trace(request: int, pid: int, data: int = 0) -> None:
    word = ctypes.c_long
    _call(LIBC.ptrace(word(request), word(pid), word(0), word(data)), "ptrace")


def _mount(what: str, where: str, kind: str | None, flags: int) -> None:
    _call(LIBC.mount(what.encode(), where.encode(), kind and kind.encode(), ctypes.c_ulong(flags), None), "mount")


def _loopback_up() -> None:
    """A new network namespace has a loopback interface that is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        fcntl.ioctl(channel, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", _IFF_UP))


def _inside(namespaces: Sequence[str]) -> list[tuple[str, Callable[[], object]]]:
    """What makes new namespaces usable: mounts that do not reach the host, its own /proc, its own loopback."""
    steps: list[tuple[str, Callable[[], object]]] = []
    if "mount" in namespaces:
        steps.append(("namespaces", lambda: _mount("none", "/", None, _MS_SLAVE_REC)))
        if "pid" in namespaces:
            steps.append(("namespaces", lambda: _mount("proc", "/proc", "proc", _MS_NOSUID_NODEV_NOEXEC)))
    if "network" in namespaces:
        steps.append(("namespaces", _loopback_up))
    return steps


def _steps(request: dict[str, Any], output: int, joins: Sequence[int]) -> list[tuple[str, Callable[[], object]]]:
    """What the child does before it executes, in order, each with the name that an error carries."""
    steps: list[tuple[str, Callable[[], object]]] = [("setsid", os.setsid)]
    steps += [("cgroup", functools.partial(os.write, fd, b"0")) for fd in joins]
    steps += [
        ("stdin", lambda: os.dup2(os.open(os.devnull, os.O_RDONLY), 0)),
        ("stdout", lambda: os.dup2(output, 1)),
        ("stderr", lambda: os.dup2(output, 2)),
        *_inside(request["namespaces"]),
        ("directory", lambda: os.chdir(request["directory"])),
    ]
    steps.append(("capabilities", _give_up_tracing))
    if (processes := request.get("processes")) is not None:
        steps.append(("processes", lambda: resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))))
    if (gid := request.get("gid")) is not None:
        steps += [("groups", lambda: os.setgroups([])), ("group", lambda: os.setgid(gid))]
    if (uid := request.get("uid")) is not None:
        steps.append(("user", lambda: os.setuid(uid)))
    if request["no_new_privileges"]:
        steps.append(("no_new_privileges", lambda: _call(LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")))
    return steps


def _give_up_tracing() -> None:
    """CAP_SYS_PTRACE is the spawner's alone: with it a service of root's could read the executor's keys."""
    if LIBC.prctl(_PR_CAPBSET_DROP, _CAP_SYS_PTRACE, 0, 0, 0) and ctypes.get_errno() != errno.EPERM:
        raise OSError(ctypes.get_errno(), "prctl")  # EPERM: a spawner that is not privileged has nothing to give up


def _texts(values: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(values) + 1))(*(os.fsencode(v) for v in values), None)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a child needs: the request and open descriptors. `joins` are cgroup.procs files of v1 folders."""

    request: dict[str, Any]
    program: int
    output: int
    joins: Sequence[int]


def _close_others(keep: Sequence[int]) -> None:
    """What the spawner had open: its channel must not seem to live on in a child that waits."""
    ends = [2, *sorted(keep), _FD_END]
    for low, high in itertools.pairwise(ends):
        os.closerange(low + 1, high)


def _child(plan: Plan, report: int, go: int) -> None:
    """In the child: prepare, say so by one byte, wait, execute. Never returns; a failure is written to `report`."""
    step = "signals"
    request = plan.request
    try:
        _close_others([plan.program, plan.output, *plan.joins, report, go])
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for number in (signal.SIGPIPE, signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        for step, action in _steps(request, plan.output, plan.joins):  # noqa: B007 - the name is for the report
            action()
        # Until it executes it holds a copy of the spawner's memory, perhaps under the service's own account.
        _call(LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")
        argv = _texts(request["argv"])
        environment = _texts([f"{k}={v}" for k, v in request["environment"].items()])
        execute, buffer = LIBC.execveat, ctypes.create_string_buffer(1)
        arguments = (plan.program, b"", argv, environment, _AT_EMPTY_PATH)
        os.write(report, TRACED if request["no_new_privileges"] and _traced() else READY)
        step = "exec"
        if LIBC.read(go, buffer, 1) == 1:  # every other descriptor closes on exec
            LIBC.write(report, HEARD, 1)
            execute(*arguments)
            raise OSError(ctypes.get_errno(), "execveat")
    except BaseException as error:
        code = error.errno if isinstance(error, OSError) else errno.EINVAL
        os.write(report, json.dumps({"step": step, "errno": code or 0}).encode())
    finally:
        os._exit(127)


def _traced() -> bool:
    """Whether the parent traces this process from now on. Yama, a seccomp filter or a tracer may be against it."""
    return not LIBC.ptrace(ctypes.c_long(_TRACEME), ctypes.c_long(0), ctypes.c_long(0), ctypes.c_long(0))


def _signalled(pid: int) -> bool:
    """Whether a signal waits for a process, or it is gone."""
    try:
        with Path(f"/proc/{pid}/status").open("rb") as status:
            return any(int(row.split()[1], 16) for row in status if row.startswith((b"SigPnd:", b"ShdPnd:")))
    except OSError:
        return True


def _mapped(pid: int) -> Mapped | None:
    """What a process has mapped, as text, and what is at the paths of it now. None: that cannot be said, or one of the
    files was removed."""
    try:
        text = Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return None
    if b" (deleted)\n" in text:
        return None
    paths = sorted({fields[5] for row in text.splitlines() if len(fields := row.split(None, 5)) == 6})
    return text, tuple(_identity(path) for path in paths if path.startswith(b"/"))


def _identity(path: bytes) -> tuple[int, int, int] | None:
    try:
        about = os.stat(path)  # noqa: PTH116 - of bytes, as the kernel has it
    except OSError:
        return None
    return about.st_dev, about.st_ino, about.st_ctime_ns


@dataclass(slots=True)
class Held:
    """A process that the kernel holds before the first instruction of its program; it ends with its tracer."""

    pid: int
    pidfd: int
    go: int  # a byte on it lets the process go; its end ends the process
    report: int
    mapped: Mapped | None

    def settle(self) -> None:
        """`go` is readable: let it go, or end it. A signal that came while it was held would meet the service later,
        and the loader that it executes first (the ELF interpreter) may have been replaced since."""
        try:
            as_it_was = self.mapped is not None and self.mapped == _mapped(self.pid)
            if os.read(self.go, 1) and as_it_was and not _signalled(self.pid):
                with contextlib.suppress(OSError):  # somebody killed it meanwhile: no word says so
                    _trace(_DETACH, self.pid)
                    os.write(self.report, HEARD)
            else:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        finally:
            for fd in (self.pidfd, self.go, self.report):
                os.close(fd)


@dataclass(frozen=True, slots=True)
class Born:
    """What became of one birth: the answer to the executor, its descriptors [pidfd, go, report], and who is held."""

    answer: dict[str, Any]
    descriptors: Sequence[int] = ()
    held: Held | None = None


def _pipes() -> tuple[int, int, int, int]:
    """The ends of two: report to read and to write, go to read and to write."""
    first = os.pipe2(os.O_CLOEXEC)
    try:
        return *first, *os.pipe2(os.O_CLOEXEC)
    except OSError:
        for fd in first:
            os.close(fd)
        raise


def unborn(plan: Plan, cgroup: int) -> Born:
    """{"pid"} and [pidfd, go, report] of a process that begins once a byte is written to `go`; `report` then says HEARD
    and ends, or goes on with {"step", "errno"}. With "held": true it is the spawner who lets it begin. {"step",
    "errno"} and nothing if it could not be prepared. `cgroup` is the open v2 folder.

    SIGCHLD must be blocked: nobody else may reap it.
    """
    report, told, hear, go = _pipes()
    try:
        pid, pidfd = _clone(plan.request["namespaces"], cgroup)
        if pid == 0:
            _child(plan, told, hear)
    except OSError as error:
        pid, pidfd, answer = 0, -1, {"step": "clone3", "errno": error.errno or 0}
    os.close(told)
    os.close(hear)
    if pid:
        first = os.read(report, _MAX_FAILURE_BYTES)
        if first == READY:
            return Born({"pid": pid}, (pidfd, go, report))
        if first == TRACED:
            first = _executed(pid, pidfd, go, report)
            if not first:
                os.close(go)
                os.close(report)
                return _held(pid, pidfd)
        else:
            os.waitpid(pid, 0)
        answer = dict(json.loads(first or _SILENT))
    for fd in (pidfd, go, report):
        if fd >= 0:
            os.close(fd)
    return Born(answer)


def _executed(pid: int, pidfd: int, go: int, report: int) -> bytes:
    """Let a traced child execute as far as its first instruction; empty if it stands there, otherwise why it ended.

    It hears the byte only once it is sure to end with us: what executes must not run because we died.
    """
    signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
    _, status = os.waitpid(pid, 0)
    told = False
    while os.WIFSTOPPED(status) and status >> 8 != _AT_EXEC:
        try:
            if not told:
                _trace(_SETOPTIONS, pid, _END_WITH_TRACER | _STOP_AT_EXEC)
                os.write(go, b"1")
                told = True
            number = os.WSTOPSIG(status)
            _trace(_CONT, pid, 0 if number == signal.SIGSTOP else number)
        except OSError:  # it was killed; or else it would stand here for ever
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    return b"" if os.WIFSTOPPED(status) else os.read(report, _MAX_FAILURE_BYTES).removeprefix(HEARD) or _SILENT


def _held(pid: int, pidfd: int) -> Born:
    """Nobody could let it go without these descriptors: if they cannot be had it ends. Then OSError."""
    found = [pidfd]
    try:
        report, told, hear, go = _pipes()
        found += [report, told, hear, go]
        return Born({"pid": pid, "held": True}, (pidfd, go, report), Held(pid, os.dup(pidfd), hear, told, _mapped(pid)))
    except OSError:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitpid(pid, 0)
        for fd in found:
            os.close(fd)
        raise
