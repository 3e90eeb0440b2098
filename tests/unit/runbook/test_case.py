"""Cases: what an author writes becomes exactly the arguments and calls of the ABI; anything else is refused."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointcall_runbook import compile_source
from pointcall_runbook.case import MAX_CASES_BYTES, CaseError, parse_cases, readable
from pointcall_runbook.vocabulary import Address, Call, CircuitOpened, channel, service, slots

SOURCE = """from pointcall_runbook import CircuitOpened, Decision, Level, Notify, channel
from pointcall_runbook import parameter, remembered, runbook
OPS = channel("ops")
MAX = parameter(3, lo=0, hi=10)
KEPT = remembered(0, hi=5)
@runbook
def opened(e: CircuitOpened) -> Decision:
    return [Notify(channel=OPS, level=Level.INFO, code=min(e.restarts, MAX + KEPT))]
"""
INFO = compile_source(SOURCE).info
CALL = {"action": "notify", "args": {"channel": "ops", "level": "INFO", "code": 1}}
GOOD: dict[str, Any] = {
    "name": "one",
    "event": "CircuitOpened",
    "fields": {"address": "2001:db8::1", "port": 80, "reopened": True, "service": "api"},
    "parameters": {"MAX": 4},
    "remembered": {"KEPT": 2},
    "calls": [CALL],
}


def parsed(row: Any) -> Any:
    return parse_cases(json.dumps(row).encode(), INFO)


def test_a_case_becomes_arguments_and_calls() -> None:
    (case,) = parsed(GOOD)
    event = CircuitOpened(0, Address.parse("2001:db8::1"), 80, 0, True, 0, service("api"), 0)
    assert case.args == (*slots(event), 4, 2)
    assert case.calls == (Call("notify", (channel("ops").number, 1, 1)),)
    assert readable(case.calls[0], {channel("ops").number: "ops"}) == CALL


def test_what_is_left_out_has_a_default() -> None:
    (case,) = parsed([{"name": "two", "event": "CircuitOpened", "calls": []}])
    event = CircuitOpened(0, Address.parse("127.0.0.1"), 0, 0, False, 0, service("x"), 0)
    assert case.args[:7] == slots(event)[:7]
    assert case.args[7:] == (0, 0, 3, 0)


@pytest.mark.parametrize(
    "over",
    [
        {"event": "OomKilled"},
        {"event": 3},
        {"fields": []},
        {"fields": {"prt": 80}},
        {"fields": {"port": 65536}},
        {"fields": {"port": "80"}},
        {"fields": {"port": 1.0}},
        {"fields": {"address": "10.0.0"}},
        {"parameters": {"MIN": 1}},
        {"parameters": {"MAX": 11}},
        {"parameters": {"MAX": True}},
        {"remembered": {"KEPT": -1}},
        {"calls": {}},
        {"calls": [{"action": "shell"}]},
        {"calls": [{"action": "notify", "args": {"level": "LOUD"}}]},
        {"calls": [{"action": "notify", "extra": 1}]},
        {"comment": "unknown key"},
    ],
)
def test_one_wrong_part_is_refused(over: dict[str, Any]) -> None:
    with pytest.raises(CaseError):
        parsed(GOOD | over)


@pytest.mark.parametrize("raw", [b"", b"{", b"[" * 100_000, b"\xff", b"[1]", b"{}", b" " * (MAX_CASES_BYTES + 1)])
def test_a_file_that_is_none_is_refused(raw: bytes) -> None:
    with pytest.raises(CaseError):
        parse_cases(raw, INFO)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_json_gives_cases_or_a_case_error(body: Any) -> None:
    with contextlib.suppress(CaseError):
        parsed(GOOD | {"fields": body})
