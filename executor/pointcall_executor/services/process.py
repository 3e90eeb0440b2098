"""Services of kind `process`: started from a declaration whose digest is in the manifest, never patched live.

Start = verify every listed file by digest, make a fresh cgroup, execute the verified program by its descriptor, wait
until it is ready. Destroy = ask, wait, kill everything left in the cgroup. Recreate = destroy + start. A service
outlives its executor; the next one adopts what it can prove to be what it declares, and destroys the rest.
Not here: whether it may be recreated (the guard), why (the runbook), the record of it (the journal).

Limit: a file other than the program itself is read again by the program after it was verified; who can replace it in
that moment is root on this node, which the threat model trusts only as far as the TEE measures it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import grp
import os
import pwd
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pointcall_attest.declaration import Process as Declared
from pointcall_attest.declaration import ServiceDeclaration
from pointcall_executor.services import record as records
from pointcall_executor.services.chores import CHORES
from pointcall_executor.services.elsewhere import end_elsewhere
from pointcall_executor.services.files import opened_verified
from pointcall_executor.services.groups import ServiceGroups, destroy_leftovers, lives
from pointcall_executor.services.managed import (
    ABILITIES,
    NOTHING_LEFT,
    OnCgroup,
    ServiceError,
    Started,
    nobody,
    not_running,
)
from pointcall_executor.services.ready import await_ready, described, unready
from pointcall_executor.services.record import RunRecord
from pointcall_executor.services.spawning import Spawner, Unborn, readable

FORGET_AFTER_SECONDS: Final = 0.5  # until then the record names a process that nobody can adopt
PREPARE_AFTER_SECONDS: Final = 0.3  # after a start, when whoever waited for it has gone on
# No cgroup has the controller, or we may not write there. Anything else is a failure, not another way to limit.
_NO_CONTROLLER: Final = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS})


@dataclass(slots=True)
class _Prepared:
    """An instance that waits to execute the file that `program` identifies."""

    groups: ServiceGroups
    cgroup_id: int
    unborn: Unborn
    program: tuple[int, int]

    seats: threading.Semaphore | None = None  # whose seat it has while it waits

    def stand_up(self) -> None:
        if self.seats is not None:
            self.seats.release()
            self.seats = None

    def drop(self) -> None:
        self.unborn.close()
        self.groups.destroy()


def _identity(fd: int) -> tuple[int, int]:
    about = os.fstat(fd)
    return about.st_dev, about.st_ino


class Process:
    """One declared service. Thread-safe: one start or stop at a time."""

    def __init__(self, declaration: ServiceDeclaration, parent: str, folder: Path, spawner: Spawner) -> None:
        self.declaration, self.spawner = declaration, spawner
        self.name = declaration.name
        self.abilities = ABILITIES["process"]
        self.ours = True
        self.folder = folder / declaration.name
        self._parent = parent
        self._groups: ServiceGroups | None = None
        self._lock = threading.RLock()
        self._leased = False
        self._next: _Prepared | None = None
        self.pid = 0
        self.pidfd = -1
        self.cgroup_id = 0

    @property
    def _declared(self) -> Declared:
        return self.declaration.process

    @property
    def running(self) -> bool:
        """Whether the main process lives."""
        pidfd = self.pidfd
        return pidfd >= 0 and not readable(pidfd, 0)

    @property
    def held(self) -> bool:
        """Nobody else starts it."""
        return self.running

    def found_in(self) -> int:
        return self.cgroup_id

    def alive(self) -> int:
        return self.pid if self.running else 0

    # ---- start -----------------------------------------------------------------------------------------------------

    def start(self, on_cgroup: OnCgroup = nobody) -> Started:
        """Verify, start, wait until it is ready. ServiceError leaves nothing behind.

        `on_cgroup` hears the id of the new cgroup before anything runs in it.
        """
        begin = time.monotonic_ns()
        declared = self._declared
        with self._lock, opened_verified(declared.files, declared.argv[0]) as program:
            verified = time.monotonic_ns()
            self.destroy(0)
            try:
                self._spawn(program, on_cgroup)
                spawned = time.monotonic_ns()
                hint = f"see {self.folder}/output.log"
                ended = functools.partial(readable, self.pidfd)
                await_ready(declared.ready, self.spawner.connecting, name=self.name, ended=ended, hint=hint)
            except BaseException:
                self.destroy(0)
                raise
            ready = time.monotonic_ns()
            self._write_down(program)
            CHORES.later(PREPARE_AFTER_SECONDS, self._prepare_next)
            return Started(
                pid=self.pid,
                cgroup_id=self.cgroup_id,
                files=len(declared.files),
                verified_ns=verified - begin,
                spawned_ns=spawned - verified,
                ready_ns=ready - spawned,
                ready_for=self._ready_for(),
            )

    def _ready_for(self) -> str:
        return described(self._declared.ready) or "its program was executed"

    def _spawn(self, program: int, on_cgroup: OnCgroup) -> None:
        self._forget()
        waiting = self._take_next(program)
        if waiting is not None and self._execute(waiting, on_cgroup):
            return
        self.destroy(0)  # what waited was killed, or does not answer
        if not self._execute(self._prepare(program), on_cgroup):
            raise ServiceError(f"{self.name} did not begin", id="service.spawn", got="no process")

    def _execute(self, instance: _Prepared, on_cgroup: OnCgroup) -> bool:
        self._groups, self.cgroup_id = instance.groups, instance.cgroup_id
        on_cgroup(self.cgroup_id)
        pidfd = instance.unborn.execute(self._declared.argv[0])
        if pidfd is not None:
            self.pidfd, self.pid = pidfd, instance.unborn.pid
        return pidfd is not None

    def _prepare(self, program: int) -> _Prepared:
        """An instance that only has to execute."""
        groups = ServiceGroups.fresh(self._parent, self.name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            cgroup_id = groups.create(memory_bytes=self._declared.limits.memory_bytes)
            rlimit = self._limit_tasks(groups)
            with groups.opened() as opened:
                unborn = self.spawner.prepare(self._request() | {"processes": rlimit}, [program, *opened])
            return _Prepared(groups, cgroup_id, unborn, _identity(program))
        except BaseException as error:
            groups.destroy()
            if isinstance(error, OSError):
                raise ServiceError(f"cannot prepare {self.name}", id="service.spawn", got=str(error)) from error
            raise

    def _limit_tasks(self, groups: ServiceGroups) -> int | None:
        """Hold the instance to its processes; the limit that is left for RLIMIT_NPROC, where no cgroup can hold it.
        That one holds an account, but not root: ServiceError `service.limit`."""
        limit = self._declared.limits.processes
        if limit is None:
            return None
        try:
            groups.limit_tasks(limit)
        except OSError as error:
            if error.errno not in _NO_CONTROLLER:
                raise
            if self._uid() != 0:
                return limit
            raise ServiceError(
                f"nothing here holds {self.name} to its processes", id="service.limit",
                want="the pids controller of cgroups", got=str(error),
                hint="let the service run as a `user` of its own, or take `processes` out of its limits",
            ) from error  # fmt: skip
        return None

    def _uid(self) -> int:
        """The account that it will run as; the spawner's where it names none."""
        uid = _uid(self._declared.user)
        return Path(f"/proc/{self.spawner.pid}").stat().st_uid if uid is None else uid

    def _take_next(self, program: int) -> _Prepared | None:
        """The instance that waits, if it waits with the very file that was just verified."""
        waiting, self._next = self._next, None
        if waiting is None:
            return None
        waiting.stand_up()
        if waiting.program == _identity(program) and not readable(waiting.unborn.pidfd, 0):
            return waiting
        waiting.drop()
        return None

    def _prepare_next(self) -> None:
        """While nothing is wrong, so that the next start is fast. ServiceError costs that start its speed only.

        The files are read before the lock is taken: nothing that is asked of the service waits for that.
        """
        seats, made = self.spawner.seats, None
        if self._next is not None or not self.running or not seats.acquire(blocking=False):
            return
        try:
            with opened_verified(self._declared.files, self._declared.argv[0]) as program, self._lock:
                if self._next is None and self.running:
                    made = self._prepare(program)
                    made.seats, self._next = seats, made
        finally:
            if made is None:
                seats.release()

    def release(self) -> None:
        """Nothing is kept for a next start. Twice without harm."""
        with self._lock:
            waiting, self._next = self._next, None
            if waiting is not None:
                waiting.stand_up()
                waiting.drop()

    def _forget(self) -> None:
        """What an earlier instance left says nothing about this one."""
        file = self._declared.ready.file
        try:
            if file is not None:
                Path(file).unlink(missing_ok=True)
        except OSError as error:
            raise ServiceError(f"{file} is left over", id="service.file", want="no file", got=str(error)) from error

    def _request(self) -> dict[str, Any]:
        process = self._declared
        return {
            "argv": list(process.argv),
            "environment": dict(process.environment),
            "directory": process.directory,
            "uid": _uid(process.user),
            "gid": _gid(process.group, process.user),
            "namespaces": list(process.namespaces),
            "no_new_privileges": process.no_new_privileges,
            "folder": str(self.folder),
        }

    # ---- from one executor to the next -----------------------------------------------------------------------------

    def _write_down(self, program: int) -> None:
        """For the next executor. One that cannot be written costs the service its adoption, not its start."""
        assert self._groups is not None
        device, inode = _identity(program)
        with contextlib.suppress(OSError):
            record = RunRecord(
                boot=records.boot_id(),
                name=self.name,
                declaration=self.declaration.sha256,
                pid=self.pid,
                born=records.born(self.pid) or 1,
                cgroup=self._groups.relative,
                cgroup_id=self.cgroup_id,
                device=device,
                inode=inode,
                spawner=self.spawner.pid,
                spawner_born=records.born(self.spawner.pid) or 1,
            )
            records.write(self.folder, record)

    def adopt(self) -> str:
        """Take over the instance that an earlier executor started; empty if that is done. Every other instance, and
        one of which it cannot be proven what it is, is destroyed. ServiceError `service.elsewhere`."""
        with self._lock:
            if self.pidfd >= 0:
                return ""
            before = end_elsewhere(self.folder, self.name, self._parent)
            wrong = self._adopt() if lives(self._parent, self.name) else NOTHING_LEFT
            if before:
                wrong = f"it ran in {before}"
            keep = self._groups.relative if self._groups is not None else ""
            destroy_leftovers(self._parent, self.name, keep=keep)
            return wrong

    def _adopt(self) -> str:
        record = records.read(self.folder)
        if record is None:
            return "there is no record of it"
        try:
            pidfd = os.pidfd_open(record.pid)
        except OSError:
            return "its process is gone"
        wrong = self._disproved(record) or self._take(record, pidfd)
        if wrong:
            self.pidfd, self.pid, self.cgroup_id, self._groups = -1, 0, 0, None
            os.close(pidfd)
        return wrong

    def _disproved(self, record: RunRecord) -> str:
        """The spawner opens the program: this process may have given up what it takes to look into another."""
        return records.disproved(record, self.declaration, self._parent, self.spawner.program)

    def _take(self, record: RunRecord, pidfd: int) -> str:
        self._groups = ServiceGroups(record.cgroup)
        self.pid, self.pidfd, self.cgroup_id = record.pid, pidfd, record.cgroup_id
        self.spawner.thaw(self._groups.freezer)  # a freeze ends with the executor that asked for it
        if not self.running:
            return "its process is gone"
        if wrong := unready(self._declared.ready, self.spawner.connecting):
            return wrong
        if records.born(record.spawner) != record.spawner_born:
            self._read_on()
        return ""

    def _read_on(self) -> None:
        """The spawner that kept its output is gone: ours reads on, by the service's own end of the pipe."""
        with contextlib.suppress(OSError):
            pipe = self.spawner.output(self.pid)
            try:
                self.spawner.read(pipe, self.folder)
            finally:
                os.close(pipe)

    # ---- while it runs ---------------------------------------------------------------------------------------------

    def signal(self, number: int) -> None:
        """Send a signal to the main process. ServiceError `service.not-running` where there is none."""
        with self._lock:
            if not self.running:
                raise not_running(self.name)
            signal.pidfd_send_signal(self.pidfd, number)

    def freeze(self, until_ns: int) -> None:
        """Stop every task until CLOCK_MONOTONIC `until_ns`. The spawner ends it, also if this process dies."""
        with self._lock:
            if self._groups is None or not self.running:
                raise not_running(self.name)
            self._leased = True
            self.spawner.freeze(self._groups.freezer, until_ns)

    def thaw(self) -> None:
        with self._lock:
            if self._groups is not None:
                self._leased = False
                self.spawner.thaw(self._groups.freezer)

    def frozen(self, until_ns: int) -> bool:
        groups = self._groups
        return groups is not None and groups.freezer.settled(until_ns)

    def healthy(self) -> str:
        """Empty if it runs, is not frozen and is ready as declared."""
        groups = self._groups
        if groups is None or not self.running:
            return "its main process does not run"
        if groups.freezer.frozen:
            return "it is frozen"
        return unready(self._declared.ready, self.spawner.connecting)

    # ---- destroy ---------------------------------------------------------------------------------------------------

    def destroy(self, grace_ns: int) -> int:
        """Stop the service: nothing of it lives afterwards; ns that it took. Nothing there is no error. ServiceError
        `service.destroy` where it lives on, and then it is still this one."""
        with self._lock:
            begin = time.monotonic_ns()
            if self._leased and self.running:
                self.thaw()  # a frozen task cannot hear that it should stop
            if self.pidfd >= 0:
                self._stop(grace_ns)
            self._kill()  # only what is gone is forgotten: a start would find nothing to end, and be the second one
            if self.pidfd >= 0:
                pidfd, self.pidfd, self.pid = self.pidfd, -1, 0
                os.close(pidfd)
                CHORES.later(FORGET_AFTER_SECONDS, functools.partial(records.forget, self.folder, self.cgroup_id))
            self._groups, self.cgroup_id = None, 0
            return time.monotonic_ns() - begin

    def _kill(self) -> None:
        if self._groups is None:
            return
        try:
            self._groups.destroy()
        except OSError as error:
            raise ServiceError(
                f"{self.name} cannot be ended", id="service.destroy", want="an empty cgroup", got=str(error),
                hint="look at who owns its cgroup, or end it as root; until then no other is started",
            ) from error  # fmt: skip

    def _stop(self, grace_ns: int) -> None:
        if grace_ns <= 0 or self._groups is None or not self.running:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.Signals[f"SIG{self._declared.stop.signal}"])
        readable(self.pidfd, grace_ns / 1e9)


def _account(find: Any, name: str) -> Any:
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
