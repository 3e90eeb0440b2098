"""Canonical JSON (RFC 8785) for what we sign: bytes <-> plain data. One value has exactly one form.

Narrower than the RFC on purpose: no fractions, and integers only where every JSON reader keeps them exact
(below 2**53). Larger numbers travel as decimal strings. Not here: schemas; those are the types of each format.
Spec: RFC 8785, docs/spec/receipt.md.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final, NoReturn

from pointcall_attest.errors import MalformedError

MAX_INTEGER: Final = 2**53 - 1  # the largest n where n and n + 1 are both exact in an IEEE double
MAX_DEPTH: Final = 24  # our deepest document has 7 levels
_MAX_DIGITS: Final = 17  # a sign and the 16 digits of MAX_INTEGER

_encoder = json.JSONEncoder(ensure_ascii=False, check_circular=False, sort_keys=True, separators=(",", ":"))


def dumps(value: Any, *, depth: int = 0) -> bytes:
    """The one form of `value`: dict with str keys, list, str, int, bool or None. `depth`: of the place where the
    caller will put it.

    ValueError for anything else: fractions, large integers, keys that are not ASCII, deep nesting, lone surrogates.
    """
    _check(value, depth)
    return _encoder.encode(value).encode()


def loads(raw: bytes, *, max_bytes: int, what: str) -> Any:
    """The value of exactly canonical bytes. MalformedError names `what`: too long, not JSON, or another form."""
    if len(raw) > max_bytes:
        raise MalformedError(
            f"{what} is too long", id="json.size", want=f"at most {max_bytes} bytes", got=str(len(raw))
        )
    try:
        value = _decoder.decode(raw.decode())
        again = dumps(value)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{what} is not canonical JSON", id="json.form", got=str(error)[:120]) from None
    if again != raw:
        raise MalformedError(
            f"{what} is not canonical JSON", id="json.form", want="the form of RFC 8785", got="another form"
        )
    return value


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical form."""
    return hashlib.sha256(dumps(value)).hexdigest()


def _check(value: Any, depth: int) -> None:
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if kind is int:
        if not -MAX_INTEGER <= value <= MAX_INTEGER:
            raise ValueError("an integer is outside 2**53")
    elif kind is dict:
        for key, item in value.items():
            # RFC 8785 sorts by UTF-16 unit, we by code point: the same for ASCII, and our keys are ASCII
            if type(key) is not str or not key.isascii():
                raise ValueError("a key is not an ASCII string")
            _check(item, depth + 1)
    elif kind is list or kind is tuple:
        for item in value:
            _check(item, depth + 1)
    else:
        raise ValueError(f"{kind.__name__} has no canonical form")


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError("an integer has too many digits")
    return int(text)


def _refused(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is not an integer")


_decoder = json.JSONDecoder(parse_int=_integer, parse_float=_refused, parse_constant=_refused)
