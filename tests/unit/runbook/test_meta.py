"""The metadata section: one spelling, strict, and only ModuleError for anything else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointcall_runbook import ModuleError, Parameter, Slot
from pointcall_runbook.meta import MAX_META_BYTES, MAX_PARAMETERS, MAX_SLOTS, Meta

FULL = Meta(
    ("OomKilled", "Timer"),
    ("again", "recreate"),
    (Parameter("MAX", -3, 9, 0),),
    (Slot("TRIES", 0, 2**63 - 1, 1),),
    ("api", "db-1"),
    ("ops",),
    "0" * 64,
    "pointcall-0.1.0",
    "f" * 64,
)


@pytest.mark.parametrize("meta", [Meta(), FULL])
def test_what_was_written_is_read(meta: Meta) -> None:
    assert Meta.parse(meta.encode()) == meta


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    body = json.loads(FULL.encode())
    change(body)
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(abi=2),
        lambda m: m.update(abi=True),
        lambda m: m.update(abi="1"),
        lambda m: m.pop("services"),
        lambda m: m.update(more=1),
        lambda m: m.update(events=["Timer", "OomKilled"]),
        lambda m: m.update(events=["Timer", "Timer"]),
        lambda m: m.update(services=[1]),
        lambda m: m.update(services=["-api"]),
        lambda m: m.update(services=["api\n"]),
        lambda m: m.update(services="api"),
        lambda m: m.update(source_sha256="0" * 63),
        lambda m: m.update(source_sha256="A" * 64),
        lambda m: m.update(compiler=""),
        lambda m: m["parameters"][0].update(lo=0),
        lambda m: m["parameters"][0].update(lo="01"),
        lambda m: m["parameters"][0].update(lo="-0"),
        lambda m: m["parameters"][0].update(default="10"),
        lambda m: m["parameters"][0].update(hi=str(2**63)),
        lambda m: m["parameters"][0].update(name="1MAX"),
        lambda m: m["parameters"][0].update(more="1"),
        lambda m: m["parameters"][0].pop("hi"),
        lambda m: m.update(parameters=m["parameters"] * (MAX_PARAMETERS + 1)),
        lambda m: m.update(slots=m["slots"] * (MAX_SLOTS + 1)),
        lambda m: m.update(slots=[[]]),
        lambda m: m.update(parameters=m["parameters"] * 2),
        lambda m: m["slots"][0].update(name="MAX"),
        lambda m: m["slots"][0].update(initial=str(-1)),
    ],
)
def test_one_wrong_value_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    refused(changed(change))


def refused(raw: bytes) -> None:
    with pytest.raises(ModuleError) as caught:
        Meta.parse(raw)
    assert caught.value.id == "module.meta"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"{" * 4000,
        b"[" * 4000,
        FULL.encode() + b" ",
        FULL.encode().replace(b":", b": ", 1),
        FULL.encode().replace(b"ops", b"\\u006fps"),
        FULL.encode().replace(b"ops", "öps".encode()),
        FULL.encode().replace(b'{"abi":1', b'{"abi":1,"abi":1'),
        b" " * (MAX_META_BYTES + 1),
    ],
)
def test_another_spelling_is_refused(raw: bytes) -> None:
    refused(raw)


@given(
    st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(repr).map(str.encode)
)
def test_any_bytes_are_refused_quietly(raw: bytes) -> None:
    refused(raw)


@given(st.data())
def test_one_changed_byte_is_refused_or_still_canonical(data: st.DataObject) -> None:
    raw = bytearray(FULL.encode())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ModuleError):
        assert Meta.parse(bytes(raw)).encode() == raw
