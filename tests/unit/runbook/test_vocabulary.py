"""The vocabulary: values to i64 and back, ranges, names and the digest that manifests state."""

from __future__ import annotations

import dataclasses
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointcall_runbook import vocabulary as v
from tests.fuzz.runbook.values import typed

EVERYTHING: tuple[type[v.Event] | type[v.Action], ...] = (*v.EVENTS.values(), *v.ACTIONS.values())


@given(st.sampled_from(EVERYTHING).flatmap(typed))
def test_a_value_survives_the_way_through_i64(value: v.Event | v.Action) -> None:
    raw = v.slots(value)
    assert len(raw) == v.arity(type(value))
    assert all(-(2**63) <= n < 2**63 for n in raw)
    assert v.from_slots(type(value), raw) == value


@pytest.mark.parametrize("cls", EVERYTHING, ids=lambda cls: cls.__name__)
def test_each_field_refuses_the_number_next_to_its_range(cls: type[v.Event]) -> None:
    lowest = [n for f in v.fields(cls) for n in ([0, 0] if f.kind is v.Kind.ADDRESS else [f.lo])]
    at = 0
    for field in v.fields(cls):
        if field.kind is not v.Kind.ADDRESS:
            for beyond in (field.lo - 1, field.hi + 1):
                wrong = (*lowest[:at], beyond, *lowest[at + 1 :])
                with pytest.raises(ValueError, match=rf"\b{field.name}\b"):
                    v.from_slots(cls, wrong)
        at += field.kind.slots


@pytest.mark.parametrize("cls", EVERYTHING, ids=lambda cls: cls.__name__)
def test_a_value_has_exactly_its_number_of_slots(cls: type[v.Event]) -> None:
    for count in (0, v.arity(cls) - 1, v.arity(cls) + 1):
        with pytest.raises(ValueError, match="takes"):
            v.from_slots(cls, (1,) * count)


def test_slots_refuses_what_the_abi_has_no_room_for() -> None:
    with pytest.raises(ValueError, match="grace"):
        v.slots(v.Recreate(v.service("api"), grace=-1))
    with pytest.raises(ValueError, match="hold"):
        v.slots(v.Isolate(v.service("api"), hold=v.HOUR_NS + 1))


@given(st.ip_addresses())
def test_an_address_keeps_its_meaning(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    ours = v.Address.parse(str(address))
    mapped = getattr(address, "ipv4_mapped", None)
    assert str(ours) == str(mapped or address)
    assert v.Address.from_bytes(ours.packed) == ours


@given(st.ip_addresses(v=4), st.integers(0, 32))
def test_membership_agrees_with_the_standard_library(address: ipaddress.IPv4Address, prefix: int) -> None:
    net = ipaddress.ip_network(f"10.20.30.40/{prefix}", strict=False)
    assert (v.Address.parse(str(address)) in v.Network(str(net))) == (address in net)


@given(st.ip_addresses(v=6), st.integers(0, 128))
def test_membership_agrees_for_ipv6(address: ipaddress.IPv6Address, prefix: int) -> None:
    net = ipaddress.ip_network(f"2001:db8:1:2:3:4:5:6/{prefix}", strict=False)
    assert (v.Address.parse(str(address)) in v.Network(str(net))) == (address in net)


@pytest.mark.parametrize("text", ["", "10.0.0.1/8", "10.0.0.0/33", "x", "::/129"])
def test_nonsense_is_no_network(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        v.Network(text)


def test_the_order_of_action_kinds_is_that_of_the_actions() -> None:
    assert [k.name.lower() for k in v.ActionKind] == list(v.ACTIONS)


def test_every_event_tells_when_and_the_schema_has_them_all() -> None:
    assert all(v.fields(cls)[0].name == "at" for cls in v.EVENTS.values())
    schema = v.schema()
    assert set(schema["events"]) == set(v.EVENTS)
    assert set(schema["actions"]) == set(v.ACTIONS)


def test_the_digest_changes_only_on_purpose() -> None:
    """It is in every module and manifest: a change is a new version of the ABI, and this line changes with it."""
    assert v.digest() == "42f57fe8ebc7e47043500a4c7ebc8bb06f99ba8f517e7f75b47ccfb5c1fe2249"


def test_numbers_of_services_come_from_their_names_alone() -> None:
    assert v.service("api") == v.service("api") != v.service("API")
    assert v.service("ops").number != v.channel("ops").number
    assert v.service("api").number == 1700767401
    with pytest.raises(ValueError, match="has a name"):
        v.service("")


@given(st.sampled_from(list(v.ACTIONS.values())).flatmap(typed))
def test_a_call_is_typed_again(action: v.Action) -> None:
    call = v.Call.of(action)
    assert call.typed() == action
    assert dataclasses.replace(call, action=call.action).typed() == action


@pytest.mark.parametrize(
    "call",
    [v.Call("reboot", ()), v.Call("recreate", ()), v.Call("recreate", (1, -1)), v.Call("kill", (1, 65))],
)
def test_a_call_outside_the_vocabulary_is_refused(call: v.Call) -> None:
    with pytest.raises(ValueError, match=r"."):
        call.typed()
