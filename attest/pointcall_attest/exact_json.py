"""JSON as people write it, read in one way only: capped, UTF-8, no duplicate keys, no fractions, bounded depth. No I/O.

For files that are not signed by us in canonical form: a trust policy, a service declaration, a Sigstore bundle, a
trusted root. What is signed by us goes through `canonical`, which also demands one byte form. Spec: RFC 8259.
"""

from __future__ import annotations

import json
from typing import Any, Final, NoReturn

from pointcall_attest.errors import MalformedError

MAX_DEPTH: Final = 24  # a Sigstore bundle has 9 levels; the reader itself recurses
_MAX_DIGITS: Final = 20  # an unsigned 64-bit integer


def loads(raw: bytes, *, id: str, max_bytes: int, what: str) -> Any:
    """The value, or MalformedError with the given id; `what` names the document in its message."""
    if len(raw) > max_bytes:
        raise MalformedError(f"{what} is too long", id=id, want=f"at most {max_bytes} bytes", got=f"{len(raw)} bytes")
    if _depth(raw) > MAX_DEPTH:
        raise MalformedError(f"{what} is nested too deeply", id=id, want=f"at most {MAX_DEPTH} levels")
    try:
        return _decoder.decode(raw.decode())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise MalformedError(f"{what} is not JSON", id=id, got=str(error)[:120]) from None


def _depth(raw: bytes) -> int:
    """An upper bound of the nesting: brackets inside strings count too, which only makes it stricter."""
    deepest = depth = 0
    for byte in raw.translate(None, delete=_NO_BRACKETS):
        depth += 1 if byte in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key occurs twice")
    return out


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError("an integer has too many digits")
    return int(text)


def _refused(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is not an integer")


_decoder = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_float=_refused, parse_constant=_refused
)
