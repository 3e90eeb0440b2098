"""The services that one manifest declares, by number, of every kind; and how they take over from those before.

Not here: how a service of one kind is started or frozen (process.py and its neighbours).
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self, assert_never

from pointcall_attest.declaration import ServiceDeclaration, Systemd
from pointcall_executor.services.elsewhere import end_elsewhere
from pointcall_executor.services.groups import destroy_leftovers, lives
from pointcall_executor.services.managed import NOTHING_LEFT, Managed, ServiceError, Started, cannot, not_running
from pointcall_executor.services.process import Process
from pointcall_executor.services.reach import Reach
from pointcall_executor.services.spawning import Spawner
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.vocabulary import service

if TYPE_CHECKING:
    from pointcall_executor.services.cluster import Cluster
    from pointcall_executor.services.container import Podman
    from pointcall_executor.services.systemd import Units

FOLLOW_SECONDS: Final = 1.0  # between two looks at whether somebody else has started a service again

OnMoved = Callable[[int, int], None]  # service number, its new cgroup id (0: none)


class Kinds:
    """Makes a service of the kind that is declared. `parent` is the cgroup, `folder` where the state of services is.

    A kind and its manager's client are imported when a service of it is declared, never while an action is done.
    """

    def __init__(self, parent: str, folder: Path, spawner: Spawner, reach: Reach | None = None) -> None:
        self.parent, self.folder, self.spawner = parent, folder, spawner
        self._reach = reach or Reach()
        self._closing: list[Callable[[], None]] = []
        self._followed: DeclaredServices | None = None
        self._over, self._looking = threading.Event(), threading.Lock()
        self._hurried = threading.Event()
        self._following: threading.Thread | None = None

    @functools.cached_property
    def _units(self) -> Units:
        from pointcall_executor.services.systemd import Units

        made = Units(self._reach.systemd_bus)
        self._closing.append(made.close)
        return made

    @functools.cached_property
    def _podman(self) -> Podman:
        from pointcall_executor.services.container import Podman

        return Podman(self._reach.podman_socket)

    @functools.cached_property
    def _cluster(self) -> Cluster:
        from pointcall_executor.services.cluster import Cluster

        return Cluster(Path(self._reach.kubeconfig) if self._reach.kubeconfig else None)

    def make(self, declaration: ServiceDeclaration) -> Managed:
        match declaration.kind:
            case "process":
                return Process(declaration, self.parent, self.folder, self.spawner)
            case "systemd":
                from pointcall_executor.services.systemd import SystemdService

                return SystemdService(declaration, self._units, self.spawner)
            case "container":
                from pointcall_executor.services.container import ContainerService

                return ContainerService(declaration, self._podman, self.spawner)
            case "kubernetes":
                from pointcall_executor.services.kubernetes import KubernetesService

                return KubernetesService(declaration, self._cluster, self._hurried)
            case _:
                assert_never(declaration.kind)

    def follow(self, services: DeclaredServices | None) -> None:
        """From now on see where these run, and no others; None while others take over from them. Only what somebody
        else's manager starts can move."""
        with self._looking:
            self._followed = services
        managed = services.managed().values() if services is not None else ()
        others = any(one.ours and one.declaration.kind != "process" for one in managed)
        if others and self._following is None:
            self._following = threading.Thread(target=self._follow, name="follow", daemon=True)
            self._following.start()

    def _follow(self) -> None:
        while not self._over.wait(FOLLOW_SECONDS):
            with self._looking:
                if self._followed is not None:
                    self._followed.follow()

    def hurry(self) -> None:
        """The executor ends: what a cluster does in its own time is not waited for."""
        self._hurried.set()

    def close(self) -> None:
        """Let go of connections. Services go on."""
        self._over.set()
        if self._following is not None:
            self._following.join()
        for close in self._closing:
            close()


class DeclaredServices:
    """Declared services by number."""

    def __init__(
        self, declarations: Mapping[str, ServiceDeclaration], kinds: Kinds, before: DeclaredServices | None,
        on_moved: OnMoved,
    ) -> None:  # fmt: skip
        self._tell, self._kinds, self._before = on_moved, kinds, before
        self._by_number: dict[int, Managed] = {}
        self._at: dict[int, int] = {}  # the cgroup that was told last
        self._changing: dict[int, threading.RLock] = {}  # held while we start or end one ourselves
        self._final = self._unseen = False
        self._passed: set[int] = set()  # of those before: what had to make room
        self._stopped: list[int] = []  # of these: what ran
        self._started: list[int] = []
        self.refused: dict[str, str] = {}  # service -> why what was left was not adopted; empty: it was, or nothing was
        for name, declaration in declarations.items():
            number = service(name).number
            old = before.managed().get(number) if before else None
            same = old is not None and old.declaration.sha256 == declaration.sha256
            self._by_number[number] = old if old and same else kinds.make(declaration)
            self._changing[number] = threading.RLock()

    @classmethod
    def left(cls, declarations: Mapping[str, ServiceDeclaration], kinds: Kinds) -> Self:
        """What an earlier executor declared last. Nobody has looked yet at what of it runs: each is adopted when it
        goes on, makes room or ends. Nobody is told where: the sensors of now know only what is declared now."""
        made = cls(declarations, kinds, None, lambda _number, _cgroup_id: None)
        made._final = made._unseen = True
        return made

    def managed(self) -> Mapping[int, Managed]:
        return self._by_number

    def _finds(self, earlier: ServiceDeclaration) -> bool:
        """Whether what was started from an earlier declaration is come upon by who adopts what is declared now: a
        unit by its own name, whatever the service is called, the others by the service's."""
        return identity(earlier) in {identity(one.declaration) for one in self._by_number.values()}

    def _one(self, number: int) -> Managed:
        found = self._by_number.get(number)
        if found is None:
            raise ServiceError("no such service is declared", id="service.unknown", got=str(number))
        return found

    def _on_moved(self, number: int, cgroup_id: int) -> None:
        self._tell(number, cgroup_id)
        self._at[number] = cgroup_id  # not before: what could not be watched is tried again

    def follow(self) -> None:
        """Tell where services run that somebody else has started again: with the tools of their manager, or it by
        itself. Their exits would not be seen."""
        for number, one in self._by_number.items():
            lock = self._changing[number]
            if one.declaration.kind == "process" or not lock.acquire(blocking=False):
                continue  # it is we who change it
            try:
                with contextlib.suppress(PointcallError, OSError):  # it is gone again
                    if (now := one.found_in()) and now != self._at.get(number):
                        self._on_moved(number, now)
            finally:
                lock.release()

    def name(self, number: int) -> str:
        return self._one(number).name

    def pids(self) -> Mapping[str, int]:
        """By name, 0 where nothing of it lives on this node. Nobody is asked who could be slow."""
        return {p.name: p.alive() for p in self._by_number.values()}

    def signal(self, number: int, sig: int) -> None:
        self._one(number).signal(sig)

    def freeze(self, number: int, until_ns: int) -> None:
        self._one(number).freeze(until_ns)

    def thaw(self, number: int) -> None:
        self._one(number).thaw()

    def frozen(self, number: int, until_ns: int) -> bool:
        return self._one(number).frozen(until_ns)

    def healthy(self, number: int) -> str:
        return self._one(number).healthy()

    def cgroup(self, number: int) -> int:
        """Id of the cgroup it runs in. ServiceError `service.not-running`, `service.ability`."""
        one = self._one(number)
        if "cgroup" not in one.abilities:
            raise cannot(one.name, one.declaration.kind, "cgroup")
        if not one.cgroup_id:
            raise not_running(one.name)
        return one.cgroup_id

    def destroy(self, number: int, grace_ns: int) -> int:
        one = self._one(number)
        with self._changing[number]:
            self._on_moved(number, 0)
            try:
                return one.destroy(grace_ns)
            except ServiceError:
                if one.running:  # what lives on is still watched
                    self._on_moved(number, one.cgroup_id)
                raise

    def start(self, number: int) -> Started:
        one = self._one(number)
        if not self._final:
            self._make_room(number)
            self._started.append(number)
        with self._changing[number]:
            return one.start(on_cgroup=lambda cgroup_id: self._on_moved(number, cgroup_id))

    def _earlier(self, number: int) -> list[tuple[int, Managed]]:
        """What ran of it a moment ago: by its name, and under another one the same unit."""
        takes_over_from = self._before  # read once: it is no more once the takeover is final
        before = takes_over_from.managed() if takes_over_from else {}
        mine = identity(self._by_number[number].declaration)
        return [(n, one) for n, one in before.items() if n == number or identity(one.declaration) == mine]

    def _make_room(self, number: int) -> None:
        """Two of one name would want the same address. What made room once has ended: what runs in its unit now is
        another service's."""
        before = self._before
        for earlier, old in self._earlier(number):
            if before is None or earlier in self._passed or not old.ours:
                continue
            self._passed.add(earlier)
            mine = old is self._by_number[number]  # it is not what was started here: its start makes room
            if before._unseen and not mine:
                self._adopted(old)
            if old.running:
                self._stopped.append(earlier)
            elif old.declaration.kind != "process":  # of a process something may live on without it
                continue
            if not mine:
                before.destroy(earlier, _grace_ns(old))
                old.release()

    def _adopted(self, one: Managed) -> bool:
        """Whether what was left of it goes on as declared; otherwise nothing of it is left."""
        wrong = one.adopt()
        self.refused[one.name] = "" if wrong == NOTHING_LEFT else wrong
        return not wrong

    def adopt(self) -> list[int]:
        """Take over what runs as declared; the numbers of the others.

        What an earlier executor left, or what runs without one, is adopted if it can be proven to be what is declared
        now, and destroyed if not. One that was declared otherwise a moment ago is not: its start makes room for it.
        """
        self._kinds.follow(None)
        missing = []
        for number, one in self._by_number.items():
            earlier = [old for _, old in self._earlier(number)]
            unseen = not earlier or (one in earlier and self._before is not None and self._before._unseen)
            goes_on = self._adopted(one) if unseen else one in earlier
            if not one.ours:  # what a cluster keeps is not started and not waited for here
                continue
            if goes_on and one.held:
                self._on_moved(number, one.cgroup_id)
            if not (goes_on and one.held):  # it may have ended before anybody watched it
                missing.append(number)
        return missing

    def _end(self) -> tuple[DeclaredServices | None, list[int], list[int]]:
        """The takeover is over: what it took over from, what it started and what it stopped."""
        found = self._before, self._started, self._stopped
        self._before, self._started, self._stopped, self._final = None, [], [], True
        return found

    def undo(self) -> Mapping[str, str]:
        """Destroy what this one started, start again what it stopped; names of both, with why that failed (empty: it
        did not). One that cannot be put back costs no other."""
        before, started, stopped = self._end()
        told: dict[str, str] = {}
        for one in (self._by_number[number] for number in started):
            with _telling(told, one.name):
                if one.ours:
                    _end(one, 0)
        if before is None:
            return told
        for number in stopped:
            name = before.name(number)
            if not told.get(name):  # what lives on gets no second instance
                with _telling(told, name):
                    before.start(number)
        if before._unseen:
            before.release()  # nobody watches it until something is armed
        else:
            self._kinds.follow(before)
        return told

    def commit(self) -> Mapping[str, str]:
        """Destroy those of before that were not taken over; their names, with why one could not be (empty: it was)."""
        before, _, _ = self._end()
        self._kinds.follow(self)
        unseen = before is not None and before._unseen
        told: dict[str, str] = {}
        staying = self._by_number.values()
        for one in before.managed().values() if before is not None else ():
            if one in staying or not one.ours:
                continue
            if self._finds(one.declaration):
                with contextlib.suppress(OSError, PointcallError):  # it made room, and what is called so is the new one
                    one.release()
                continue
            with _telling(told, one.name):
                if unseen and one.adopt() == NOTHING_LEFT:
                    del told[one.name]
                _end(one, _grace_ns(one))
        if before is None or unseen:
            self._sweep(told)
        return told

    def _sweep(self, told: dict[str, str]) -> None:
        """Processes that an earlier executor left, and that the log does not know: it may be a new one."""
        processes = {one.name for one in self._by_number.values() if one.declaration.kind == "process"}
        for folder in self._kinds.folder.iterdir() if self._kinds.folder.is_dir() else ():
            name = folder.name
            if name in processes or told.get(name) == "":
                continue
            with _telling(told, name):
                try:
                    there = end_elsewhere(folder, name, self._kinds.parent) or lives(self._kinds.parent, name)
                finally:
                    destroy_leftovers(self._kinds.parent, name)
                if not there:
                    del told[name]

    def stop_all(self) -> None:
        """ServiceError `service.destroy` where one lives on: every other is stopped."""
        failed: dict[str, str] = {}
        for number, one in self._by_number.items():
            with _telling(failed, one.name):
                if one.ours:
                    self.destroy(number, _grace_ns(one))
                    one.release()
        if any(failed.values()):
            raise ServiceError("not every service was stopped", id="service.destroy", got=_words(failed))

    def release(self) -> None:
        """No service is started by this executor any more; those that run go on."""
        for one in self._by_number.values():
            one.release()


@contextlib.contextmanager
def _telling(told: dict[str, str], name: str) -> Iterator[None]:
    """The name is told, and if this fails, why: it costs nothing else."""
    told[name] = ""
    try:
        yield
    except (OSError, PointcallError) as error:
        told[name] = str(error)


def _words(failed: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in failed.items() if why)


def check_distinct(declarations: Iterable[ServiceDeclaration]) -> None:
    """ServiceError `service.unit` where two services are one unit: to recreate one would end the other."""
    found: dict[tuple[str, str], str] = {}
    for declaration in declarations:
        mine = identity(declaration)
        other = found.setdefault(mine, declaration.name)
        if other != declaration.name:
            raise ServiceError(
                "two services are one unit", id="service.unit", want="a unit for each service",
                got=f"{mine[1]} of {other} and of {declaration.name}", hint="declare it once",
            )  # fmt: skip


def identity(declaration: ServiceDeclaration) -> tuple[str, str]:
    """By what a service is found on the node: a unit by its own name, the others by the service's."""
    body = declaration.body
    return declaration.kind, body.unit if isinstance(body, Systemd) else declaration.name


def _end(one: Managed, grace_ns: int) -> None:
    one.destroy(grace_ns)
    one.release()


def _grace_ns(one: Managed) -> int:
    return one.declaration.grace_ms * 1_000_000
