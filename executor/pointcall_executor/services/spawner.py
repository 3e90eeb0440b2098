"""The spawner: one small single-threaded process that starts services, keeps their output and ends their leases.

A fork in a process with threads, JIT code and a ring buffer is slow and fragile; here it is neither. Requests come as
one JSON datagram with descriptors attached, and each gets one answer:

  prepare  program, v2 cgroup folder, v1 cgroup.procs files...  -> pid with three descriptors (birth.py), or the
                                                                   step that failed
  read     the reading end of a service's output                -> nothing
  lease    files with what stops and what frees a cgroup        -> nothing; freed in time or when the executor dies
  free     the same files                                       -> nothing
  connect  nothing; `host`, `port`                              -> a socket that is connecting
  program  nothing; `pid`                                       -> the file that it executes, to read
  output   nothing; `pid`                                       -> the reading end of its standard output

Services outlive the executor, and so does their output: the spawner ends when the executor's end of the socket is
closed and no service that it started can write any more. In its own cgroup, so that stopping the executor's unit does
not end it, and so that the breaker can tell its connects from others.

Run as `python -m pointcall_executor.services.spawner FD CGROUP ROOT`, the last two being folders.
Imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from pointcall_executor.services import birth, output

MAX_REQUEST_BYTES: Final = 128 * 1024
MAX_DESCRIPTORS: Final = 8
_ENDS: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
)  # not what ends it: executor and services do

Files = Sequence[Sequence[str]]  # path, what to write to stop, what to write to free


class Leases:
    """Cgroups that are stopped, and when each is freed, CLOCK_MONOTONIC ns."""

    def __init__(self) -> None:
        self._ends: dict[str, tuple[int, Files]] = {}

    def begin(self, files: Files, until_ns: int) -> None:
        self._ends[files[0][0]] = until_ns, files
        try:
            for path, stop, _free in files:
                _write(path, stop)
        except OSError:
            self.free(files)
            raise

    def free(self, files: Files) -> None:
        """Of a cgroup that is gone nothing is left to free."""
        self._ends.pop(files[0][0], None)
        for path, _stop, free in files:
            with contextlib.suppress(FileNotFoundError):
                _write(path, free)

    def end(self, *, all: bool = False) -> float | None:
        """Free what is over; seconds until the next one is."""
        now = time.monotonic_ns()
        for until_ns, files in list(self._ends.values()):
            if all or until_ns <= now:
                with contextlib.suppress(OSError):
                    self.free(files)
        soonest = min((until_ns for until_ns, _ in self._ends.values()), default=None)
        return None if soonest is None else max(0.0, (soonest - time.monotonic_ns()) / 1e9)


def _write(path: str, content: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, content.encode())
    finally:
        os.close(fd)


def _run(words: Sequence[str], standard: Sequence[int]) -> None:
    """A module of the executor's own as a process, with what this one may do."""
    actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(standard)]
    command = [sys.executable, "-S", *words]
    os.posix_spawn(command[0], command, os.environ, file_actions=actions, setsid=True, setsigdef=_ENDS)


def _connecting(host: str, port: int) -> int:
    """A socket that has begun to connect; the caller waits for it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    channel = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        with contextlib.suppress(BlockingIOError):
            channel.connect((host, port))
    except OSError:
        channel.close()
        raise
    return channel.detach()


def _pipe_of(pid: int) -> int:
    """The service may have put anything in the place of its output: nothing else is opened."""
    path = Path(f"/proc/{pid}/fd/1")
    if not stat.S_ISFIFO(path.stat().st_mode) or not str(path.readlink()).startswith("pipe:"):
        raise OSError(errno.ESPIPE, "no pipe", str(path))
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


class Spawner:
    """Everything the process knows."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel: socket.socket | None = channel
        self._leases = Leases()
        self._outputs: dict[int, output.Output] = {}
        self._held: dict[int, birth.Held] = {}  # by the descriptor that lets it go
        self._waiting = select.poll()
        self._waiting.register(channel, select.POLLIN)

    def serve(self) -> None:
        """Until the executor is gone and no output is left to read."""
        while self._channel is not None or self._outputs:
            seconds = self._leases.end()
            ready = {fd for fd, _ in self._waiting.poll(None if seconds is None else seconds * 1000 + 1)}
            for fd in ready & self._held.keys():
                self._waiting.unregister(fd)
                self._held.pop(fd).settle()
            if self._channel is not None and self._channel.fileno() in ready:
                self._request(self._channel)
            self._move(ready & self._outputs.keys())

    def _move(self, pipes: Iterable[int]) -> None:
        for fd in pipes:
            if not self._outputs[fd].move():
                self._waiting.unregister(fd)
                self._outputs.pop(fd).close()

    def _request(self, channel: socket.socket) -> None:
        data, descriptors, _flags, _address = socket.recv_fds(
            channel, MAX_REQUEST_BYTES, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
        )
        if not data:
            self._leases.end(all=True)
            self._waiting.unregister(channel)
            channel.close()
            self._channel = None
            return
        found: list[int] = []
        # A child's end must not be reaped by the handler between its birth and the answer.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        try:
            answer, found = self._answer(json.loads(data), descriptors)
        except OSError as error:
            answer = {"step": str(error.filename or error.strerror), "errno": error.errno or 0}
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            for fd in descriptors:
                os.close(fd)
        with contextlib.suppress(BrokenPipeError):  # the executor died meanwhile: the next turn sees it
            socket.send_fds(channel, [json.dumps(answer).encode()], found)
        for fd in found:
            os.close(fd)

    def _answer(self, request: dict[str, Any], descriptors: list[int]) -> tuple[dict[str, Any], list[int]]:
        match request.pop("do"):
            case "prepare":
                return self._prepare(request, descriptors)
            case "read":
                os.set_blocking(descriptors[0], False)
                self._read(descriptors.pop(0), request["folder"])
            case "lease":
                self._leases.begin(request["files"], request["until_ns"])
            case "free":
                self._leases.free(request["files"])
            case "run":
                _run(request["words"], descriptors)
            case "connect":
                return {}, [_connecting(request["host"], request["port"])]
            case "program":
                return {}, [os.open(f"/proc/{int(request['pid'])}/exe", os.O_RDONLY | os.O_CLOEXEC)]
            case "output":
                return {}, [_pipe_of(int(request["pid"]))]
        return {}, []

    def _read(self, pipe: int, folder: str) -> None:
        self._outputs[pipe] = output.Output(pipe, folder)
        self._waiting.register(pipe, select.POLLIN)

    def _prepare(self, request: dict[str, Any], descriptors: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
        program, cgroup, joins = descriptors[0], descriptors[1], descriptors[2:]
        ours, theirs = output.pipe()
        self._read(ours, request["folder"])
        try:
            born = birth.unborn(birth.Plan(request, program, theirs, joins), cgroup)
        finally:
            os.close(theirs)
        if born.held is not None:
            self._held[born.held.go] = born.held
            self._waiting.register(born.held.go, select.POLLIN)
        return born.answer, list(born.descriptors)


def _leave(folder: Path, root: Path) -> None:
    """Remove our own cgroup and its parents as far as nothing lives in them."""
    with contextlib.suppress(OSError):
        _write(f"{root}/cgroup.procs", "0")
        while folder != root:
            folder.rmdir()
            folder = folder.parent


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    with contextlib.suppress(FileNotFoundError):  # the executor is gone already
        _write(f"{sys.argv[2]}/cgroup.procs", "0")
    for number in _ENDS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: _reap())
    Spawner(channel).serve()
    _leave(Path(sys.argv[2]), Path(sys.argv[3]))


if __name__ == "__main__":
    main()
