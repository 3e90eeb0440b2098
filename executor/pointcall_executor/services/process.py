"""Services of kind `process`: started from a declaration whose digest is in the manifest, never patched live.

Start = verify every listed file by digest, make a fresh cgroup, execute the verified program by its descriptor, wait
until it accepts. Destroy = ask, wait, kill everything left in the cgroup, remove it. Recreate = destroy + start.
Not here: whether it may be recreated (the guard), why (the runbook), the record of it (the journal).

Limit: a file other than the program itself is read again by the program after it was verified; who can replace it in
that moment is root on this node, which the threat model trusts only as far as the TEE measures it.
"""

from __future__ import annotations

import contextlib
import grp
import hashlib
import itertools
import json
import os
import pwd
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from pointcall_attest.declaration import ServiceDeclaration
from pointcall_executor.services.groups import ServiceGroups
from pointcall_executor.services.listening import listening
from pointcall_executor.services.managed import ABILITIES, ServiceError, Started, not_running
from pointcall_runbook.vocabulary import Address

MAX_OUTPUT_BYTES: Final = 1 << 20  # of a service's captured output; older output is cut at each start
POLL_SECONDS: Final = (0.0002, 0.002)  # between two looks at the port: short at first
POLL_SHORT_FOR_SECONDS: Final = 0.05
SPAWN_SECONDS: Final = 10.0  # for the spawner's answer


class Spawner:
    """The executor's end of the spawner process. Thread-safe; a spawner that died is replaced at the next request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channel, self._process = self._begin()

    @staticmethod
    def _begin() -> tuple[socket.socket, subprocess.Popen[bytes]]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(SPAWN_SECONDS)
        command = [sys.executable, "-m", "pointcall_executor.services.spawner", str(theirs.fileno())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        return ours, process

    def spawn(self, request: dict[str, Any], descriptors: Sequence[int]) -> tuple[int, int]:
        """(pid, pidfd) of the new process. ServiceError names the step that failed."""
        with self._lock:
            answer, found = self._ask({"do": "spawn"} | request, descriptors)
        if "pid" not in answer or len(found) != 1:
            got = f"{answer.get('step', 'pidfd')}: {os.strerror(answer.get('errno', 0))}"
            raise ServiceError(
                f"cannot start {request['argv'][0]}", id="service.spawn", want="a running process", got=got
            )
        return int(answer["pid"]), found[0]

    def freeze(self, folder: Path, until_ns: int) -> None:
        """Freeze a cgroup until CLOCK_MONOTONIC `until_ns`, or until this process dies."""
        self._lease({"do": "freeze", "folder": str(folder), "until_ns": until_ns})

    def thaw(self, folder: Path) -> None:
        """Thaw a cgroup now; one that is gone or not frozen is no error."""
        self._lease({"do": "thaw", "folder": str(folder)})

    def _lease(self, request: dict[str, Any]) -> None:
        with self._lock:
            answer, _ = self._ask(request, ())
        if answer.get("step") is not None:
            got = os.strerror(answer.get("errno", 0))
            raise ServiceError(f"cannot {request['do']} the service", id="service.freeze", got=got)

    def _ask(self, request: dict[str, Any], descriptors: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
        try:
            if self._process.poll() is not None:
                self._end()
                self._channel, self._process = self._begin()
            socket.send_fds(self._channel, [json.dumps(request).encode()], list(descriptors))
            data, found, _, _ = socket.recv_fds(self._channel, 65536, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            self._end()  # a late answer would be taken for the next request's
            raise ServiceError("the spawner does not answer", id="service.spawner", got=str(error)) from error
        return dict(json.loads(data or b'{"step":"spawner","errno":0}')), list(found)

    def _end(self) -> None:
        self._channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(timeout=5)

    def close(self) -> None:
        """End the spawner; the services that it started go on."""
        with self._lock:
            self._end()


def _readable(fd: int, seconds: float) -> bool:
    """Whether `fd` becomes readable in time. Not select: its descriptors end at 1023."""
    waiting = select.poll()
    waiting.register(fd, select.POLLIN)
    return bool(waiting.poll(seconds * 1000))


def _open_verified(path: str, sha256: str) -> int:
    """A descriptor of the file, whose content has just been read and has this digest."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ServiceError(f"cannot read {path}", id="service.file", want=sha256, got=str(error)) from error
    with os.fdopen(os.dup(fd), "rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != sha256:
        os.close(fd)
        hint = "the file changed after it was declared; build and sign a new manifest, or put the file back"
        raise ServiceError(f"{path} is not what was declared", id="service.digest", want=sha256, got=got, hint=hint)
    return fd


@contextlib.contextmanager
def _verified(declaration: ServiceDeclaration) -> Iterator[int]:
    """Verify every file of the declaration; yields a descriptor of the program (argv[0])."""
    opened: dict[str, int] = {}
    try:
        for file in declaration.process.files:
            opened[file.path] = _open_verified(file.path, file.sha256)
        yield opened[declaration.process.argv[0]]
    finally:
        for fd in opened.values():
            os.close(fd)


def _account(find: Callable[[str], Any], name: str) -> Any:
    try:
        return find(name)
    except KeyError:
        raise ServiceError(
            f"no account {name}", id="service.account", want=name, hint="create it on the node"
        ) from None


def _uid(user: str | None) -> int | None:
    return None if user is None else int(_account(pwd.getpwnam, user).pw_uid)


def _gid(group: str | None, user: str | None) -> int | None:
    if group is not None:
        return int(_account(grp.getgrnam, group).gr_gid)
    return None if user is None else int(_account(pwd.getpwnam, user).pw_gid)


class Process:
    """One declared service as started by one executor. Thread-safe: one start or stop at a time.

    Its cgroup's name is its own (`<name>.<n>`), so that nothing that replaces it can touch it by name.
    """

    _instances: Final = itertools.count(1)

    def __init__(self, declaration: ServiceDeclaration, parent: str, folder: Path, spawner: Spawner) -> None:
        self.declaration, self.spawner = declaration, spawner
        self.name = declaration.name
        self.abilities = ABILITIES["process"]
        self.folder = folder / declaration.name
        self._groups = ServiceGroups(f"{parent}/{declaration.name}.{next(self._instances)}")
        self._lock = threading.RLock()
        self.pid = 0
        self.pidfd = -1
        self.cgroup_id = 0

    @property
    def running(self) -> bool:
        """Whether the main process lives."""
        pidfd = self.pidfd
        return pidfd >= 0 and not _readable(pidfd, 0)

    def start(self, on_cgroup: Callable[[int], None] = lambda _id: None) -> Started:
        """Verify, start, wait until it accepts. ServiceError leaves nothing behind.

        `on_cgroup` hears the id of the new cgroup before anything runs in it.
        """
        begin = time.monotonic_ns()
        with self._lock, _verified(self.declaration) as program:
            verified = time.monotonic_ns()
            try:
                self._spawn(program, on_cgroup)
                spawned = time.monotonic_ns()
                self._await_ready()
            except BaseException:
                self.destroy(0)
                raise
            ready = time.monotonic_ns()
            return Started(
                pid=self.pid,
                cgroup_id=self.cgroup_id,
                files=len(self.declaration.process.files),
                verified_ns=verified - begin,
                spawned_ns=spawned - verified,
                ready_ns=ready - spawned,
                ready_for=self._ready_for(),
            )

    def _ready_for(self) -> str:
        ready = self.declaration.process.ready
        found = [f"accepts on {ready.tcp}"] if ready.tcp is not None else []
        found += [f"{ready.file} exists"] if ready.file is not None else []
        return " and ".join(found) or "its program was executed"

    def _spawn(self, program: int, on_cgroup: Callable[[int], None]) -> None:
        self.cgroup_id = self._groups.create(memory_bytes=self.declaration.process.limits.memory_bytes)
        on_cgroup(self.cgroup_id)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        output = os.open(self.folder / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        joins = self._groups.open_procs()
        try:
            if os.fstat(output).st_size > MAX_OUTPUT_BYTES:
                os.ftruncate(output, 0)
            self._forget_ready()
            self.pid, self.pidfd = self.spawner.spawn(self._request(), [output, program, *joins])
        finally:
            for fd in (output, *joins):
                os.close(fd)

    def _forget_ready(self) -> None:
        """The file by which an earlier instance said that it is ready says nothing about this one."""
        file = self.declaration.process.ready.file
        try:
            if file is not None:
                Path(file).unlink(missing_ok=True)
        except OSError as error:
            raise ServiceError(f"{file} is left over", id="service.file", want="no file", got=str(error)) from error

    def _request(self) -> dict[str, Any]:
        process = self.declaration.process
        return {
            "argv": list(process.argv),
            "environment": dict(process.environment),
            "directory": process.directory,
            "uid": _uid(process.user),
            "gid": _gid(process.group, process.user),
            "namespaces": list(process.namespaces),
            "processes": process.limits.processes,
            "no_new_privileges": process.no_new_privileges,
        }

    def _await_ready(self) -> None:
        ready = self.declaration.process.ready
        begin = time.monotonic()
        while not self._accepts():
            age = time.monotonic() - begin
            pause = POLL_SECONDS[age > POLL_SHORT_FOR_SECONDS]
            if _readable(self.pidfd, pause):
                raise ServiceError(
                    f"{self.name} ended at once", id="service.ended", hint=f"see {self.folder}/output.log"
                )
            if age * 1000 > ready.timeout_ms:
                want = f"{ready.tcp or ready.file} within {ready.timeout_ms} ms"
                raise ServiceError(f"{self.name} is not ready", id="service.not-ready", want=want, got="nothing there")

    def _accepts(self) -> bool:
        ready = self.declaration.process.ready
        if ready.tcp is not None:
            host, _, port = ready.tcp.rpartition(":")
            if not listening(Address.parse(host.strip("[]")), int(port)):
                return False
        return ready.file is None or Path(ready.file).exists()

    def signal(self, number: int) -> None:
        """Send a signal to the main process. ServiceError `service.not-running` where there is none."""
        with self._lock:
            if not self.running:
                raise not_running(self.name)
            signal.pidfd_send_signal(self.pidfd, number)

    def freeze(self, until_ns: int) -> None:
        """Stop every task until CLOCK_MONOTONIC `until_ns`. The spawner ends it, also if this process dies."""
        with self._lock:
            if not self.running:
                raise not_running(self.name)
            self.spawner.freeze(self._groups.folder, until_ns)

    def thaw(self) -> None:
        with self._lock:
            self.spawner.thaw(self._groups.folder)

    def healthy(self) -> str:
        """Empty if it runs, is not frozen and is ready as declared."""
        if not self.running:
            return "its main process does not run"
        if self._groups.frozen:
            return "it is frozen"
        return "" if self._accepts() else f"not ready: {self._ready_for()} is not so"

    def destroy(self, grace_ns: int) -> int:
        """Stop the service and remove its cgroup; ns that it took. Destroying what is not there is no error."""
        with self._lock:
            begin = time.monotonic_ns()
            if self.pidfd >= 0:
                self.spawner.thaw(self._groups.folder)  # a frozen task cannot hear that it should stop
                self._stop(grace_ns)
                pidfd, self.pidfd, self.pid = self.pidfd, -1, 0
                os.close(pidfd)
            self._groups.destroy()
            return time.monotonic_ns() - begin

    def _stop(self, grace_ns: int) -> None:
        if not self.running:
            return
        if grace_ns > 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.Signals[f"SIG{self.declaration.process.stop.signal}"])
            if _readable(self.pidfd, grace_ns / 1e9):
                return
        self._groups.kill()
        _readable(self.pidfd, 5)
