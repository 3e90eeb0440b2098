"""The spawner: one small single-threaded process that forks, prepares and executes services for the executor.

A fork in a process with threads, JIT code and a ring buffer is slow and fragile; here it is neither. Requests come as
one JSON datagram with the descriptors of stdout, of the verified program and of the cgroups attached; the answer is the
pid with its pidfd (opened before it can be reaped), or the step that failed with its errno. A child joins its cgroups
before it executes, so nothing of it ever runs outside them. Services outlive the spawner; it ends when the executor's
end of the socket closes.

Run as `python -m pointcall_executor.services.spawner FD`. Imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

MAX_REQUEST_BYTES: Final = 128 * 1024
MAX_DESCRIPTORS: Final = 8
_PR_SET_NO_NEW_PRIVS: Final = 38
# clone(2) flags. `pid` takes effect for the program's children only: a process cannot move itself.
_NAMESPACES: Final = {
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "pid": 0x20000000,
    "network": 0x40000000,
}


def _no_new_privileges(libc: ctypes.CDLL) -> None:
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _unshare(names: Sequence[str], libc: ctypes.CDLL) -> None:
    if libc.unshare(functools.reduce(int.__or__, (_NAMESPACES[n] for n in names))):
        raise OSError(ctypes.get_errno(), "unshare")


def _steps(
    request: dict[str, Any], output: int, groups: Sequence[int], libc: ctypes.CDLL
) -> list[tuple[str, Callable[[], object]]]:
    """What the child does before it executes, in order, each with the name that an error carries."""
    steps: list[tuple[str, Callable[[], object]]] = [("setsid", os.setsid)]
    steps += [("cgroup", functools.partial(os.write, fd, b"0")) for fd in groups]
    steps += [
        ("stdin", lambda: os.dup2(os.open(os.devnull, os.O_RDONLY), 0)),
        ("stdout", lambda: os.dup2(output, 1)),
        ("stderr", lambda: os.dup2(output, 2)),
        ("directory", lambda: os.chdir(request["directory"])),
    ]
    if names := request.get("namespaces"):
        steps.append(("namespaces", lambda: _unshare(names, libc)))
    if (processes := request.get("processes")) is not None:
        steps.append(("processes", lambda: resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))))
    if (gid := request.get("gid")) is not None:
        steps += [("groups", lambda: os.setgroups([])), ("group", lambda: os.setgid(gid))]
    if (uid := request.get("uid")) is not None:
        steps.append(("user", lambda: os.setuid(uid)))
    if request.get("no_new_privileges", True):
        steps.append(("no_new_privileges", lambda: _no_new_privileges(libc)))
    return steps


def _child(request: dict[str, Any], descriptors: Sequence[int], report: int, libc: ctypes.CDLL) -> None:
    """In the child: prepare, then execute. Never returns; a failure is written to `report`."""
    step = "signals"
    output, program, groups = descriptors[0], descriptors[1], descriptors[2:]
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for number in (signal.SIGPIPE, signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        for step, action in _steps(request, output, groups, libc):  # noqa: B007 - the name is for the report
            action()
        step = "exec"
        os.execve(program, request["argv"], request["environment"])  # every other descriptor closes on exec
    except OSError as error:
        os.write(report, json.dumps({"step": step, "errno": error.errno or 0}).encode())
    finally:
        os._exit(127)


def spawn(request: dict[str, Any], descriptors: Sequence[int], libc: ctypes.CDLL) -> dict[str, Any]:
    """Fork and execute; {"pid": n} once the new program runs, {"step", "errno"} where it could not start."""
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _child(request, descriptors, write, libc)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        failure = pipe.read()  # empty once the program executes: the pipe closes on exec
    if not failure:
        return {"pid": pid}
    os.waitpid(pid, 0)
    return dict(json.loads(failure))


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


class Leases:
    """Frozen cgroups and when each ends, CLOCK_MONOTONIC ns."""

    def __init__(self) -> None:
        self._ends: dict[str, int] = {}

    def freeze(self, folder: str, until_ns: int) -> None:
        self._ends[folder] = until_ns
        _write(f"{folder}/cgroup.freeze", b"1")

    def thaw(self, folder: str) -> None:
        """Of a cgroup that is gone nothing is left to thaw."""
        self._ends.pop(folder, None)
        with contextlib.suppress(FileNotFoundError):
            _write(f"{folder}/cgroup.freeze", b"0")

    def end(self, *, all: bool = False) -> float | None:
        """Thaw what is over; seconds until the next one is."""
        now = time.monotonic_ns()
        for folder in [f for f, until_ns in self._ends.items() if all or until_ns <= now]:
            self.thaw(folder)
        return max(0.0, min(self._ends.values()) / 1e9 - time.monotonic()) if self._ends else None


def _write(path: str, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)


def _answer(
    request: dict[str, Any], descriptors: Sequence[int], leases: Leases, libc: ctypes.CDLL
) -> tuple[dict[str, Any], list[int]]:
    match request.pop("do"):
        case "freeze":
            leases.freeze(request["folder"], request["until_ns"])
        case "thaw":
            leases.thaw(request["folder"])
        case _:
            answer = spawn(request, descriptors, libc)
            return answer, [os.pidfd_open(answer["pid"])] if "pid" in answer else []
    return {}, []


def serve(channel: socket.socket) -> None:
    """Answer requests until the executor closes its end. Children are reaped as they end, leases end at their time."""
    libc = ctypes.CDLL(None, use_errno=True)
    leases = Leases()
    signal.signal(signal.SIGCHLD, lambda *_: _reap())
    waiting = select.poll()
    waiting.register(channel, select.POLLIN)
    while True:
        seconds = leases.end()
        if not waiting.poll(None if seconds is None else seconds * 1000 + 1):
            continue
        data, descriptors, _flags, _address = socket.recv_fds(
            channel, MAX_REQUEST_BYTES, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
        )
        if not data:
            leases.end(all=True)
            return
        # The child's end must not be reaped by the handler between fork and the answer's waitpid.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        found: list[int] = []
        try:
            answer, found = _answer(json.loads(data), descriptors, leases, libc)
        except OSError as error:
            answer = {"step": "fork", "errno": error.errno or 0}
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            for fd in descriptors:
                os.close(fd)
        socket.send_fds(channel, [json.dumps(answer).encode()], found)
        for fd in found:
            os.close(fd)


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with the executor, not before
    serve(channel)


if __name__ == "__main__":
    main()
