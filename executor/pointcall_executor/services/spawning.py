"""The executor's end of the spawner process: start it, ask it, replace it when it died.

Not here: what the spawner does (spawner.py). The requests are listed there.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from pointcall_executor.kernel.cgroup import Cgroup, find_root
from pointcall_executor.services.birth import HEARD
from pointcall_executor.services.groups import Freezer
from pointcall_executor.services.managed import ServiceError

ANSWER_SECONDS: Final = 10.0
SEATS: Final = 32  # instances that wait, each with up to 1.2 MiB of its own; further services start as a new one does
SWEEP_AFTER_NS: Final = 60_000_000_000
LOOK_SECONDS: Final = 0.5  # how often it is looked whether somebody has stopped it
RESPAWN_SECONDS: Final = 0.05  # no faster, should it die at once each time
MAX_ANSWER_BYTES: Final = 65536
_CHILD_FD: Final = 3


def readable(fd: int, seconds: float | None) -> bool:
    """Whether `fd` becomes readable in time; a pidfd is readable once its process ended. Not select: its descriptors
    end at 1023."""
    waiting = select.poll()
    waiting.register(fd, select.POLLIN)
    return bool(waiting.poll(None if seconds is None else seconds * 1000))


class _Process:
    """One spawner process. It is replaced, never repaired."""

    def __init__(self, cgroup: Cgroup) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.settimeout(ANSWER_SECONDS)
        module = "pointcall_executor.services.spawner"
        command = [sys.executable, "-S", "-m", module, str(_CHILD_FD), str(cgroup.path), str(find_root())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        actions = [
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), _CHILD_FD),
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        ]
        self.pid = os.posix_spawn(command[0], command, environment, file_actions=actions, setsid=True)
        theirs.close()
        self.pidfd = os.pidfd_open(self.pid)

    @property
    def alive(self) -> bool:
        return self.pidfd >= 0 and not readable(self.pidfd, 0)

    def ask(self, request: dict[str, Any], descriptors: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
        socket.send_fds(self.channel, [json.dumps(request).encode()], list(descriptors))
        data, found, _, _ = socket.recv_fds(self.channel, MAX_ANSWER_BYTES, 3, socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise EOFError("it ended")
        return dict(json.loads(data)), list(found)

    def leave(self, seconds: float) -> None:
        """Close our end. It ends by itself, at once unless services that it started still run. Twice without harm:
        where no other could be made, this one stays, and the number of its descriptor is soon another's."""
        self.channel.close()
        if self.pidfd < 0:
            return
        if readable(self.pidfd, seconds):
            os.waitpid(self.pid, 0)
        left, self.pidfd = self.pidfd, -1
        os.close(left)

    def go_on(self) -> None:
        """Wake one that somebody has stopped (SIGSTOP): leases and requests wait for it. Killing it would cost the
        privileges that only the first one has."""
        if _stopped(self.pid):
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)

    def kill(self) -> None:
        """End one that does not answer. What it had stopped is thawed by its services' next owner."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


@dataclass(slots=True)
class Unborn:
    """A process in its cgroup that waits to execute. Closing `go` unused ends it."""

    pid: int
    pidfd: int
    go: int
    report: int
    unheard: Callable[[], None]  # what to do if nothing is heard of it

    def execute(self, what: str) -> int | None:
        """Let it execute; its pidfd, which the caller closes. None if it did not begin: somebody killed it while it
        waited, or nothing was heard of it in time, and then the caller kills it.

        ServiceError `service.spawn` if it could not.
        """
        try:
            said = self._told()
            if len(said) > len(HEARD):
                raise _cannot_start(what, json.loads(said[len(HEARD) :]))
            pidfd = None
            if said:
                pidfd, self.pidfd = self.pidfd, -1
            return pidfd
        finally:
            self.close()

    def _told(self) -> bytes:
        """Everything that it reports until it has executed, or ended."""
        said = b""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.go, b"1")
            while readable(self.report, ANSWER_SECONDS):
                data = os.read(self.report, MAX_ANSWER_BYTES)
                if not data:
                    return said
                said += data
            if said:
                return said + json.dumps({"step": "exec", "errno": errno.ETIMEDOUT}).encode()
            self.unheard()
        return said

    def close(self) -> None:
        """Let go of it; one that was not told to execute ends. Twice without harm."""
        for fd in (self.go, self.report, self.pidfd):
            if fd >= 0:
                os.close(fd)
        self.go = self.report = self.pidfd = -1


class Spawner:
    """Thread-safe; a spawner process that died is replaced at the next request, and told again which leases run."""

    def __init__(self, parent: str = "pointcall") -> None:
        self._lock = threading.Lock()
        self.seats = threading.BoundedSemaphore(SEATS)
        _sweep(parent)
        self._cgroup = Cgroup.create(f"{parent}-spawner.{time.monotonic_ns()}")
        self._leases: dict[Path, tuple[Freezer, int]] = {}
        self._process = _Process(self._cgroup)
        self._closed = self._watched = False

    def watch(self) -> Self:
        """Have the process replaced as soon as it dies, from now on. Not while privileges are still to be dropped: a
        thread that exists already would keep them."""
        with self._lock:
            first, self._watched = not self._watched, True
        if first:
            threading.Thread(target=self._watch, name="spawner", daemon=True).start()
        return self

    @property
    def cgroup_id(self) -> int:
        """The cgroup of every spawner of this executor, from which it connects to see whether a service answers."""
        return self._cgroup.id

    @property
    def cgroup(self) -> str:
        """Its path below the root of the v2 tree."""
        return str(self._cgroup.path.relative_to(find_root()))

    @property
    def pid(self) -> int:
        return self._process.pid

    def _watch(self) -> None:
        """Replace a spawner that died at once, and wake one that was stopped: a lease must not wait for the next
        request to end."""
        while not self._closed:
            process, ended = self._process, True
            with contextlib.suppress(OSError, ValueError):  # it was left meanwhile
                ended = readable(process.pidfd, LOOK_SECONDS)
            if not ended:
                process.go_on()
                continue
            time.sleep(RESPAWN_SECONDS)
            with self._lock, contextlib.suppress(OSError, EOFError):
                if not self._closed and process is self._process:
                    self._replace()

    def _replace(self) -> None:
        if self._closed:
            raise OSError(errno.ESHUTDOWN, "it was let go")
        self._process.kill()
        self._process.leave(5)
        self._process = _Process(self._cgroup)
        for freezer, until_ns in self._leases.values():
            self._process.ask({"do": "lease", "files": freezer.files, "until_ns": until_ns}, ())

    def _ask(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        """With the lock held. One that died is replaced and asked again; nothing that it had begun goes on.

        It is watched from the first request on: before that there is no lease, and privileges are given up by a process
        that has no second thread (privileges.py).
        """
        if not self._watched:
            self._watched = True
            threading.Thread(target=self._watch, name="spawner", daemon=True).start()
        try:
            if not self._process.alive:
                self._replace()
            try:
                return self._process.ask(request, descriptors)
            except (BrokenPipeError, ConnectionResetError, EOFError):
                self._replace()
                return self._process.ask(request, descriptors)
        except (OSError, EOFError) as error:
            self._process.kill()  # a late answer would be taken for the next request's
            raise ServiceError("the spawner does not answer", id="service.spawner", got=str(error)) from error

    def prepare(self, request: dict[str, Any], descriptors: Sequence[int]) -> Unborn:
        """A process that only has to execute. ServiceError `service.spawn` names what failed."""
        with self._lock:
            answer, found = self._ask({"do": "prepare"} | request, descriptors)
            process = self._process
        if "pid" not in answer or len(found) != 3:
            raise _cannot_start(request["argv"][0], answer)
        unheard = functools.partial(self._end, process) if answer.get("held") else _nothing
        pidfd, go, report = found
        return Unborn(int(answer["pid"]), pidfd, go, report, unheard)

    def _end(self, process: _Process) -> None:
        """One that does not let go what it holds. It is replaced, unless it was already."""
        with self._lock:
            process.kill()

    def read(self, pipe: int, folder: Path) -> None:
        """Keep what comes out of `pipe` in `folder`; the spawner gets its own descriptor."""
        with self._lock:
            self._ask({"do": "read", "folder": str(folder)}, (pipe,))

    def program(self, pid: int) -> int:
        """A descriptor of the very file that a process executes. OSError where there is none."""
        return self._of_process("program", pid)

    def output(self, pid: int) -> int:
        """The reading end of the pipe that is a process's standard output. OSError where it is no pipe."""
        return self._of_process("output", pid)

    def _of_process(self, what: str, pid: int) -> int:
        with self._lock:
            answer, found = self._ask({"do": what, "pid": pid})
        if len(found) != 1:
            raise OSError(int(answer.get("errno", 0)), _failure(answer))
        return found[0]

    def freeze(self, freezer: Freezer, until_ns: int) -> None:
        """Stop a cgroup until CLOCK_MONOTONIC `until_ns`, or until this process dies. ServiceError `service.freeze`."""
        with self._lock:
            self._leases[freezer.folder] = freezer, until_ns
            answer, _ = self._ask({"do": "lease", "files": freezer.files, "until_ns": until_ns})
            if "step" in answer:
                del self._leases[freezer.folder]
                raise ServiceError("cannot freeze the service", id="service.freeze", got=_failure(answer))

    def thaw(self, freezer: Freezer) -> None:
        """Free a cgroup now; one that is gone or not frozen is no error."""
        with self._lock:
            self._leases.pop(freezer.folder, None)
            answer, _ = self._ask({"do": "free", "files": freezer.files})
        if "step" in answer:
            raise ServiceError("cannot thaw the service", id="service.freeze", got=_failure(answer))

    def run(self, words: Sequence[str], standard: tuple[int, int, int]) -> None:
        """A module of ours as a process of the spawner, with its privileges: these words for the interpreter, these
        standard descriptors. ServiceError `service.spawn`."""
        with self._lock:
            answer, _ = self._ask({"do": "run", "words": list(words)}, standard)
        if "step" in answer:
            raise _cannot_start(words[-1], answer)

    def connecting(self, host: str, port: int) -> socket.socket:
        """A non-blocking TCP socket that has begun to connect, from the spawner's cgroup."""
        with self._lock:
            answer, found = self._ask({"do": "connect", "host": host, "port": port})
        if len(found) != 1:
            raise ServiceError("cannot connect", id="service.not-ready", want=f"{host}:{port}", got=_failure(answer))
        return socket.socket(fileno=found[0])

    def close(self) -> None:
        """Let it go: leases end now. It goes on while services that it started have output to keep."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._process.leave(0.5)
        with contextlib.suppress(OSError):
            self._cgroup.path.rmdir()


def _stopped(pid: int) -> bool:
    """Whether a signal holds this process; not: a tracer. The state is behind the name, which ends with a bracket."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


def _sweep(parent: str) -> None:
    """Remove the cgroups of spawners that were killed. Not what is new: its spawner may not be in it yet."""
    folder = find_root() / parent
    for path in folder.parent.glob(f"{folder.name}-spawner.*"):
        born_ns = path.suffix.removeprefix(".")
        if born_ns.isdecimal() and time.monotonic_ns() - int(born_ns) > SWEEP_AFTER_NS:
            with contextlib.suppress(OSError):  # one lives in it
                path.rmdir()


def _nothing() -> None:
    """It waits by itself: the spawner has no part in it."""


def _failure(answer: dict[str, Any]) -> str:
    return f"{answer.get('step', 'pidfd')}: {os.strerror(answer.get('errno', 0))}"


def _cannot_start(what: str, answer: dict[str, Any]) -> ServiceError:
    return ServiceError(f"cannot start {what}", id="service.spawn", want="a running process", got=_failure(answer))
