"""What every kind of declared service can be asked, and the one error they raise. No kind is implemented here.

Whatever stops a service for a time is a lease: it ends at its time without the executor (docs/spec/service.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from pointcall_attest.declaration import ServiceDeclaration
from pointcall_runbook.errors import PointcallError

Ability = Literal["signal", "freeze", "cgroup"]
OnCgroup = Callable[[int], None]

NOTHING_LEFT: Final = "nothing of it was left"  # an answer of `adopt` that refuses nothing

# What each kind can do beyond start and destroy. `cgroup`: its processes are in one cgroup of this node.
ABILITIES: Final[Mapping[str, frozenset[Ability]]] = {
    "process": frozenset({"signal", "freeze", "cgroup"}),
    "systemd": frozenset({"signal", "freeze", "cgroup"}),
    "container": frozenset({"signal", "freeze", "cgroup"}),
    "kubernetes": frozenset(),
}
# The ability that an action needs of the service that it is about.
NEEDS: Final[Mapping[str, Ability]] = {"kill": "signal", "freeze": "freeze", "thaw": "freeze", "isolate": "cgroup"}


class ServiceError(PointcallError):
    """A service could not be verified, started, stopped or signalled. Its id says which."""

    id = "service.error"


@dataclass(frozen=True, slots=True)
class Started:
    """What one start did, with the times it took (ns)."""

    pid: int
    cgroup_id: int
    files: int
    verified_ns: int
    spawned_ns: int
    ready_ns: int
    ready_for: str  # what was checked before it counted as ready


class Managed(Protocol):
    """One declared service. Thread-safe; every method raises ServiceError where the system refuses.

    `pid` and `cgroup_id` are 0 where nothing runs or the kind has none on this node.
    """

    @property
    def name(self) -> str: ...
    @property
    def declaration(self) -> ServiceDeclaration: ...
    @property
    def running(self) -> bool: ...
    @property
    def pid(self) -> int: ...
    @property
    def cgroup_id(self) -> int: ...
    @property
    def abilities(self) -> frozenset[Ability]: ...
    @property
    def ours(self) -> bool:
        """Whether this node runs it: only then it ends when it is not declared any more. A cluster keeps its own."""
        ...

    @property
    def held(self) -> bool:
        """Whether what was started or adopted here lives on, that very instance. Somebody else may have started
        another one in its place, of which nothing is proven."""
        ...

    def found_in(self) -> int:
        """Id of the cgroup that it has now, whoever started it there; 0 where there is none, or the kind has none on
        this node. Answered from the kernel alone."""
        ...

    def alive(self) -> int:
        """The pid of a process of it, its main one where that lives; 0 if none does, or not on this node. Answered
        from the kernel alone: whoever asks for the status must not wait for a manager that hangs."""
        ...

    def adopt(self) -> str:
        """Take over what an earlier executor started, if it can be proven to be what is declared; empty if that is
        done. Otherwise nothing of it runs afterwards, and the answer is why; `NOTHING_LEFT` if nothing did before."""
        ...

    def start(self, on_cgroup: OnCgroup = ...) -> Started:
        """Verify, start, wait until it is ready. A failure leaves nothing behind. `on_cgroup` hears the id of the
        new cgroup before anything runs in it, where the kind can say it that early, else as soon as it is known."""
        ...

    def destroy(self, grace_ns: int) -> int:
        """Ask it to stop, after `grace_ns` kill what is left; ns that it took. Not running is no error."""
        ...

    def release(self) -> None:
        """No start is expected any more: let go of what was kept for it. Twice without harm."""
        ...

    def signal(self, number: int) -> None:
        """Send a signal to the main process. `service.not-running` where there is none."""
        ...

    def freeze(self, until_ns: int) -> None:
        """Stop every task until CLOCK_MONOTONIC `until_ns`, also if the executor dies. A later call moves the end."""
        ...

    def thaw(self) -> None:
        """Let it go on now. Not frozen is no error."""
        ...

    def frozen(self, until_ns: int) -> bool:
        """Whether no task of it runs, after a moment in which the kernel stops them; or the freeze has ended."""
        ...

    def healthy(self) -> str:
        """Empty if it runs, is not frozen and is ready as declared; otherwise why not."""
        ...


def nobody(_cgroup_id: int) -> None:
    """Nobody wants to hear of the new cgroup."""


def cannot(name: str, kind: str, ability: str) -> ServiceError:
    """The error of a kind that has not this ability."""
    have = ", ".join(sorted(ABILITIES[kind])) or "none of them"
    return ServiceError(
        f"a service of kind {kind} has no {ability}", id="service.ability", want=ability, got=f"{name}: {have}",
        hint="declare it as another kind, or do not grant this action on it",
    )  # fmt: skip


def not_running(name: str) -> ServiceError:
    return ServiceError(f"{name} does not run", id="service.not-running", want="a running service", hint="recreate it")
