"""A case: one event in, the decision that must come out, as an author writes it in JSON. Bytes in, types out; no I/O.

{"name": "...", "event": "CircuitOpened", "fields": {"service": "api", "restarts": 1},
 "parameters": {"MAX_RESTARTS": 3}, "remembered": {}, "calls": [{"action": "recreate", "args": {"service": "api"}}]}

Fields that are left out are 0, false, the first member, no service, 127.0.0.1. Spec: docs/spec/cases.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pointcall_runbook.errors import PointcallError
from pointcall_runbook.module import ModuleInfo
from pointcall_runbook.vocabulary import ACTIONS, EVENTS, Address, Call, Field, Kind, channel, fields, service

MAX_CASES_BYTES: Final = 256 * 1024
_KEYS: Final = frozenset({"name", "event", "fields", "parameters", "remembered", "calls"})


class CaseError(PointcallError):
    """A case is not of its form, or does not fit its runbook."""

    id = "case.malformed"


@dataclass(frozen=True, slots=True)
class Case:
    """`args` are the raw i64 of event, parameters and slots; `calls` what must be decided."""

    name: str
    event: str
    args: tuple[int, ...]
    calls: tuple[Call, ...]


def parse_cases(raw: bytes, info: ModuleInfo) -> tuple[Case, ...]:
    """A file with one case or a list of them, for the module of `info`. Raises CaseError."""
    if len(raw) > MAX_CASES_BYTES:
        raise CaseError("the file is too large", want=f"at most {MAX_CASES_BYTES} bytes", got=str(len(raw)))
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CaseError("not JSON", got=str(error)[:80]) from None
    return tuple(_case(row, info) for row in (body if isinstance(body, list) else [body]))


def _case(row: Any, info: ModuleInfo) -> Case:
    if not isinstance(row, dict) or not {"name", "event", "calls"} <= row.keys() <= _KEYS:
        raise CaseError("a case has other keys", want=", ".join(sorted(_KEYS)), got=repr(row)[:80])
    name, event = str(row["name"]), row["event"]
    if not isinstance(event, str) or event not in info.handlers:
        raise CaseError(f"{name}: the runbook does not handle {event!r}", want=", ".join(info.handlers))
    own = _values(fields(EVENTS[event]), _mapping(row.get("fields", {}), name), name)
    parameters = _settings({p.name: p.default for p in info.parameters}, row.get("parameters", {}), name)
    slots = _settings({s.name: s.initial for s in info.slots}, row.get("remembered", {}), name)
    try:
        args = info.arguments(own, parameters, slots)
    except ValueError as error:
        raise CaseError(f"{name}: {error}") from None
    if not isinstance(row["calls"], list):
        raise CaseError(f"{name}: calls are a list")
    return Case(name, event, args, tuple(_call(c, name) for c in row["calls"]))


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise CaseError(f"{name}: an object is needed", got=repr(value)[:80])
    return value


def _settings(known: Mapping[str, int], given: Any, name: str) -> tuple[int, ...]:
    chosen = _mapping(given, name)
    if not chosen.keys() <= known.keys() or any(type(v) is not int for v in chosen.values()):
        raise CaseError(f"{name}: not a parameter or slot of this runbook", want=", ".join(known), got=repr(given)[:80])
    return tuple(chosen.get(key, default) for key, default in known.items())


def _call(row: Any, name: str) -> Call:
    known = isinstance(row, dict) and {"action"} <= row.keys() <= {"action", "args"}
    if not known or not isinstance(row["action"], str) or row["action"] not in ACTIONS:
        raise CaseError(f"{name}: not a call of an action", want=", ".join(ACTIONS), got=repr(row)[:80])
    given = _mapping(row.get("args", {}), name)
    return Call(row["action"], _values(fields(ACTIONS[row["action"]]), given, name))


def _values(declared: tuple[Field, ...], given: Mapping[str, Any], name: str) -> tuple[int, ...]:
    unknown = given.keys() - {f.name for f in declared}
    if unknown:
        raise CaseError(f"{name}: no field is called {min(unknown)!r}", want=", ".join(f.name for f in declared))
    return tuple(n for f in declared for n in raw_value(f, given.get(f.name), name))


def raw_value(field: Field, value: Any, name: str) -> tuple[int, ...]:
    """A field as people write it, as raw i64. None is the default. Raises CaseError."""
    try:
        numbers = _raw(field, value)
    except (ValueError, KeyError, TypeError) as error:
        raise CaseError(f"{name}: {field.name} is {value!r:.60}", want=field.kind.value, got=str(error)[:80]) from None
    if not all(field.lo <= n <= field.hi for n in numbers):
        raise CaseError(f"{name}: {field.name} is out of range", want=f"{field.lo}..{field.hi}", got=repr(value)[:60])
    return numbers


def _raw(field: Field, value: Any) -> tuple[int, ...]:
    match field.kind:
        case Kind.ADDRESS:
            address = Address.parse("127.0.0.1" if value is None else _text(value))
            return tuple(int.from_bytes(half, "big", signed=True) for half in (address.packed[:8], address.packed[8:]))
        case Kind.SERVICE:
            return (service(_text(value)).number if value not in (None, "") else 0,)
        case Kind.CHANNEL:
            return (channel(_text(value)).number if value not in (None, "") else 0,)
        case Kind.ENUM if isinstance(value, str):
            assert field.enum is not None
            return (int(field.enum[value]),)
        case _:
            number = int(field.default or field.lo) if value is None else value
            wanted = (bool, int) if field.kind is Kind.BOOL else (int,)
            if type(number) not in wanted:
                raise TypeError(f"{wanted[0].__name__} is needed")
            return (int(number),)


def _text(value: Any) -> str:
    """Python would take a number for an address."""
    if not isinstance(value, str):
        raise TypeError("a text is needed")
    return value


def readable(call: Call, names: Mapping[int, str]) -> dict[str, Any]:
    """A call as a case writes it. `names` maps numbers of services and channels; ValueError where it is malformed."""
    action = call.typed()
    out = {}
    for field in fields(type(action)):
        value = getattr(action, field.name)
        match field.kind:
            case Kind.SERVICE | Kind.CHANNEL:
                out[field.name] = names.get(value.number, f"#{value.number}")
            case Kind.ENUM:
                out[field.name] = value.name
            case Kind.ADDRESS:
                out[field.name] = str(value)
            case _:
                out[field.name] = value
    return {"action": call.action, "args": out}
