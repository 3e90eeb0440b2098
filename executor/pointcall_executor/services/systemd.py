"""Services of kind `systemd`: units of a service manager, asked over D-Bus. Never a command, never a unit of our own.

Start = verify the unit file, every drop-in and every other listed file by digest, see that the manager has loaded
exactly those, start the unit, wait until it is active and ready. A freeze is done by the spawner on the unit's cgroup,
not by FreezeUnit: the manager knows no end of a freeze, and nobody would thaw if the executor died. To the manager the
unit is active meanwhile.
Source: org.freedesktop.systemd1(5).
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jeepney import DBusAddress, Message, MessageType, new_method_call
from jeepney.bus import get_bus
from jeepney.io.blocking import DBusConnection, prep_socket
from jeepney.wrappers import DBusErrorResponse

from pointcall_attest.declaration import ServiceDeclaration, Systemd
from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.services.files import verify
from pointcall_executor.services.groups import Freezer, Place, group_of
from pointcall_executor.services.managed import (
    ABILITIES,
    NOTHING_LEFT,
    OnCgroup,
    ServiceError,
    Started,
    nobody,
    not_running,
)
from pointcall_executor.services.reach import SYSTEM_BUS
from pointcall_executor.services.ready import await_ready, described, unready
from pointcall_executor.services.spawning import Spawner, readable

ANSWER_SECONDS: Final = 30.0
IDLE_MAX: Final = 4  # connections that are kept: as many as there are actions at once
LOOK_SECONDS: Final = 0.002  # between two looks at what became of a job, at first
SHORT_FOR_SECONDS: Final = 0.2
LONG_LOOK_SECONDS: Final = 0.02
KILLED_SECONDS: Final = 5.0
JOIN_SECONDS: Final = 1.0  # from the fork of a main process until it is in its cgroup
_NAME: Final = "org.freedesktop.systemd1"
_MANAGER: Final = DBusAddress("/org/freedesktop/systemd1", _NAME, f"{_NAME}.Manager")


@dataclass(frozen=True, slots=True)
class State:
    """What the manager says of a unit. `started_us`: when its main process started, CLOCK_REALTIME."""

    path: str  # of its object on the bus
    load: str
    active: str
    fragment: str
    drop_ins: tuple[str, ...]
    source: str
    reload_needed: bool
    pid: int
    started_us: int
    group: str  # in the manager's view of the tree, which may begin below the root of ours


class ManagerRefusal(ServiceError):
    """The manager's own no: it has answered."""


class _Connection(DBusConnection):  # type: ignore[misc]
    """One whose every call has an end, also the first one, which greets the bus when it is made."""

    def send_and_get_reply(self, message: Message, *, timeout: float | None = None) -> Message:
        return super().send_and_get_reply(message, timeout=ANSWER_SECONDS if timeout is None else timeout)

    @property
    def broken(self) -> bool:
        """Whether the bus has ended it meanwhile, as when it was restarted."""
        try:
            return readable(self.sock.fileno(), 0) and not self.sock.recv(1, socket.MSG_PEEK)
        except OSError:
            return True


def _connected(bus: str) -> _Connection:
    """OSError, ValueError; DBusErrorResponse where the bus does not want us."""
    channel = prep_socket(get_bus(bus), timeout=ANSWER_SECONDS)
    try:
        channel.settimeout(ANSWER_SECONDS)  # for what is sent: it waits for what is received in another way
        return _Connection(channel)
    except BaseException:
        channel.close()
        raise


class Units:
    """The manager behind a bus. Thread-safe: who asks waits for his own answer and for nobody else's, each on a
    connection that is kept for the next one. One that broke is replaced."""

    def __init__(self, bus: str = SYSTEM_BUS) -> None:
        self._bus = bus
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []

    def call(self, method: str, signature: str, *body: Any) -> tuple[Any, ...]:
        """A method of the manager. ServiceError `service.manager` with what it answered."""
        return self._send(new_method_call(_MANAGER, method, signature or None, body))

    def _send(self, message: Message) -> tuple[Any, ...]:
        connection = self._take()
        try:
            connection = connection or _connected(self._bus)
            answer = connection.send_and_get_reply(message)
        except (OSError, ValueError, KeyError, DBusErrorResponse) as error:
            if connection is not None:
                connection.close()  # a late answer would be taken for the next one's
            raise ServiceError(
                "the service manager does not answer", id="service.manager", want=self._bus,
                got=str(error) or f"nothing within {ANSWER_SECONDS:g} s",
                hint="is the setting systemd_bus right, and may the executor use that bus?",
            ) from error  # fmt: skip
        self._give_back(connection)
        if answer.header.message_type is MessageType.error:
            refusal = DBusErrorResponse(answer)
            got = f"{refusal.name}: {refusal.data[0] if refusal.data else ''}"
            raise ManagerRefusal("the service manager refuses", id="service.manager", got=got)
        return tuple(answer.body)

    def _take(self) -> _Connection | None:
        while True:
            with self._lock:
                found = self._idle.pop() if self._idle else None
            if found is None or not found.broken:
                return found
            found.close()

    def _give_back(self, connection: _Connection) -> None:
        with self._lock:
            if len(self._idle) < IDLE_MAX:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Let go of what nobody uses now."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def state(self, unit: str) -> State:
        """What the manager says of a unit, which it loads for that if need be."""
        (path,) = self.call("LoadUnit", "s", unit)
        properties = DBusAddress(path, _NAME, "org.freedesktop.DBus.Properties")
        found: dict[str, Any] = {}
        for interface in ("Unit", "Service"):
            (rows,) = self._send(new_method_call(properties, "GetAll", "s", (f"{_NAME}.{interface}",)))
            found |= {name: value for name, (_signature, value) in dict(rows).items()}
        return State(
            path=path,
            load=found["LoadState"],
            active=found["ActiveState"],
            fragment=found["FragmentPath"],
            drop_ins=tuple(found["DropInPaths"]),
            source=found["SourcePath"],
            reload_needed=found["NeedDaemonReload"],
            pid=found["MainPID"],
            started_us=found["ExecMainStartTimestamp"],
            group=found["ControlGroup"],
        )

    def active(self, path: str) -> str:
        """The one word of `state` that who waits for a job looks at again and again."""
        properties = DBusAddress(path, _NAME, "org.freedesktop.DBus.Properties")
        ((_signature, value),) = self._send(new_method_call(properties, "Get", "ss", (f"{_NAME}.Unit", "ActiveState")))
        return str(value)


class SystemdService:
    """One declared unit. Thread-safe: one start or stop at a time."""

    def __init__(self, declaration: ServiceDeclaration, units: Units, spawner: Spawner) -> None:
        assert isinstance(declaration.body, Systemd)
        self.declaration, self._declared = declaration, declaration.body
        self.name = declaration.name
        self.abilities = ABILITIES["systemd"]
        self.ours = True
        self._units, self._spawner = units, spawner
        self._lock = threading.RLock()
        self._freezer: Freezer | None = None
        self._main = 0  # the main process that was started or adopted last, and the unit's cgroup as it was then
        self._place: Place | None = None

    # ---- what it is now --------------------------------------------------------------------------------------------

    @property
    def _state(self) -> State:
        return self._units.state(self._declared.unit)

    def _pids(self) -> tuple[int, ...]:
        """What lives in the unit's cgroup, as the kernel says."""
        return self._place.living() if self._place is not None else ()

    @property
    def held(self) -> bool:
        return self._main in self._pids() if self._main else self.running

    def found_in(self) -> int:
        return self._place.living_id() if self._place is not None else 0

    @property
    def pid(self) -> int:
        """The main process. Nobody is asked: where the manager has started the unit again it is one of the unit's."""
        pids = self._pids()
        return self._main if self._main in pids else min(pids, default=0)

    def alive(self) -> int:
        return self.pid

    @property
    def running(self) -> bool:
        """Whether the main process lives that was started or adopted; or the manager says that the unit is active. A
        manager that does not answer says nothing of the kind."""
        if self._main in self._pids():
            return True
        try:
            return self._state.active in ("active", "reloading")
        except ServiceError:
            return False

    def _group(self) -> Cgroup | None:
        """The unit's cgroup, None where there is none. Found by its main process, which is not yet in it when it has
        just been forked: then it is in the manager's own, which must never be frozen."""
        place = self._place
        if place is not None and self._main in place.living():
            return place.group
        try:
            state = self._state
        except ServiceError:
            return None
        return _unit_group(group_of(state.pid), state.group)

    def _hold(self, pid: int, group: Cgroup | None) -> None:
        """This is what was started or adopted."""
        self._main, self._place = pid, Place(group) if group is not None else None

    @property
    def cgroup_id(self) -> int:
        group = self._group()
        with contextlib.suppress(FileNotFoundError):  # it ended meanwhile
            return group.id if group is not None else 0
        return 0

    # ---- start and stop --------------------------------------------------------------------------------------------

    def adopt(self) -> str:
        """Take over the unit if it runs, and if nothing that it was started from changed since. One that the manager is
        just starting, as after a boot, is waited for as long as it may take to be ready."""
        with self._lock:
            begin = time.monotonic()
            deadline = begin + self._declared.ready.timeout_ms / 1000
            while (state := self._state).active in ("activating", "reloading") and time.monotonic() < deadline:
                _pause(begin)
            wrong = self._differs(state) if state.active == "active" else f"it is {state.active}"
            if wrong:
                self.destroy(self._declared.grace_ms * 1_000_000)
            return NOTHING_LEFT if state.active in ("inactive", "failed") else wrong

    def _differs(self, state: State) -> str:
        try:
            verify(self._declared.files)
            self._check(state)
        except ServiceError as error:
            return error.message
        if state.reload_needed:
            return "its unit file changed since it was loaded"
        newest = max(Path(f.path).stat().st_ctime_ns for f in self._declared.files)
        if not state.pid or newest > state.started_us * 1000:
            return "it was started before its files were as they are"
        group = _unit_group(group_of(state.pid), state.group)
        self._hold(state.pid, group)
        if group is not None:
            self._spawner.thaw(Freezer(group.path))
        return unready(self._declared.ready, self._spawner.connecting)

    def _check(self, state: State) -> None:
        """That the manager would start exactly what is declared. ServiceError `service.unit`."""
        listed = {f.path for f in self._declared.files}
        undeclared = [path for path in state.drop_ins if path not in listed]
        wrong = {
            f"it is {state.load}": state.load != "loaded",
            f"its unit file is {state.fragment or 'none'}": state.fragment != self._declared.fragment,
            f"it is made from {state.source}": bool(state.source),
            f"it has the drop-in {''.join(undeclared[:1])}": bool(undeclared),
        }
        for got, holds in wrong.items():
            if holds:
                raise ServiceError(
                    f"{self._declared.unit} is not the declared unit", id="service.unit",
                    want=self._declared.fragment, got=got, hint="list every drop-in, or remove it",
                )  # fmt: skip

    def start(self, on_cgroup: OnCgroup = nobody) -> Started:
        """Verify, start, wait until it is active and ready. ServiceError leaves nothing running. One that runs already
        is not started; where it cannot be proven to be what is declared it makes room."""
        begin = time.monotonic_ns()
        with self._lock:
            verify(self._declared.files)
            state = self._state
            if state.reload_needed or state.load != "loaded":  # its file may be there again
                self._units.call("Reload", "")
                state = self._state
            self._check(state)
            if state.active not in ("inactive", "failed") and not self.held and self._differs(state):
                self.destroy(self._declared.grace_ms * 1_000_000)
            verified = time.monotonic_ns()
            try:
                self._begin()
                spawned = time.monotonic_ns()
                pid, group = self._joined()
                self._hold(pid, group)
                if cgroup_id := self.found_in():
                    on_cgroup(cgroup_id)
                self._require_alive(pid)
                hint = f"see `journalctl -u {self._declared.unit}`"
                connect = self._spawner.connecting
                await_ready(self._declared.ready, connect, name=self.name, ended=self._ended, hint=hint)
            except BaseException:
                self.destroy(0)
                raise
            return Started(
                pid=pid,
                cgroup_id=cgroup_id,
                files=len(self._declared.files),
                verified_ns=verified - begin,
                spawned_ns=spawned - verified,
                ready_ns=time.monotonic_ns() - spawned,
                ready_for=" and ".join(filter(None, ("its unit is active", described(self._declared.ready)))),
            )

    def _require_alive(self, pid: int) -> None:
        """It may have ended before anybody watched it, and the manager not know it yet. ServiceError `service.ended`.
        Where the manager has another main process now, as after a fork, it is that."""
        if self.held:
            return
        state = self._state
        if state.active not in ("active", "reloading") or state.pid == pid:
            raise ServiceError(f"{self.name} ended at once", id="service.ended", got=f"its unit is {state.active}")
        self._hold(state.pid, _unit_group(group_of(state.pid), state.group))

    def _joined(self) -> tuple[int, Cgroup | None]:
        """The main process and the unit's cgroup, once it is in it; 0 and None if it has no main process."""
        deadline = time.monotonic() + JOIN_SECONDS
        while True:
            state = self._state
            group = _unit_group(group_of(state.pid), state.group)
            if group is not None or not state.pid or time.monotonic() >= deadline:
                return state.pid, group
            time.sleep(LOOK_SECONDS)

    def _begin(self) -> None:
        state = self._state
        # Also of one that has not failed: the manager counts starts, and how often is the guard's matter.
        with contextlib.suppress(ManagerRefusal):  # it is not loaded: then nothing was counted
            self._units.call("ResetFailedUnit", "s", self._declared.unit)
        self._units.call("StartUnit", "ss", self._declared.unit, "replace")
        begin = time.monotonic()
        deadline = begin + self._declared.ready.timeout_ms / 1000
        while (active := self._units.active(state.path)) != "active":
            if active == "failed":
                raise ServiceError(f"{self.name} ended at once", id="service.ended", got="the unit failed")
            if time.monotonic() > deadline:
                want = f"active within {self._declared.ready.timeout_ms} ms"
                raise ServiceError(f"{self.name} is not ready", id="service.not-ready", want=want, got=active)
            _pause(begin)

    def _ended(self, seconds: float) -> bool:
        time.sleep(max(seconds, LOOK_SECONDS))
        return not self.running

    def destroy(self, grace_ns: int) -> int:
        """Stop the unit, after the grace kill all of it; ns that it took. Not running is no error."""
        with self._lock:
            begin = time.monotonic_ns()
            self.thaw()
            state = self._state
            if state.load == "not-found":
                return time.monotonic_ns() - begin
            self._units.call("StopUnit", "ss", self._declared.unit, "replace")
            if not self._gone(state.path, grace_ns / 1e9):
                with contextlib.suppress(ManagerRefusal):  # it ended meanwhile: the manager knows it no more
                    self._units.call("KillUnit", "ssi", self._declared.unit, "all", 9)
                if not self._gone(state.path, KILLED_SECONDS):
                    raise ServiceError(f"{self.name} does not end", id="service.manager", got=self._state.active)
            return time.monotonic_ns() - begin

    def _gone(self, path: str, seconds: float) -> bool:
        begin = time.monotonic()
        while self._units.active(path) not in ("inactive", "failed"):
            if time.monotonic() >= begin + seconds:
                return False
            _pause(begin)
        return True

    def release(self) -> None:
        """Nothing is kept for a next start."""

    # ---- while it runs ---------------------------------------------------------------------------------------------

    def signal(self, number: int) -> None:
        """Send a signal to the main process, by the manager."""
        if not self.running:
            raise not_running(self.name)
        self._units.call("KillUnit", "ssi", self._declared.unit, "main", number)

    def freeze(self, until_ns: int) -> None:
        with self._lock:
            group = self._group()
            if group is None:
                raise not_running(self.name)
            self._freezer = Freezer(group.path)
            self._spawner.freeze(self._freezer, until_ns)

    def thaw(self) -> None:
        with self._lock:
            freezer, self._freezer = self._freezer, None
            if freezer is not None:
                self._spawner.thaw(freezer)

    def frozen(self, until_ns: int) -> bool:
        freezer = self._freezer
        return freezer is not None and freezer.settled(until_ns)

    def healthy(self) -> str:
        """The manager is asked only where the main process that was started or adopted does not live any more."""
        place = self._place
        if place is None or self._main not in place.living():
            state = self._state
            if state.active != "active":
                return f"its unit is {state.active}"
            found = _unit_group(group_of(state.pid), state.group)
            place = Place(found) if found is not None else None
        if place is not None and Freezer(place.group.path).frozen:
            return "it is frozen"
        return unready(self._declared.ready, self._spawner.connecting)


def _pause(begin: float) -> None:
    """Between two looks at a job that was given at `begin`: most end soon, and what takes long must not cost a core."""
    time.sleep(LOOK_SECONDS if time.monotonic() - begin < SHORT_FOR_SECONDS else LONG_LOOK_SECONDS)


def _unit_group(of_process: Cgroup | None, unit: str) -> Cgroup | None:
    """The unit's cgroup, of which the process's is one or one below; None if it is neither."""
    if of_process is None or not unit.strip("/"):
        return None
    path = f"{of_process.path}/"
    at = path.find(f"{unit.rstrip('/')}/")
    return Cgroup(Path(path[: at + len(unit.rstrip("/"))])) if at >= 0 else None
