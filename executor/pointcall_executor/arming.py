"""From an `Admitted` manifest to what the core runs on. Takes nothing else: what was not admitted cannot be armed.

Also refuses what this executor cannot do: an action it has not, a sensor it does not know. Promising less is no option.
"""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from pointcall_attest import manifest as manifests
from pointcall_attest.admission import Admitted
from pointcall_attest.manifest import Manifest
from pointcall_attest.policy import TrustPolicy
from pointcall_executor.actions import REGISTRY
from pointcall_executor.core.event import Destination
from pointcall_executor.core.guard import Grant, Limits, Rules
from pointcall_executor.core.step import Armed, Runbook
from pointcall_executor.core.trigger import Topology
from pointcall_executor.kernel.breaker import CircuitPolicy, normalised
from pointcall_executor.services.managed import ABILITIES, NEEDS
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.module import ModuleInfo
from pointcall_runbook.vocabulary import Address, Mode, Network, channel, service

# Done by the core itself, not by a file in actions/.
BUILT_IN: Final = frozenset({"remember", "again"})
SENSORS: Final = (
    "breaker", "connections", "drill", "fsync", "fuse", "isolate", "lifecycle", "pressure", "storage", "syscalls",
    "tamper", "transport", "vfs",
)  # fmt: skip
PROTOCOLS: Final = {"tcp": 6, "udp": 17}
SECOND_NS: Final = 1_000_000_000


class ArmingError(PointcallError):
    """Admitted, but beyond what this executor can do."""

    id = "arm.error"


def check_abilities(admitted: Admitted, policy: TrustPolicy) -> None:
    """ArmingError where the manifest needs an action, a sensor or a kind of service that this executor has not."""
    for book in admitted.manifest.runbooks:
        missing = sorted(set(admitted.modules[book.name].capabilities) - REGISTRY.keys() - BUILT_IN)
        if missing:
            want = ", ".join(sorted(REGISTRY.keys() | BUILT_IN))
            hint = "arm it on an executor that has them, or decide something else"
            raise ArmingError(
                f"runbook {book.name} needs actions that this executor has not",
                id="arm.action", want=want, got=", ".join(missing), hint=hint,
            )  # fmt: skip
    for sensor in admitted.manifest.sensors:
        if sensor.name not in SENSORS:
            raise ArmingError("a sensor of an unknown kind", id="arm.sensor", want=", ".join(SENSORS), got=sensor.name)
    _check_needs(admitted)
    _check_circuits(admitted.manifest)
    for book in admitted.manifest.runbooks:
        _check_services(book, {s.name: s.kind for s in admitted.manifest.services})
    for book in admitted.manifest.runbooks:
        if book.limits.approval and book.mode == "enforce" and not policy.may_approve:
            raise ArmingError(
                f"nobody can approve what runbook {book.name} decides",
                id="arm.approval", want="approvers or approver_keys in the trust policy",
                got=", ".join(book.limits.approval), hint="add a second person to the node's trust policy",
            )  # fmt: skip


# What an action needs in the kernel; without it every run would fail, and only then say so.
KERNEL_NEEDS: Final[Mapping[str, str]] = {
    "open_circuit": "breaker",
    "close_circuit": "breaker",
    "kill_connections": "connections",
    "isolate": "isolate",
}


def _check_needs(admitted: Admitted) -> None:
    declared = {s.name for s in admitted.manifest.sensors}
    for book in admitted.manifest.runbooks:
        for name in admitted.modules[book.name].capabilities:
            needed = KERNEL_NEEDS.get(name)
            if needed is not None and needed not in declared:
                raise ArmingError(
                    f"runbook {book.name} can decide {name}, which the kernel side is not declared for",
                    id="arm.needs", want=f"sensor {needed} in the manifest", got=", ".join(sorted(declared)) or "none",
                )  # fmt: skip


def _check_circuits(manifest: Manifest) -> None:
    """ArmingError where a destination has values for the breaker that no breaker would ever see."""
    own = [s.name for s in manifest.services if any(place.circuit is not None for place in s.listen)]
    if own and "breaker" not in {s.name for s in manifest.sensors}:
        raise ArmingError(
            f"service {own[0]} has a circuit of its own, and nothing watches it",
            id="arm.needs", want="sensor breaker in the manifest",
            got=", ".join(s.name for s in manifest.sensors) or "none",
        )  # fmt: skip
    policies_of(manifest)


def _check_services(book: manifests.Runbook, kinds: Mapping[str, str]) -> None:
    """ArmingError where a granted action can never be done to a granted service."""
    for action in book.grants.actions:
        need = NEEDS.get(action)
        lacking = [n for n in book.grants.services if need is not None and need not in ABILITIES[kinds[n]]]
        if lacking:
            raise ArmingError(
                f"runbook {book.name} may {action} a service that cannot be", id="arm.service",
                want=f"a kind with {need}", got=f"{lacking[0]}, {kinds[lacking[0]]}",
                hint="do not grant this action together with this service",
            )  # fmt: skip


def _runbook(book: manifests.Runbook, info: ModuleInfo, sha256: str, mode: Mode) -> Runbook:
    grants = book.grants
    return Runbook(
        name=book.name,
        version=str(book.version),
        module=sha256,
        events=frozenset(book.events),
        grant=Grant(
            frozenset(grants.actions),
            frozenset(service(n).number for n in grants.services),
            frozenset(channel(n).number for n in grants.channels),
            tuple(Network(t) for t in grants.networks),
        ),
        mode="monitor" if mode == "monitor" else book.mode,
        limits=Limits(
            book.limits.per_minute,
            book.limits.burst,
            book.limits.hold_off_seconds * SECOND_NS,
            frozenset(book.limits.approval),
        ),
        parameters=tuple(book.parameters.get(p.name, p.default) for p in info.parameters),
        slots=tuple(s.initial for s in info.slots),
        ranges=tuple((s.lo, s.hi) for s in info.slots),
    )


def _never_touch(manifest: Manifest) -> tuple[frozenset[int], tuple[Network, ...], frozenset[tuple[str, int]]]:
    """The never-touch list by kind: service names, networks, `address:port`."""
    services, nets, places = set(), [], set()
    names = {s.name for s in manifest.services}
    for item in manifest.guard.never_touch:
        host, colon, port = item.rpartition(":")
        if item in names:
            services.add(service(item).number)
        elif _is_network(item):
            nets.append(Network(item))
        elif colon and port.isdecimal() and _is_network(host.strip("[]")):
            places.add((str(Address.parse(host.strip("[]"))), int(port)))
        else:
            raise ArmingError(
                "an item of guard.never_touch means nothing here",
                id="arm.never-touch", want="a declared service, a network or address:port", got=item,
            )  # fmt: skip
    return frozenset(services), tuple(nets), frozenset(places)


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def _rules(manifest: Manifest) -> Rules:
    guard = manifest.guard
    services, nets, places = _never_touch(manifest)
    return Rules(
        actions_per_minute=guard.max_actions_per_minute,
        services=max(1, len(manifest.services)),
        services_at_once=guard.max_services_at_once,
        services_percent=guard.max_services_percent,
        min_healthy_percent=guard.min_healthy_percent,
        circuits_at_once=guard.max_circuits_at_once,
        storm_events_per_minute=guard.storm_events_per_minute,
        storm_cooldown_ns=guard.storm_cooldown_seconds * SECOND_NS,
        healthy_delay_ns=guard.healthy_delay_seconds * SECOND_NS,
        never_touch_services=services,
        never_touch_networks=nets,
        never_touch_destinations=places,
    )


def armed_of(admitted: Admitted, policy: TrustPolicy, mode: Mode) -> Armed:
    """What the core runs on. In mode `monitor` of the node nothing acts, whatever the manifest says."""
    check_abilities(admitted, policy)
    manifest = admitted.manifest
    books = tuple(_runbook(b, admitted.modules[b.name], manifest.subjects[b.module], mode) for b in manifest.runbooks)
    return Armed(manifest.sha256, books, _rules(manifest))


def topology_of(manifest: Manifest) -> Topology:
    """Which declared service listens where."""
    declared = destinations_of(manifest, 0)
    listeners = {(str(to.address), to.port, to.protocol): number for to, number in declared.items()}
    return Topology(listeners, {}, {service(s.name).number: s.name for s in manifest.services})


def names_of(manifest: Manifest) -> Mapping[int, str]:
    """Declared services and channels by number."""
    services = {service(s.name).number: s.name for s in manifest.services}
    return services | {channel(c.name).number: c.name for c in manifest.channels}


def destinations_of(manifest: Manifest, netns: int) -> Mapping[Destination, int]:
    """Every declared destination as clients in this namespace reach it, with the number of the service behind it.

    ArmingError `arm.destination` where two services declare the same one: nobody could say whose trouble it is.
    """
    found: dict[Destination, tuple[int, str]] = {}
    for owner, to in ((s.name, _at(place, netns)) for s in manifest.services for place in s.listen):
        _, other = found.setdefault(to, (service(owner).number, owner))
        if other != owner:
            raise ArmingError(
                "two services listen on the same destination", id="arm.destination",
                want="one service for each destination", got=f"{to} of {other} and {owner}",
                hint="0.0.0.0 and :: are watched as loopback",
            )  # fmt: skip
    return {to: number for to, (number, _) in found.items()}


def on_loopback(address: Address) -> bool:
    return ipaddress.ip_address(str(address)).is_loopback


def node_wide(to: Destination) -> Destination:
    """The same for clients of every network namespace. Loopback stays: each namespace has another one."""
    return to if on_loopback(to.address) else replace(to, netns=0)


def policies_of(manifest: Manifest) -> Mapping[Destination, CircuitPolicy]:
    """The destinations with values of their own, netns 0. ArmingError `arm.circuit` where one has two kinds of them."""
    found: dict[Destination, CircuitPolicy] = {}
    for to, policy in ((_at(row, 0), _policy(row.circuit)) for s in manifest.services for row in s.listen):
        if found.setdefault(to, policy) != policy:
            raise ArmingError(
                "a destination is declared twice, with different circuits", id="arm.circuit",
                want="the same circuit, or the destination once", got=str(to),
                hint="0.0.0.0 and :: are watched as loopback",
            )  # fmt: skip
    return found


def _at(place: manifests.Listen, netns: int) -> Destination:
    return normalised(Destination(Address.parse(place.address), place.port, netns, PROTOCOLS[place.protocol]))


def _policy(own: manifests.Circuit | None) -> CircuitPolicy:
    if own is None:
        return CircuitPolicy()
    return CircuitPolicy(
        threshold=own.threshold or 0,
        percent=own.percent or 0,
        min_attempts=own.min_attempts or 0,
        window_ms=own.window_ms or 0,
        cooldown_ms=own.cooldown_ms or 0,
        refuse_errno=getattr(errno, own.refuse_errno) if own.refuse_errno else 0,
        abandoned=own.abandoned,
    )
