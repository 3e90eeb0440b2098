"""The services that one manifest declares, by number, of every kind; and how they take over from those before.

Not here: how a service of one kind is started or frozen (process.py and its neighbours).
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, assert_never

from pointcall_attest.admission import Admitted
from pointcall_attest.declaration import ServiceDeclaration, Systemd
from pointcall_executor.services.elsewhere import end_elsewhere
from pointcall_executor.services.groups import destroy_leftovers
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

                return KubernetesService(declaration, self._cluster)
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
        self, admitted: Admitted, kinds: Kinds, before: DeclaredServices | None, on_moved: OnMoved,
        earlier: Iterable[ServiceDeclaration] = (),
    ) -> None:  # fmt: skip
        self._tell, self._kinds, self._before = on_moved, kinds, before
        self._by_number: dict[int, Managed] = {}
        self._at: dict[int, int] = {}  # the cgroup that was told last
        self._changing: dict[int, threading.RLock] = {}  # held while we start or end one ourselves
        self._final = False
        self._stopped: list[int] = []  # of those before: what had to make room
        self._started: list[int] = []
        _check_distinct(admitted.declarations.values())
        self.refused: dict[str, str] = {}  # service -> why what was left was not adopted; empty: it was, or nothing was
        for name, declaration in admitted.declarations.items():
            number = service(name).number
            old = before.managed().get(number) if before else None
            same = old is not None and old.declaration.sha256 == declaration.sha256
            self._by_number[number] = old if old and same else kinds.make(declaration)
            self._changing[number] = threading.RLock()
        # What an earlier executor may have left running, and what would not be found by what is declared now.
        left = () if before else (d for d in earlier if not self._finds(d))
        self._left = {service(d.name).number: d for d in left}

    def managed(self) -> Mapping[int, Managed]:
        return self._by_number

    def _finds(self, earlier: ServiceDeclaration) -> bool:
        """Whether what was started from an earlier declaration is come upon by who adopts what is declared now: a
        unit by its own name, whatever the service is called, the others by the service's."""
        return _identity(earlier) in {_identity(one.declaration) for one in self._by_number.values()}

    def _one(self, number: int) -> Managed:
        found = self._by_number.get(number)
        if found is None:
            raise ServiceError("no such service is declared", id="service.unknown", got=str(number))
        return found

    def _on_moved(self, number: int, cgroup_id: int) -> None:
        self._at[number] = cgroup_id
        self._tell(number, cgroup_id)

    def follow(self) -> None:
        """Tell where services run that somebody else has started again: with the tools of their manager, or it by
        itself. Their exits would not be seen."""
        for number, one in self._by_number.items():
            lock = self._changing[number]
            if one.declaration.kind == "process" or not lock.acquire(blocking=False):
                continue  # it is we who change it
            try:
                if (now := one.found_in()) and now != self._at.get(number):
                    with contextlib.suppress(PointcallError, OSError):  # it is gone again
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
        before = self._before.managed() if self._before else {}
        mine = _identity(self._by_number[number].declaration)
        return [(n, one) for n, one in before.items() if n == number or _identity(one.declaration) == mine]

    def _make_room(self, number: int) -> None:
        """Two of one name would want the same address. What made room once has ended: what runs in its unit now is
        another service's."""
        self._end_left(number)
        for earlier, old in self._earlier(number):
            if self._before is None or earlier in self._stopped or not _ends(old):
                continue
            self._stopped.append(earlier)
            if old is not self._by_number[number]:  # else it is not what was started here: its start makes room
                self._before.destroy(earlier, _grace_ns(old))
                old.release()

    def _end_left(self, number: int) -> bool:
        """End what an earlier executor left of another kind, or under another unit. Whether something had to end."""
        declaration = self._left.get(number)
        one = self._kinds.make(declaration) if declaration is not None else None
        if one is None or not one.ours:
            return False
        ended = one.adopt() != NOTHING_LEFT  # takes over what can be proven, so that it may end in order
        _end(one, _grace_ns(one))
        del self._left[number]  # not before: what cannot be ended is asked for again
        return ended

    def adopt(self) -> list[int]:
        """Take over what runs as declared; the numbers of the others.

        What an earlier executor left, or what runs without one, is adopted if it can be proven to be what is declared
        now, and destroyed if not. One that was declared otherwise a moment ago is not: its start makes room for it.
        """
        self._kinds.follow(None)
        missing = []
        for number, one in self._by_number.items():
            earlier = [old for _, old in self._earlier(number)]
            wrong = "" if earlier else one.adopt()
            if not earlier:
                self.refused[one.name] = "" if wrong == NOTHING_LEFT else wrong
            if not one.ours:  # what a cluster keeps is not started and not waited for here
                continue
            goes_on = one in earlier or not (earlier or wrong)
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

    def undo(self) -> tuple[str, ...]:
        """Destroy what this one started, start again what it stopped; names of both. ServiceError `service.undo` where
        that fails for one: for every other it is done."""
        before, started, stopped = self._end()
        names, failed = [self._by_number[number].name for number in started], dict[str, str]()
        for number in started:
            one = self._by_number[number]
            with _telling(failed, one.name):
                if one.ours:
                    _end(one, 0)
        if before is not None:
            for number in stopped:
                names.append(before.name(number))
                with _telling(failed, names[-1]):
                    before.start(number)
            self._kinds.follow(before)
        if failed:
            raise ServiceError(
                "not all that ran before runs again", id="service.undo", want=", ".join(dict.fromkeys(names)),
                got=_words(failed), hint="what is armed is as before: see why, or arm what can be started",
            )  # fmt: skip
        return tuple(dict.fromkeys(names))

    def commit(self) -> Mapping[str, str]:
        """Destroy those of before that were not taken over; their names, with why one could not be (empty: it was)."""
        before, _, _ = self._end()
        self._kinds.follow(self)
        if before is None:
            return self._sweep()
        staying, ended = self._by_number.values(), dict[str, str]()
        for one in before.managed().values():
            if one in staying or not one.ours:
                continue
            if one.declaration.kind != "process" and self._finds(one.declaration):
                one.release()  # it made room, and its unit or container is what runs now
                continue
            with _telling(ended, one.name):
                _end(one, _grace_ns(one))
                ended[one.name] = ""
        return ended

    def _sweep(self) -> Mapping[str, str]:
        """What an earlier executor left of services that are not declared any more ends here; as `commit`."""
        ended: dict[str, str] = {}
        for number, declaration in tuple(self._left.items()):
            with _telling(ended, declaration.name):
                if self._end_left(number):
                    ended[declaration.name] = ""
        processes = {one.name for one in self._by_number.values() if one.declaration.kind == "process"}
        for folder in self._kinds.folder.iterdir() if self._kinds.folder.is_dir() else ():
            if folder.name not in processes:  # the log may not know it: it may be a new one
                with _telling(ended, folder.name):
                    end_elsewhere(folder, folder.name, self._kinds.parent)
                with _telling(ended, folder.name):
                    destroy_leftovers(self._kinds.parent, folder.name)
        return ended

    def stop_all(self) -> None:
        """ServiceError `service.destroy` where one lives on: every other is stopped."""
        failed: dict[str, str] = {}
        for number, one in self._by_number.items():
            with _telling(failed, one.name):
                if one.ours:
                    self.destroy(number, _grace_ns(one))
                    one.release()
        if failed:
            raise ServiceError("not every service was stopped", id="service.destroy", got=_words(failed))

    def release(self) -> None:
        """No service is started by this executor any more; those that run go on."""
        for one in self._by_number.values():
            one.release()


@contextlib.contextmanager
def _telling(told: dict[str, str], name: str) -> Iterator[None]:
    """What fails here is told by name: it costs nothing else."""
    try:
        yield
    except (OSError, PointcallError) as error:
        told[name] = str(error)


def _words(failed: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in failed.items())


def _check_distinct(declarations: Iterable[ServiceDeclaration]) -> None:
    """ServiceError `service.unit` where two services are one unit: to recreate one would end the other."""
    found: dict[tuple[str, str], str] = {}
    for declaration in declarations:
        identity = _identity(declaration)
        other = found.setdefault(identity, declaration.name)
        if other != declaration.name:
            raise ServiceError(
                "two services are one unit", id="service.unit", want="a unit for each service",
                got=f"{identity[1]} of {other} and of {declaration.name}", hint="declare it once",
            )  # fmt: skip


def _identity(declaration: ServiceDeclaration) -> tuple[str, str]:
    body = declaration.body
    return declaration.kind, body.unit if isinstance(body, Systemd) else declaration.name


def _ends(one: Managed) -> bool:
    return one.ours and one.running


def _end(one: Managed, grace_ns: int) -> None:
    one.destroy(grace_ns)
    one.release()


def _grace_ns(one: Managed) -> int:
    return one.declaration.grace_ms * 1_000_000
