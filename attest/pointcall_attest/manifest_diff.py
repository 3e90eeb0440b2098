"""What an update of a manifest grants, revokes or changes, in words. Pure; it judges neither of the two.

`grants` is what a reviewer must look at: after it something may happen that could not happen before. What is neither
clearly more nor clearly less is `changes`. Spec: docs/spec/manifest.md, section Differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

from pydantic import BaseModel

from pointcall_attest.declaration import ServiceDeclaration
from pointcall_attest.manifest import Circuit, Listen, Manifest, Runbook, Sensor, Service
from pointcall_attest.manifest_change import EFFECTS, LESS, MORE, Change, Effect
from pointcall_attest.model import instant
from pointcall_attest.service_diff import declaration_changes

Row = TypeVar("Row", bound=BaseModel)

# For each number that limits something: what a larger value means.
LIMITS: Final[Mapping[str, tuple[Effect, Effect]]] = {
    "per_minute": MORE,
    "burst": MORE,
    "hold_off_seconds": LESS,
    "max_actions_per_minute": MORE,
    "max_services_at_once": MORE,
    "max_services_percent": MORE,
    "max_circuits_at_once": MORE,
    "min_healthy_percent": LESS,
    "storm_events_per_minute": MORE,
    "storm_cooldown_seconds": LESS,
    "healthy_delay_seconds": LESS,
}

# The same for one destination's circuit: who refuses sooner, for longer or on account of more may do more.
CIRCUIT: Final[Mapping[str, tuple[Effect, Effect]]] = {
    "threshold": LESS,
    "window_ms": MORE,
    "cooldown_ms": MORE,
    "percent": LESS,
    "min_attempts": LESS,
    "abandoned": MORE,
}

Declarations = Mapping[str, ServiceDeclaration]  # by service


def differences(
    old: Manifest, new: Manifest, declared: tuple[Declarations, Declarations] | None = None
) -> tuple[Change, ...]:
    """Every difference of meaning, grants first; empty if both say the same about what may happen.

    `declared`: the service declarations of both, as far as they are at hand; they are compared field by field.
    """
    known = declared or ({}, {})
    found = [
        *_header(old, new),
        *_rows(old.runbooks, new.runbooks, "runbook", lambda o, n: _runbook(o, n, old, new)),
        *_rows(old.sensors, new.sensors, "sensor", lambda o, n: _sensor(o, n, old, new)),
        *_rows(old.services, new.services, "service", lambda o, n: _service(o, n, known)),
        *_rows(old.channels, new.channels, "channel", lambda o, n: _values(f"channel {n.name}", o, n)),
        *_numbers("guard", old.guard, new.guard),
        *_set("guard: never touch", old.guard.never_touch, new.guard.never_touch, LESS),
    ]
    return tuple(sorted(found, key=lambda change: EFFECTS.index(change.effect)))


def _header(old: Manifest, new: Manifest) -> Iterator[Change]:
    before, after = old.predicate, new.predicate
    if new.sequence != old.sequence:
        yield Change("changes", f"sequence {old.sequence} -> {new.sequence}")
    if new.sequence < old.sequence:
        yield Change("revokes", "the sequence goes back: nodes that have armed the newer one refuse this")
    if after.expires != before.expires:
        effect: Effect = "grants" if after.expires > before.expires else "revokes"
        yield Change(effect, f"expires {instant(before.expires)} -> {instant(after.expires)}")
    for name in ("name", "min_executor", "vocabulary", "policy_sha256", "trusted_root_sha256"):
        one, two = getattr(before, name), getattr(after, name)
        if one != two:
            yield Change("changes", f"{name} {one} -> {two}")
    values = (before.reference_values, after.reference_values)
    yield from _set("SNP measurement", values[0].snp, values[1].snp, MORE)
    yield from _set("TDX measurement", values[0].tdx, values[1].tdx, MORE)
    yield from _set("revocation of", before.revoked, after.revoked, LESS)


def _rows(
    old: Sequence[Row], new: Sequence[Row], kind: str, same: Callable[[Row, Row], Iterator[Change]]
) -> Iterator[Change]:
    before, after = ({getattr(row, "name"): row for row in rows} for rows in (old, new))  # noqa: B009 - any row type
    for name in sorted(after.keys() - before.keys()):
        yield Change("grants", f"{kind} {name}")
    for name in sorted(before.keys() - after.keys()):
        yield Change("revokes", f"{kind} {name}")
    for name in sorted(before.keys() & after.keys()):
        yield from same(before[name], after[name])


def _runbook(old: Runbook, new: Runbook, before: Manifest, after: Manifest) -> Iterator[Change]:
    who = f"runbook {new.name}"
    for part, one, two in (
        ("action", old.grants.actions, new.grants.actions),
        ("service", old.grants.services, new.grants.services),
        ("channel", old.grants.channels, new.grants.channels),
        ("network", old.grants.networks, new.grants.networks),
        ("event", old.events, new.events),
    ):
        yield from _set(f"{who}: {part}", one, two, MORE)
    yield from _set(f"{who}: approval of", old.limits.approval, new.limits.approval, LESS)
    yield from _numbers(who, old.limits, new.limits)
    if old.mode != new.mode:
        yield Change("grants" if new.mode == "enforce" else "revokes", f"{who}: mode {old.mode} -> {new.mode}")
    yield from _mapping(f"{who}: parameter", old.parameters, new.parameters)
    if before.subjects.get(old.module) != after.subjects.get(new.module):
        versions = f"version {old.version} -> {new.version}" if old.version != new.version else "the same version"
        yield Change("changes", f"{who}: another module, {versions}")


def _sensor(old: Sensor, new: Sensor, before: Manifest, after: Manifest) -> Iterator[Change]:
    yield from _mapping(f"sensor {new.name}: constant", old.params, new.params)
    if before.sensor_blobs[old.name] != after.sensor_blobs[new.name]:
        yield Change("changes", f"sensor {new.name}: another BPF blob")


def _service(old: Service, new: Service, known: tuple[Declarations, Declarations]) -> Iterator[Change]:
    who = f"service {new.name}"
    if old.kind != new.kind:
        yield Change("changes", f"{who}: kind {old.kind} -> {new.kind}")
    if old.digest != new.digest:
        yield Change("changes", f"{who}: another declaration, {new.digest[:16]}")
        before, after = known[0].get(old.name), known[1].get(new.name)
        if before is not None and after is not None:
            yield from declaration_changes(before, after)
    one, two = ({_place(row): row.circuit for row in s.listen} for s in (old, new))
    yield from _set(f"{who}: listens on", tuple(one), tuple(two), MORE)
    for place in sorted(one.keys() & two.keys()):
        yield from _circuit(f"{who}: circuit of {place}", one[place], two[place])


def _place(row: Listen) -> str:
    return f"{row.address} port {row.port}/{row.protocol}"


def _circuit(who: str, old: Circuit | None, new: Circuit | None) -> Iterator[Change]:
    """Where a value is not set the sensor's constant counts, which is not compared with it."""
    for name in Circuit.model_fields:
        one, two = getattr(old, name, None), getattr(new, name, None)
        if one == two:
            continue
        effect: Effect = "changes"
        if one is not None and two is not None and name in CIRCUIT:
            effect = CIRCUIT[name][0] if two > one else CIRCUIT[name][1]
        values = ("unset" if value is None else str(value) for value in (one, two))
        yield Change(effect, f"{who}: {name} {' -> '.join(values)}")


def _set(what: str, old: Sequence[str], new: Sequence[str], effects: tuple[Effect, Effect]) -> Iterator[Change]:
    for item in sorted(set(new) - set(old)):
        yield Change(effects[0], f"{what} {item}")
    for item in sorted(set(old) - set(new)):
        yield Change(effects[1], f"{what} {item}" if effects[1] == "revokes" else f"{what} {item} is dropped")


def _numbers(who: str, old: BaseModel, new: BaseModel) -> Iterator[Change]:
    for name, effects in LIMITS.items():
        one, two = getattr(old, name, None), getattr(new, name, None)
        if one is not None and two is not None and one != two:
            yield Change(effects[0] if two > one else effects[1], f"{who}: {name} {one} -> {two}")


def _mapping(what: str, old: Mapping[str, int], new: Mapping[str, int]) -> Iterator[Change]:
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield Change("changes", f"{what} {name} {old.get(name, 'unset')} -> {new.get(name, 'unset')}")


def _values(who: str, old: BaseModel, new: BaseModel) -> Iterator[Change]:
    one: dict[str, Any] = old.model_dump()
    for name, value in new.model_dump().items():
        if one[name] != value:
            yield Change("changes", f"{who}: {name} {one[name]} -> {value}")
