"""The custom section `rb.meta`: what a module says about itself, as canonical JSON. Spec: docs/spec/rb1.md.

It names what bytes cannot: parameters, remembered slots, services and channels. The module verifier compares it with
the module; it grants nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pointcall_runbook.binary import ModuleError

ABI: Final = 1
SECTION: Final = "rb.meta"
MAX_META_BYTES: Final = 8 * 1024  # ten times the largest in the library
MAX_PARAMETERS: Final = 32
MAX_SLOTS: Final = 8  # Remember.slot is 0..7
MAX_NAMES: Final = 64
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,62}\Z")
_HEX: Final = re.compile(r"[0-9a-f]{64}\Z")
_INTEGER: Final = re.compile(r"(0|-?[1-9][0-9]{0,18})\Z")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number that the manifest may set within `lo..hi`, both inclusive."""

    name: str
    lo: int
    hi: int
    default: int


@dataclass(frozen=True, slots=True)
class Slot:
    """A remembered number. Its place in `Meta.slots` is its number in `Remember`."""

    name: str
    lo: int
    hi: int
    initial: int


@dataclass(frozen=True, slots=True)
class Meta:
    """The whole section. A module without one has `Meta()`."""

    events: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    slots: tuple[Slot, ...] = ()
    services: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    source_sha256: str | None = None
    compiler: str | None = None
    vocabulary: str | None = None

    def encode(self) -> bytes:
        """The only byte form: sorted keys, no blanks, ASCII, integers as decimal strings."""
        body = {
            "abi": ABI,
            "capabilities": self.capabilities,
            "channels": self.channels,
            "compiler": self.compiler,
            "events": self.events,
            "parameters": [_row(p, "default", p.default) for p in self.parameters],
            "services": self.services,
            "slots": [_row(s, "initial", s.initial) for s in self.slots],
            "source_sha256": self.source_sha256,
            "vocabulary": self.vocabulary,
        }
        return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, raw: bytes) -> Meta:
        """Raises ModuleError for anything but the exact form of `encode`."""
        if len(raw) > MAX_META_BYTES:
            raise _bad(f"at most {MAX_META_BYTES} bytes", f"{len(raw)} bytes")
        try:
            body = json.loads(raw.decode("ascii"))
        except (ValueError, RecursionError):
            raise _bad("ASCII JSON", "something else") from None
        meta = _meta(body)
        names = [p.name for p in meta.parameters] + [s.name for s in meta.slots]
        if len(set(names)) != len(names):
            raise _bad("each parameter and slot under its own name", repr(names))
        if meta.encode() != raw:
            raise _bad("canonical JSON: sorted keys, no blanks", "another spelling")
        return meta


_KEYS: Final = frozenset(json.loads(Meta().encode()))


def _row(value: Parameter | Slot, key: str, number: int) -> dict[str, str]:
    return {"name": value.name, "lo": str(value.lo), "hi": str(value.hi), key: str(number)}


def _bad(want: str, got: str) -> ModuleError:
    return ModuleError("rb.meta is not of its form", id="module.meta", want=want, got=got[:80])


def _meta(body: Any) -> Meta:
    if not isinstance(body, dict) or body.keys() != _KEYS:
        raise _bad("exactly the keys of docs/spec/rb1.md", "other keys")
    if body["abi"] != ABI or isinstance(body["abi"], bool):
        raise _bad(f"abi {ABI}", repr(body["abi"]))
    return Meta(
        _names(body["events"], MAX_NAMES),
        _names(body["capabilities"], MAX_NAMES),
        tuple(Parameter(*_numbers(row, "default")) for row in _list(body["parameters"], MAX_PARAMETERS)),
        tuple(Slot(*_numbers(row, "initial")) for row in _list(body["slots"], MAX_SLOTS)),
        _names(body["services"], MAX_NAMES),
        _names(body["channels"], MAX_NAMES),
        _text(body["source_sha256"], _HEX),
        _text(body["compiler"], _NAME),
        _text(body["vocabulary"], _HEX),
    )


def _list(value: Any, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise _bad(f"a list of at most {most}", repr(value))
    return value


def _names(value: Any, most: int) -> tuple[str, ...]:
    names = tuple(_required(item, _NAME) for item in _list(value, most))
    if list(names) != sorted(set(names)):
        raise _bad("names in order, none twice", repr(names))
    return names


def _required(value: Any, form: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not form.match(value):
        raise _bad(form.pattern, repr(value))
    return value


def _text(value: Any, form: re.Pattern[str]) -> str | None:
    return None if value is None else _required(value, form)


def _numbers(row: Any, key: str) -> tuple[str, int, int, int]:
    """Name, lo, hi and the value under `key` of a parameter or slot."""
    if not isinstance(row, Mapping) or row.keys() != {"name", "lo", "hi", key}:
        raise _bad(f"name, lo, hi and {key}", repr(row))
    lo, hi, value = (int(_required(row[k], _INTEGER)) for k in ("lo", "hi", key))
    if not -(2**63) <= lo <= value <= hi < 2**63:
        raise _bad(f"lo <= {key} <= hi within 64 bits", repr(row))
    return _required(row["name"], _NAME), lo, hi, value
