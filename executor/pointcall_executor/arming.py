"""From an `Admitted` manifest to what the core runs on. Takes nothing else: what was not admitted cannot be armed.

Also refuses what this executor cannot do: an action it has not, a sensor it does not know. Promising less is no option.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Final

from pointcall_attest import manifest as manifests
from pointcall_attest.admission import Admitted
from pointcall_attest.manifest import Manifest
from pointcall_executor.actions import REGISTRY
from pointcall_executor.core.event import Destination
from pointcall_executor.core.guard import Grant, Limits, Rules
from pointcall_executor.core.step import Armed, Runbook
from pointcall_executor.core.trigger import Topology
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.module import ModuleInfo
from pointcall_runbook.vocabulary import Address, Network, channel, service

# Done by the core itself, not by a file in actions/.
BUILT_IN: Final = frozenset({"remember", "again"})
SENSORS: Final = (
    "breaker", "connections", "drill", "fsync", "fuse", "isolate", "lifecycle", "pressure", "storage", "syscalls",
    "tamper", "transport", "vfs",
)  # fmt: skip
# Actions that a kernel object carries out, which the manifest must declare.
NEEDS_SENSOR: Final[Mapping[str, str]] = {"kill_connections": "connections", "isolate": "isolate"}
PROTOCOLS: Final = {"tcp": 6, "udp": 17}
SECOND_NS: Final = 1_000_000_000


class ArmingError(PointcallError):
    """Admitted, but beyond what this executor can do."""

    id = "arm.error"


def check_abilities(admitted: Admitted) -> None:
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
    declared_sensors = {sensor.name for sensor in admitted.manifest.sensors}
    for book in admitted.manifest.runbooks:
        for action, needed in NEEDS_SENSOR.items():
            if action in admitted.modules[book.name].capabilities and needed not in declared_sensors:
                raise ArmingError(
                    f"runbook {book.name} may {action}, and no sensor does that", id="arm.sensor",
                    want=f"a sensor `{needed}`", got=", ".join(sorted(declared_sensors)),
                    hint=f"add `- name: {needed}` to spec.sensors and sign again",
                )  # fmt: skip
    for declared in admitted.manifest.services:
        if declared.kind != "process":
            raise ArmingError(
                f"service {declared.name} is of a kind that this executor cannot recreate",
                id="arm.service", want="process", got=declared.kind,
            )  # fmt: skip
    for channel_ in admitted.manifest.channels:
        if channel_.kind != "log":
            raise ArmingError(
                f"channel {channel_.name} is of a kind that this executor cannot reach",
                id="arm.channel", want="log", got=channel_.kind,
            )  # fmt: skip
    for book in admitted.manifest.runbooks:
        if book.limits.approval and book.mode == "enforce":
            raise ArmingError(
                f"runbook {book.name} asks for approvals", id="arm.approval", want="limits.approval empty",
                got=", ".join(book.limits.approval), hint="this executor cannot take approvals yet: use mode monitor",
            )  # fmt: skip


def _runbook(book: manifests.Runbook, info: ModuleInfo, sha256: str) -> Runbook:
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
        mode=book.mode,
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


def armed_of(admitted: Admitted) -> Armed:
    """What the core runs on."""
    check_abilities(admitted)
    manifest = admitted.manifest
    books = tuple(_runbook(b, admitted.modules[b.name], manifest.subjects[b.module]) for b in manifest.runbooks)
    return Armed(manifest.sha256, books, _rules(manifest))


def topology_of(manifest: Manifest) -> Topology:
    """Which declared service listens where."""
    listeners = {
        (str(Address.parse(place.address)), place.port): service(s.name).number
        for s in manifest.services
        for place in s.listen
    }
    return Topology(listeners, {}, {service(s.name).number: s.name for s in manifest.services})


def names_of(manifest: Manifest) -> Mapping[int, str]:
    """Declared services and channels by number."""
    services = {service(s.name).number: s.name for s in manifest.services}
    return services | {channel(c.name).number: c.name for c in manifest.channels}


def destinations_of(manifest: Manifest, netns: int) -> Mapping[Destination, int]:
    """Every destination that the breaker watches, with the number of the service behind it."""
    return {
        Destination(Address.parse(place.address), place.port, netns, PROTOCOLS[place.protocol]): service(s.name).number
        for s in manifest.services
        for place in s.listen
    }
