"""What another declaration of the same service grants, revokes or changes, in words. Pure; it judges neither.

`grants` is what a reviewer must look at: the service may do more afterwards. Spec: docs/spec/manifest.md, Differences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from pointcall_attest.declaration import ServiceDeclaration
from pointcall_attest.manifest_change import LESS, MORE, Change, Effect

# Fields whose items are rights or fences, by kind and field: what one item more means.
SETS: Final[Mapping[str, tuple[Effect, Effect]]] = {
    "process.namespaces": LESS,
    "container.capabilities": MORE,
    "container.mounts": MORE,
}
# Values, from the one that allows least: what a later one means.
ORDERS: Final[Mapping[str, tuple[Any, ...]]] = {
    "container.network": ("none", "host"),
    "container.read_only_root": (True, False),
}


def declaration_changes(old: ServiceDeclaration, new: ServiceDeclaration) -> Iterator[Change]:
    """Every difference between two declarations of one service; of two kinds only that."""
    who = f"service {new.name}"
    if old.kind != new.kind:
        yield Change("changes", f"{who}: declared as {new.kind}, was {old.kind}")
        return
    one, two = old.body.model_dump(mode="json"), new.body.model_dump(mode="json")
    for field in sorted(one):
        if one[field] != two[field]:
            yield from _field(who, new.kind, field, one[field], two[field])


def _field(who: str, kind: str, field: str, one: Any, two: Any) -> Iterator[Change]:
    name = f"{kind}.{field}"
    if name in SETS:
        yield from _set(f"{who}: {field}", one, two, SETS[name])
    elif name in ORDERS:
        order = ORDERS[name]
        effect: Effect = "grants" if order.index(two) > order.index(one) else "revokes"
        yield Change(effect, f"{who}: {field} {_shown(one)} -> {_shown(two)}")
    elif field == "files":
        yield from _mapping(
            f"{who}: file", {f["path"]: f["sha256"] for f in one}, {f["path"]: f["sha256"] for f in two}
        )
    elif isinstance(one, dict) and isinstance(two, dict):
        yield from _mapping(f"{who}: {field}", one, two, limits=field == "limits")
    else:
        yield Change("changes", f"{who}: {field} {_shown(one)} -> {_shown(two)}")


def _set(what: str, one: list[Any], two: list[Any], effects: tuple[Effect, Effect]) -> Iterator[Change]:
    before, after = {_shown(v) for v in one}, {_shown(v) for v in two}
    for item in sorted(after - before):
        yield Change(effects[0], f"{what} {item}")
    for item in sorted(before - after):
        yield Change(effects[1], f"{what} {item} is dropped")


def _mapping(what: str, one: Mapping[str, Any], two: Mapping[str, Any], *, limits: bool = False) -> Iterator[Change]:
    for key in sorted(one.keys() | two.keys()):
        before, after = one.get(key), two.get(key)
        if before == after:
            continue
        effect: Effect = "changes"
        if limits:  # no limit is more than any
            effect = "grants" if after is None or (before is not None and after > before) else "revokes"
        yield Change(effect, f"{what} {key} {_shown(before)} -> {_shown(after)}")


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, dict):
        return " ".join(f"{k}={_shown(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(map(_shown, value)) or "empty"
    text = str(value)
    return f"{text[:16]}..." if len(text) == 64 else text
