"""The breaker's behaviour in the running kernel, end to end through real sockets."""

from __future__ import annotations

import errno
import socket
import threading
import time
from pathlib import Path

import pytest

from pointcall_executor.core.breaker import State
from pointcall_executor.core.event import CircuitEvent, Destination, Kind
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.breaker import BreakerSensor, CircuitPolicy
from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.kernel.errors import CircuitError
from pointcall_runbook.vocabulary import Address, Network
from tests.kernel.conftest import SHORT_US, Make
from tests.kernel.lab import (
    BLOCKED,
    LOOPBACK,
    OK,
    REFUSED,
    black_hole,
    connect,
    connects,
    events,
    here,
    kinds,
    listen,
    private_network,
)

pytestmark = pytest.mark.kernel
PORT = 30001
LONG_US = 60_000_000
COOLDOWN_S = SHORT_US / 1e6 + 0.005


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def test_opens_after_the_threshold_and_leaks_no_connect(make: Make) -> None:
    breaker = make()
    breaker.arm(here(PORT))
    assert connects(6, PORT) == [REFUSED] * 3 + [BLOCKED] * 3
    circuit = breaker.circuit(here(PORT))
    assert (circuit.state, circuit.failures, circuit.opened, circuit.refused) == (State.OPEN, 3, 1, 3)
    assert circuit.t_seen_ns <= circuit.t_open_ns <= circuit.t_refused_ns


def test_the_event_says_what_opened_it(make: Make, group: Cgroup) -> None:
    breaker = make()
    breaker.arm(here(PORT))
    before = now_ns()
    connects(3, PORT)
    (event,) = events(breaker)
    assert isinstance(event, CircuitEvent)
    assert (event.kind, event.destination) == (Kind.CIRCUIT_OPENED, here(PORT))
    assert (event.failures, event.error, event.cgroup) == (3, errno.ECONNREFUSED, group.id)
    assert before < event.at_ns < now_ns()


def test_a_destination_that_is_not_armed_is_never_touched(make: Make) -> None:
    breaker = make()
    breaker.arm(here(PORT))
    assert connects(8, PORT + 1) == [REFUSED] * 8
    assert events(breaker) == []


def test_a_success_between_failures_keeps_it_closed(make: Make) -> None:
    breaker = make()
    breaker.arm(here(PORT))
    for _ in range(4):
        assert connects(2, PORT) == [REFUSED] * 2
        with listen(PORT):
            assert connect(PORT) == OK
    assert breaker.circuit(here(PORT)).state is State.CLOSED


def test_failures_outside_the_window_do_not_add_up(make: Make) -> None:
    breaker = make(window_us=20_000)
    breaker.arm(here(PORT))
    for _ in range(3):
        assert connects(2, PORT) == [REFUSED] * 2
        time.sleep(0.025)
    assert breaker.circuit(here(PORT)).state is State.CLOSED


def test_half_open_a_failing_probe_reopens(make: Make) -> None:
    breaker = make(cooldown_us=SHORT_US)
    breaker.arm(here(PORT))
    connects(3, PORT)
    time.sleep(COOLDOWN_S)
    assert connects(3, PORT) == [REFUSED, BLOCKED, BLOCKED]
    assert kinds(breaker) == ["CIRCUIT_OPENED", "CIRCUIT_HALF_OPEN", "CIRCUIT_REOPENED"]


def test_half_open_a_good_probe_closes(make: Make) -> None:
    breaker = make(cooldown_us=SHORT_US)
    breaker.arm(here(PORT))
    connects(3, PORT)
    with listen(PORT):
        assert connect(PORT) == BLOCKED
        time.sleep(COOLDOWN_S)
        assert connects(3, PORT) == [OK] * 3
    assert kinds(breaker) == ["CIRCUIT_OPENED", "CIRCUIT_HALF_OPEN", "CIRCUIT_CLOSED"]
    assert breaker.circuit(here(PORT)).closed == 1


def test_open_time_doubles_with_each_failed_probe_up_to_its_limit(make: Make) -> None:
    breaker = make(cooldown_us=10_000, cooldown_max_us=40_000)
    breaker.arm(here(PORT))
    connects(3, PORT)
    waits = []
    for _ in range(4):
        opened = breaker.circuit(here(PORT)).word.time_us
        while connect(PORT) == BLOCKED:
            time.sleep(0.0005)
        probe = next(e for e in events(breaker) if e.kind is Kind.CIRCUIT_HALF_OPEN)
        waits.append(probe.at_ns // 1000 - opened)
    assert all(waited >= due for waited, due in zip(waits, (10_000, 20_000, 40_000, 40_000), strict=True))


@pytest.mark.parametrize("budget", [1, 3, 8])
def test_half_open_lets_exactly_the_probe_budget_through(make: Make, budget: int) -> None:
    breaker = make(probe_budget=budget, cooldown_us=200_000)
    breaker.arm(here(PORT))
    connects(3, PORT)
    barrier, answers = threading.Barrier(64), []

    def client() -> None:
        with socket.socket() as sock:
            sock.setblocking(False)
            barrier.wait()
            answers.append(errno.errorcode[sock.connect_ex(("127.0.0.1", PORT))])
            barrier.wait()

    threads = [threading.Thread(target=client) for _ in range(64)]
    with black_hole(PORT):
        time.sleep(0.205)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (answers.count("EINPROGRESS"), answers.count(BLOCKED)) == (budget, 64 - budget)


def test_a_silent_probe_is_taken_for_lost(make: Make) -> None:
    breaker = make(probe_us=30_000, count_abandoned=0)
    breaker.arm(here(PORT))
    connects(3, PORT)
    breaker.make_probe_ready(here(PORT))
    with black_hole(PORT), socket.socket() as probe:
        probe.setblocking(False)
        assert probe.connect_ex(("127.0.0.1", PORT)) == errno.EINPROGRESS
        assert connect(PORT) == BLOCKED
        time.sleep(0.035)
        with socket.socket() as second:
            second.setblocking(False)
            assert second.connect_ex(("127.0.0.1", PORT)) == errno.EINPROGRESS
    assert breaker.circuit(here(PORT)).probes == 2


def test_force_refuses_until_it_expires_and_then_counts_again(make: Make) -> None:
    breaker = make()
    breaker.arm(here(PORT))
    with listen(PORT):
        breaker.force(here(PORT), now_ns() + 40_000_000)
        assert connects(2, PORT) == [BLOCKED] * 2
        time.sleep(0.045)
        assert connect(PORT) == OK
    assert kinds(breaker) == ["CIRCUIT_EXPIRED"]
    assert connects(5, PORT) == [REFUSED] * 3 + [BLOCKED] * 2


def test_commands_keep_the_counters(make: Make) -> None:
    breaker = make()
    breaker.arm(here(PORT))
    connects(5, PORT)
    assert breaker.force(here(PORT), now_ns() + 10**9).state is State.OPEN
    assert breaker.close_circuit(here(PORT)).state is State.FORCED
    circuit = breaker.circuit(here(PORT))
    assert (circuit.state, circuit.failures, circuit.refused) == (State.CLOSED, 3, 2)


def test_make_probe_ready_ends_the_cool_down(make: Make) -> None:
    breaker = make()
    breaker.arm(here(PORT))
    connects(3, PORT)
    with listen(PORT):
        assert connect(PORT) == BLOCKED
        assert breaker.make_probe_ready(here(PORT)).state is State.OPEN
        assert connects(2, PORT) == [OK] * 2
    assert breaker.make_probe_ready(here(PORT)).state is State.CLOSED
    assert breaker.circuit(here(PORT)).state is State.CLOSED


def test_make_probe_ready_ends_nothing_that_somebody_holds_open(make: Make) -> None:
    breaker = make()
    breaker.arm(here(PORT))
    until_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + 60_000_000_000
    breaker.force(here(PORT), until_ns)
    with listen(PORT):
        assert breaker.make_probe_ready(here(PORT)).state is State.FORCED
        assert connect(PORT) == BLOCKED
        assert breaker.circuit(here(PORT)).word.time_us == until_ns // 1000
        breaker.close_circuit(here(PORT))
        assert connect(PORT) == OK


def test_close_circuit_lets_everything_through_at_once(make: Make) -> None:
    breaker = make()
    breaker.arm(here(PORT))
    connects(3, PORT)
    breaker.close_circuit(here(PORT))
    with listen(PORT):
        assert connect(PORT) == OK


def test_error_rate_mode_needs_volume_and_share(make: Make) -> None:
    breaker = make(threshold=2, percent=50, min_attempts=6)
    breaker.arm(here(PORT))
    with listen(PORT):
        assert connects(3, PORT) == [OK] * 3
    assert connects(4, PORT) == [REFUSED] * 3 + [BLOCKED]  # 3 of 6
    assert breaker.circuit(here(PORT)).state is State.OPEN


def test_error_rate_mode_tolerates_a_small_share(make: Make) -> None:
    breaker = make(threshold=2, percent=50, min_attempts=6)
    breaker.arm(here(PORT))
    for _ in range(3):
        with listen(PORT):
            assert connects(3, PORT) == [OK] * 3
        assert connects(2, PORT) == [REFUSED] * 2  # 2 of 5, 4 of 10, 6 of 15
    assert breaker.circuit(here(PORT)).state is State.CLOSED


def test_a_destination_may_have_its_own_values(make: Make) -> None:
    breaker = make(cooldown_us=1)
    breaker.arm(here(PORT), CircuitPolicy(threshold=1, refuse_errno=errno.ECONNREFUSED, cooldown_ms=60_000))
    breaker.arm(here(PORT + 1))
    assert connects(3, PORT) == [REFUSED] * 3
    assert breaker.circuit(here(PORT)).refused == 2
    assert connects(4, PORT + 1) == [REFUSED] * 4  # its open time is over at once: the fourth is a probe
    assert breaker.circuit(here(PORT + 1)).probes == 1


@pytest.mark.parametrize("name", ["EHOSTUNREACH", "ECONNREFUSED", "ETIMEDOUT"])
def test_the_application_sees_the_chosen_errno(make: Make, name: str) -> None:
    breaker = make(refuse_errno=getattr(errno, name))
    breaker.arm(here(PORT))
    with listen(PORT):
        breaker.force(here(PORT), now_ns() + 10**9)
        assert connect(PORT) == name


def test_monitor_mode_reports_and_refuses_nothing(make: Make) -> None:
    breaker = make()
    breaker.arm(here(PORT), CircuitPolicy(watch_only=True))
    assert connects(5, PORT) == [REFUSED] * 5
    circuit = breaker.circuit(here(PORT))
    assert (circuit.state, circuit.refused) == (State.OPEN, 2)
    assert kinds(breaker) == ["CIRCUIT_OPENED"]


def test_another_policy_takes_effect_at_once_and_the_state_goes_on(make: Make) -> None:
    breaker = make()
    breaker.arm(here(PORT))
    assert connects(2, PORT) == [REFUSED] * 2
    breaker.set_policy(here(PORT), CircuitPolicy(threshold=4))
    assert breaker.circuit(here(PORT)).failures == 2
    assert connects(3, PORT) == [REFUSED] * 2 + [BLOCKED]
    before = breaker.circuit(here(PORT))
    breaker.set_policy(here(PORT), CircuitPolicy(threshold=4))
    assert breaker.circuit(here(PORT)) == before
    with pytest.raises(CircuitError) as refused:
        breaker.set_policy(here(PORT + 1), CircuitPolicy())
    assert refused.value.id == "kernel.circuit.absent"


@pytest.mark.parametrize("watch_only", [True, False])
def test_a_circuit_begins_anew_where_watching_becomes_refusing_or_the_other_way(make: Make, watch_only: bool) -> None:
    breaker = make()
    breaker.arm(here(PORT), CircuitPolicy(watch_only=not watch_only))
    breaker.force(here(PORT), now_ns() + 10**10)
    breaker.set_policy(here(PORT), CircuitPolicy(watch_only=watch_only))
    circuit = breaker.circuit(here(PORT))
    assert (circuit.state, circuit.watch_only) == (State.CLOSED, watch_only)
    assert connects(6, PORT)[-1] == (REFUSED if watch_only else BLOCKED)


def test_an_allowed_cgroup_is_never_refused(make: Make, group: Cgroup) -> None:
    breaker = make()
    breaker.arm(here(PORT))
    breaker.allow(group.id)
    assert connects(5, PORT) == [REFUSED] * 5
    breaker.disallow(group.id)
    assert connect(PORT) == BLOCKED


def test_never_touch_refuses_to_arm(breaker_blob: Blob, group: Cgroup) -> None:
    never = (Network("127.0.0.53/32"), Network("10.0.0.0/8"), Network("::1/128"))
    with BreakerSensor(breaker_blob, cgroup=group.path, never_touch=never) as breaker:
        for text in ("127.0.0.53", "10.1.2.3", "::1", "::"):
            with pytest.raises(CircuitError) as refused:
                breaker.arm(here(53, Address.parse(text)))
            assert refused.value.id == "kernel.circuit.never_touch"
        breaker.arm(here(53))
        assert [c.destination for c in breaker.circuits()] == [here(53)]


def test_a_full_table_refuses_and_evicts_nothing(breaker_blob: Blob, group: Cgroup) -> None:
    with BreakerSensor(breaker_blob, cgroup=group.path) as breaker:
        for port in range(4096):
            breaker.arm(here(port))
        with pytest.raises(CircuitError) as refused:
            breaker.arm(here(5000))
        assert refused.value.id == "kernel.circuit.full"
        assert sum(1 for _ in breaker.circuits()) == 4096


def test_disarmed_means_ungated(make: Make) -> None:
    breaker = make()
    breaker.arm(here(PORT))
    assert connects(4, PORT)[-1] == BLOCKED
    breaker.disarm(here(PORT))
    breaker.disarm(here(PORT))
    assert connects(5, PORT) == [REFUSED] * 5


def test_arming_twice_keeps_the_circuit(make: Make) -> None:
    breaker = make()
    breaker.arm(here(PORT))
    connects(3, PORT)
    breaker.arm(here(PORT))
    assert breaker.circuit(here(PORT)).state is State.OPEN


def test_detach_opens_the_gate_and_attach_closes_it(make: Make) -> None:
    breaker = make()
    breaker.arm(here(PORT))
    connects(3, PORT)
    breaker.detach()
    assert connect(PORT) == REFUSED
    breaker.attach()
    breaker.attach()
    assert connect(PORT) == BLOCKED
    breaker.close()
    breaker.close()
    assert connects(5, PORT) == [REFUSED] * 5


def test_commands_need_an_armed_destination(make: Make) -> None:
    breaker = make()
    for command in (breaker.make_probe_ready, breaker.close_circuit, breaker.circuit):
        with pytest.raises(CircuitError) as refused:
            command(here(PORT))
        assert refused.value.id == "kernel.circuit.absent"


@pytest.mark.parametrize("left_ns", [-1, 0, 3_600_000_000_001 + 10**9])
def test_a_forced_circuit_always_ends_within_the_hour(make: Make, left_ns: int) -> None:
    breaker = make()
    breaker.arm(here(PORT))
    with pytest.raises(CircuitError) as refused:
        breaker.force(here(PORT), now_ns() + left_ns)
    assert refused.value.id == "kernel.circuit.lease"


@pytest.mark.parametrize(
    ("name", "value"), [("threshold", 0), ("threshold", 16384), ("probe_budget", 9), ("percent", 101), ("window_us", 0)]
)
def test_a_constant_out_of_range_is_refused(breaker_blob: Blob, group: Cgroup, name: str, value: int) -> None:
    with pytest.raises(CircuitError) as refused:
        BreakerSensor(breaker_blob, cgroup=group.path, constants={name: value})
    assert refused.value.id == "kernel.circuit.constant"


def test_a_connect_without_a_free_local_port_does_not_count(make: Make) -> None:
    breaker = make()
    breaker.arm(here(PORT))
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40000")
    with listen(PORT), socket.socket() as holder:
        holder.connect(("127.0.0.1", PORT))
        assert connects(5, PORT) == ["EADDRNOTAVAIL"] * 5
    circuit = breaker.circuit(here(PORT))
    assert (circuit.state, circuit.failures, circuit.ignored) == (State.CLOSED, 0, 5)


def test_node_wide_circuit_covers_every_namespace(make: Make) -> None:
    breaker = make(node_wide=1)
    node_wide = here(PORT).__class__(LOOPBACK, PORT)
    breaker.arm(node_wide)
    assert connects(4, PORT) == [REFUSED] * 3 + [BLOCKED]
    assert breaker.circuit(node_wide).state is State.OPEN


def test_a_live_server_on_the_loopback_of_another_namespace_is_never_blocked(make: Make) -> None:
    """Node-wide is what is armed with netns 0; loopback is armed in one namespace."""
    breaker = make(node_wide=1, cooldown_us=LONG_US)
    breaker.arm(here(PORT))
    assert connects(4, PORT) == [REFUSED] * 3 + [BLOCKED]
    with private_network(), listen(PORT):
        assert connects(2, PORT) == [OK, OK]
        assert connects(1, PORT, "0.0.0.0") == [OK]


def test_a_circuit_of_ones_own_namespace_wins_over_the_node_wide_one(make: Make) -> None:
    breaker = make(node_wide=1, cooldown_us=LONG_US)
    wide = Destination(LOOPBACK, PORT)
    breaker.arm(wide)
    breaker.arm(here(PORT))
    assert connects(4, PORT) == [REFUSED] * 3 + [BLOCKED]
    assert [breaker.circuit(d).state for d in (here(PORT), wide)] == [State.OPEN, State.CLOSED]


def test_another_policy_leaves_state_and_counters(make: Make) -> None:
    breaker = make(cooldown_us=LONG_US)
    breaker.arm(here(PORT), CircuitPolicy(threshold=9))
    assert connects(4, PORT) == [REFUSED] * 4
    breaker.set_policy(here(PORT), CircuitPolicy(threshold=5, refuse_errno=errno.EHOSTUNREACH))
    assert breaker.circuit(here(PORT)).word.count == 4
    assert connects(2, PORT) == [REFUSED, "EHOSTUNREACH"]
    breaker.set_policy(here(PORT), CircuitPolicy())
    assert (breaker.circuit(here(PORT)).state, breaker.circuit(here(PORT)).failures) == (State.OPEN, 5)
    with pytest.raises(CircuitError) as refused:
        breaker.set_policy(here(PORT + 1), CircuitPolicy())
    assert refused.value.id == "kernel.circuit.absent"


@pytest.mark.parametrize(("old", "new"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_what_takes_over_has_its_own_policies(make: Make, old: int, new: int) -> None:
    """And goes on with a circuit that was of one namespace and is node-wide now, or the other way round."""
    places = [Destination(LOOPBACK, PORT, 0 if wide else here(PORT).netns) for wide in (old, new)]
    before, after = make(node_wide=old, cooldown_us=LONG_US), make(node_wide=new, cooldown_us=LONG_US)
    before.arm(places[0], CircuitPolicy(threshold=2))
    assert connects(3, PORT) == [REFUSED] * 2 + [BLOCKED]
    after.arm(places[1], CircuitPolicy(refuse_errno=errno.ECONNREFUSED))
    after.take_over(before)
    before.detach()
    assert after.circuit(places[1]).state is State.OPEN
    assert after.circuit(places[1]).opened == 1
    assert connects(1, PORT) == [REFUSED]
    after.close_circuit(places[1])
    assert connects(3, PORT) == [REFUSED] * 3
    assert after.circuit(places[1]).state is State.OPEN  # its threshold is the constant, 3


def test_only_these_cgroups_are_allowed(make: Make, group: Cgroup) -> None:
    breaker = make(cooldown_us=LONG_US)
    breaker.arm(here(PORT))
    breaker.allow(999_999)
    breaker.allow_only({group.id, 1})
    assert sorted(int.from_bytes(key, "little") for key, _ in breaker._maps["allowed"].items()) == [1, group.id]
    assert connects(5, PORT) == [REFUSED] * 5
    breaker.allow_only(())
    assert connects(1, PORT) == [BLOCKED]


@pytest.mark.parametrize("budget", [1, 8])
def test_sixty_four_clients_at_half_open_get_exactly_the_budget(make: Make, group: Cgroup, budget: int) -> None:
    breaker = make(threshold=1, cooldown_us=SHORT_US, probe_budget=budget)
    breaker.arm(here(PORT))
    connect(PORT)
    assert breaker.circuit(here(PORT)).state is State.OPEN
    time.sleep(2 * SHORT_US / 1e6)
    barrier = threading.Barrier(64)
    answers: list[str] = []

    def client() -> None:
        barrier.wait()
        answers.append(connect(PORT))

    clients = [threading.Thread(target=client) for _ in range(64)]
    with black_hole(PORT):  # a probe that stays without an answer: the others meet it half-open
        for thread in clients:
            thread.start()
        deadline = time.monotonic() + 20
        while len(answers) < 64 - budget:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert answers.count(BLOCKED) == 64 - budget
        assert breaker.circuit(here(PORT)).probes == budget
    for thread in clients:
        thread.join()
