"""The never-touch list reaches the kernel: no circuit is armed where any of its three kinds forbids one."""

from __future__ import annotations

import pytest

from pointcall_executor import sensors
from pointcall_executor.core.event import Destination
from pointcall_executor.core.guard import Rules
from pointcall_runbook.vocabulary import Address, Network

HERE = Destination(Address.parse("10.0.0.7"), 443, 0, 6)


@pytest.mark.parametrize(
    ("rules", "forbidden"),
    [
        (Rules(), False),
        (Rules(never_touch_services=frozenset({7})), True),
        (Rules(never_touch_services=frozenset({8})), False),
        (Rules(never_touch_networks=(Network("10.0.0.0/24"),)), True),
        (Rules(never_touch_networks=(Network("10.0.1.0/24"),)), False),
        (Rules(never_touch_destinations=frozenset({("10.0.0.7", 443)})), True),
        (Rules(never_touch_destinations=frozenset({("10.0.0.7", 444)})), False),
    ],
)
def test_no_circuit_where_the_list_forbids_one(rules: Rules, forbidden: bool) -> None:
    assert sensors._never(HERE, 7, rules) is forbidden
