"""Canonical JSON against the rfc8785 package, and everything that is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from pointcall_attest import canonical
from pointcall_attest.errors import MalformedError

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-canonical.MAX_INTEGER, canonical.MAX_INTEGER)
    | st.text(st.characters(exclude_categories=("Cs",)))
)
KEYS = st.text(st.characters(max_codepoint=127))
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(KEYS, v, max_size=4), max_leaves=12)


@given(VALUES)
def test_the_form_is_that_of_rfc8785_and_reads_back(value: Any) -> None:
    raw = canonical.dumps(value)
    assert raw == rfc8785.dumps(value)
    assert canonical.loads(raw, max_bytes=len(raw), what="it") == value


@pytest.mark.parametrize(
    "raw",
    [
        b'{"b":1,"a":2}',
        b'{"a": 1}',
        b'{"a":1}\n',
        b'{"a":1,"a":1}',
        b"1.0",
        b"1e3",
        b"NaN",
        b"Infinity",
        b"-0",
        b"01",
        b"9007199254740992",
        b"9" * 5000,
        b'"\\u0041"',
        b'"\\ud800"',
        b'{"\xc3\xa9":1}',
        b"\xff",
        b"",
        b"[" * 100_000,
        b"[" * 30 + b"]" * 30,
    ],
)
def test_any_other_form_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedError) as error:
        canonical.loads(raw, max_bytes=200_000, what="it")
    assert error.value.id == "json.form"


def test_the_cap_comes_before_the_parser() -> None:
    with pytest.raises(MalformedError) as error:
        canonical.loads(b"[" * 101, max_bytes=100, what="it")
    assert error.value.id == "json.size"


@pytest.mark.parametrize("value", [1.5, 2**53, {"é": 1}, {1: 2}, b"x", {"a": {1}}, json])
def test_what_has_no_exact_form_is_not_written(value: object) -> None:
    with pytest.raises(ValueError):
        canonical.dumps(value)
