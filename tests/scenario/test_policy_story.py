"""What a manifest and a node say about single destinations reaches the breaker in the kernel, through the executor."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from pointcall_executor.arming import ArmingError
from pointcall_executor.core.breaker import State
from pointcall_executor.core.event import Destination
from pointcall_executor.kernel.breaker import CircuitState, netns_cookie
from pointcall_executor.kernel.cgroup import Cgroup, find_root
from pointcall_executor.services.managed import ServiceError
from pointcall_runbook.vocabulary import Address
from tests.kernel.lab import (
    BLOCKED,
    LOOPBACK,
    OK,
    REFUSED,
    connects,
    deaf,
    in_namespace,
    listen,
    lo_address,
    private_network,
)
from tests.scenario.test_detectors_story import DEAD_PORT, Story, Tell, proven, tell

__all__ = ["tell"]  # a fixture
pytestmark = pytest.mark.kernel
FAR = "192.0.2.1"  # of no interface but the loopback of the tests' own namespaces
SECOND = 1_000_000_000
OTHER = DEAD_PORT + 1
LONG = {"threshold": 3, "cooldown_us": 60_000_000, "window_us": 60_000_000, "probe_us": 60_000_000}


def breaker(**params: int) -> dict[str, Any]:
    return {"name": "breaker", "params": LONG | params}


def circuits(story: Story) -> Mapping[Destination, CircuitState]:
    assert story.executor.session is not None
    return {state.destination: state for state in story.executor.session.sensors.states()}


def place(port: int, address: str = "127.0.0.1", **circuit: Any) -> dict[str, Any]:
    return {"address": address, "port": port} | ({"circuit": circuit} if circuit else {})


@contextmanager
def elsewhere() -> Iterator[int]:
    """Another network namespace with the same address, like a container's: its descriptor."""
    with private_network():
        lo_address(FAR)
        there = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        yield there
    finally:
        os.close(there)


def test_each_destination_has_its_own_threshold_and_errno(tell: Tell) -> None:
    own = place(OTHER, threshold=2, refuseErrno="EHOSTUNREACH")
    with tell(breaker(), listen=[own]):
        assert connects(4, OTHER) == [REFUSED] * 2 + ["EHOSTUNREACH"] * 2
        assert connects(5, DEAD_PORT) == [REFUSED] * 3 + [BLOCKED] * 2


def test_the_same_for_all_destinations_by_the_sensors_constants(tell: Tell) -> None:
    params = {"threshold": 1, "percent": 50, "min_attempts": 4, "refuse_errno": 113}
    with tell(breaker(**params), listen=[place(OTHER, minAttempts=6)]):
        assert connects(5, DEAD_PORT) == [REFUSED] * 4 + ["EHOSTUNREACH"]
        assert connects(7, OTHER) == [REFUSED] * 6 + ["EHOSTUNREACH"]


def test_an_error_rate_needs_its_volume_and_its_share(tell: Tell) -> None:
    rate = {"threshold": 1, "percent": 50, "minAttempts": 10}
    with tell(breaker(), listen=[place(OTHER, **rate), place(OTHER + 1, **rate)]):
        assert connects(11, OTHER) == [REFUSED] * 10 + [BLOCKED]  # nothing before the tenth result
        with listen(OTHER + 1):
            assert connects(6, OTHER + 1) == [OK] * 6
        assert connects(7, OTHER + 1) == [REFUSED] * 6 + [BLOCKED]  # 5 of 11 are not half of them, 6 of 12 are


def test_connects_that_were_given_up_count_where_the_destination_says_so(tell: Tell) -> None:
    def give_up(port: int) -> None:
        """The listener's backlog is full, so the SYN is dropped; the client does not wait."""
        with socket.socket() as client:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))

    places = [place(OTHER, threshold=1, abandoned=False), place(OTHER + 1, threshold=1)]
    with tell(breaker(), listen=places) as story, listen(OTHER, backlog=0), listen(OTHER + 1, backlog=0):
        for port in (OTHER, OTHER + 1):
            fillers = [socket.socket() for _ in range(3)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            give_up(port)
            for filler in fillers:
                filler.close()
        found = {state.destination.port: state.state for state in circuits(story).values()}
        assert (found[OTHER], found[OTHER + 1]) == (State.CLOSED, State.OPEN)


def test_another_manifest_changes_the_values_and_not_the_state(tell: Tell) -> None:
    with tell(breaker(), listen=[place(OTHER, threshold=9), place(OTHER + 1)]) as story:
        assert connects(4, OTHER) == [REFUSED] * 4
        assert connects(4, OTHER + 1) == [REFUSED] * 3 + [BLOCKED]
        own = place(OTHER, threshold=5, refuseErrno="ECONNREFUSED"), place(OTHER + 1, refuseErrno="ETIMEDOUT")
        story.arm(breaker(), sequence=3, listen=own)
        assert connects(1, OTHER + 1) == ["ETIMEDOUT"]
        assert circuits(story)[Destination(LOOPBACK, OTHER, netns_cookie())].word.count == 4
        assert connects(2, OTHER) == [REFUSED] * 2
        assert circuits(story)[Destination(LOOPBACK, OTHER, netns_cookie())].refused == 1


def test_node_wide_holds_for_clients_in_every_namespace(tell: Tell) -> None:
    with tell(breaker(node_wide=1), listen=[place(OTHER, FAR)]) as story, elsewhere() as there:
        lo_address(FAR)
        wide, executor = Destination(Address.parse(FAR), OTHER, 0), story.executor
        with in_namespace(there):
            assert connects(4, OTHER, FAR) == [REFUSED] * 3 + [BLOCKED]
        assert connects(1, OTHER, FAR) == [BLOCKED]
        assert [d.netns for d in sorted(circuits(story))] == [netns_cookie(), netns_cookie(), 0]
        receipt = story.receipt("CircuitOpened")
        proven(story, receipt, "breaker")
        assert receipt.inputs.fields["service"] == "worker"
        # What people and runbooks address by address and port is the one circuit of all namespaces.
        executor.release(wide.address, OTHER, "by hand")
        assert circuits(story)[wide].state is State.CLOSED
        executor.trip(wide.address, OTHER, 60 * SECOND, "by hand")
        assert executor.session is not None
        assert executor.session.sensors.forced_until(wide.address, OTHER) > 0
        assert connects(1, OTHER, FAR) == [BLOCKED]
        with in_namespace(there):
            assert connects(1, OTHER, FAR) == [BLOCKED]
        executor.release(wide.address, OTHER, "by hand")
        with in_namespace(there), listen(OTHER, FAR):
            assert connects(2, OTHER, FAR) == [OK, OK]


def test_node_wide_never_blocks_a_live_server_on_anothers_loopback(tell: Tell) -> None:
    with tell(breaker(node_wide=1), listen=[place(OTHER, "0.0.0.0")]) as story, elsewhere() as there:
        assert connects(4, DEAD_PORT) == [REFUSED] * 3 + [BLOCKED]
        assert connects(4, OTHER, "0.0.0.0") == [REFUSED] * 3 + [BLOCKED]
        assert {d.netns for d in circuits(story)} == {netns_cookie()}
        story.executor.trip(LOOPBACK, DEAD_PORT, 60 * SECOND, "by hand")
        with in_namespace(there), listen(DEAD_PORT), listen(OTHER):
            assert connects(2, DEAD_PORT) == [OK, OK]
            assert connects(2, DEAD_PORT, "0.0.0.0") == [OK, OK]
            assert connects(2, OTHER) == [OK, OK]


def test_without_node_wide_another_namespace_meets_no_circuit(tell: Tell) -> None:
    with tell(breaker(), listen=[place(OTHER, FAR)]), elsewhere() as there:
        lo_address(FAR)
        assert connects(4, OTHER, FAR) == [REFUSED] * 3 + [BLOCKED]
        with in_namespace(there):
            assert connects(4, OTHER, FAR) == [REFUSED] * 4


def test_what_somebody_holds_open_stays_open_when_it_becomes_node_wide(tell: Tell) -> None:
    places = [place(OTHER, FAR)]
    with tell(breaker(), listen=places) as story, elsewhere() as there:
        story.executor.trip(Address.parse(FAR), OTHER, 60 * SECOND, "by hand")
        for sequence, wide in ((3, 1), (5, 0)):
            story.arm(breaker(node_wide=wide), sequence=sequence, listen=places)
            assert connects(1, OTHER, FAR) == [BLOCKED]
        with in_namespace(there):
            assert connects(1, OTHER, FAR) == [REFUSED]


def test_a_circuit_of_any_address_is_the_services(tell: Tell) -> None:
    """Declared as 0.0.0.0 it is watched as loopback, and still known as the service's, by either name."""
    with tell(breaker(), listen=[place(OTHER, "0.0.0.0")]) as story:
        assert connects(3, OTHER) == [REFUSED] * 3
        assert story.receipt("CircuitOpened").inputs.fields["service"] == "worker"
        for address in ("0.0.0.0", "127.0.0.1"):
            story.executor.trip(Address.parse(address), OTHER, 60 * SECOND, "by hand")
            story.executor.release(Address.parse(address), OTHER, "by hand")


def gate() -> str:
    return f"pctest-gate-{os.getpid()}"


def test_an_allowed_cgroup_is_never_refused_and_is_followed_at_each_arming(tell: Tell) -> None:
    name = f"{gate()}/checker@1.scope"
    checker = Cgroup.create(name)
    with tell(breaker(), node={"allowed_cgroups": (name,)}) as story:
        here = Cgroup(find_root() / gate())
        assert connects(4, DEAD_PORT) == [REFUSED] * 3 + [BLOCKED]
        checker.add(0)
        assert connects(2, DEAD_PORT) == [REFUSED] * 2
        here.add(0)
        old = checker.id
        checker.remove()
        again = Cgroup.create(name)
        assert again.id != old
        again.add(0)
        assert connects(1, DEAD_PORT) == [BLOCKED]  # another cgroup by the same name
        story.arm(breaker(), sequence=3)
        assert connects(2, DEAD_PORT) == [REFUSED] * 2
        here.add(0)
        assert connects(1, DEAD_PORT) == [BLOCKED]


def test_an_allowed_cgroup_that_is_not_there_is_an_error_and_nothing_is_armed(tell: Tell) -> None:
    with pytest.raises(ArmingError) as refused, tell(breaker(), node={"allowed_cgroups": ("no/such.scope",)}):
        pass
    assert refused.value.id == "arm.allowed-cgroup"
    assert "no/such.scope" in refused.value.want
    assert (refused.value.got, refused.value.hint[:9]) == ("No such file or directory", "start wha")


def skipped(story: Story) -> list[dict[str, Any]]:
    what = "destinations without a circuit"
    return [e.body["detail"] for e in story.executor.journal.entries(kind="config") if e.body["what"] == what]


def test_a_resolver_is_not_watched_and_the_log_says_so(tell: Tell) -> None:
    guard = {"neverTouch": [f"127.0.0.1:{OTHER}"]}
    with tell(breaker(), listen=[place(53), place(OTHER)], guard=guard) as story:
        assert connects(5, 53) == [REFUSED] * 5
        assert connects(4, DEAD_PORT) == [REFUSED] * 3 + [BLOCKED]
        assert skipped(story) == [
            {"tcp://127.0.0.1:53": "a resolver of this node", f"tcp://127.0.0.1:{OTHER}": "guard.never_touch"}
        ]
        with pytest.raises(ServiceError) as refused:
            story.executor.trip(LOOPBACK, 53, SECOND, "by hand")
        assert refused.value.id == "circuit.unknown"


def test_a_resolver_is_watched_where_the_settings_say_so(tell: Tell) -> None:
    with tell(breaker(), listen=[place(53)], node={"protect_resolvers": False}) as story:
        assert connects(4, 53) == [REFUSED] * 3 + [BLOCKED]
        assert skipped(story) == []


def test_values_for_a_destination_that_nothing_watches_are_refused(tell: Tell) -> None:
    with pytest.raises(ArmingError) as refused, tell({"name": "lifecycle"}, listen=[place(OTHER, threshold=3)]):
        pass
    assert refused.value.id == "arm.needs"


def test_a_retransmission_storm(tell: Tell) -> None:
    params = {"retransmits_min": 2, "window_ns": 10**10}
    with tell({"name": "transport", "params": params}) as story, listen(DEAD_PORT) as server:
        with socket.create_connection(("127.0.0.1", DEAD_PORT)) as client:
            peer, _ = server.accept()
            deaf(peer)
            client.sendall(b"x")
            proven(story, story.receipt("RetransmitStorm"), "transport")
        peer.close()


def test_a_window_of_pressure_that_the_kernel_refuses_us_is_refused_when_it_is_armed(tell: Tell) -> None:
    with (
        pytest.raises(ArmingError) as refused,
        tell({"name": "pressure", "params": {"cpu_ms": 100, "window_ms": 3000}}),
    ):
        pass
    assert (refused.value.id, refused.value.got) == ("arm.sensor-param", "window_ms=3000")
    assert "a multiple of 2000" in refused.value.want
