"""The sensors of one manifest on this kernel: what one life leaves to the next, and what is counted to the end."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pointcall_attest.manifest import Circuit, Listen, Sensor
from pointcall_executor import left
from pointcall_executor.core.breaker import State
from pointcall_executor.core.event import Kind, decode
from pointcall_executor.core.guard import Rules
from pointcall_executor.kernel import isolation
from pointcall_executor.kernel.breaker import BreakerSensor
from pointcall_executor.kernel.cgroup import Cgroup, find_root
from pointcall_executor.kernel.errors import CircuitError, KernelError
from pointcall_executor.kernel.isolation import pinned_isolations
from pointcall_executor.kernel.sensor import COUNTERS
from pointcall_executor.pins import Pins
from pointcall_executor.sensors import KernelSensors
from pointcall_runbook.vocabulary import Address
from tests.kernel.lab import BLOCKED, OK, REFUSED, connect, listen, lo_address, need_blob, outcome, private_network
from tests.unit.services.world import wait_for

pytestmark = pytest.mark.kernel
PORT = 30901
HERE = Address.parse("127.0.0.1")
CONSTANTS = {"threshold": 3, "cooldown_us": 60_000_000, "window_us": 60_000_000, "stuck_ms": 0}


def soon(seconds: float) -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) + int(seconds * 1e9)


class Life:
    """One life of an executor after another: sensors that are made, kept, and left or taken out."""

    def __init__(self, folder: Path, gate: Path) -> None:
        self.pins, self.state, self.gate = Pins(folder, Path("/sys/fs/bpf")), folder, gate
        self.kept: KernelSensors | None = None
        self.made: list[KernelSensors] = []
        self.address = "127.0.0.1"
        self.circuit: Circuit | None = None
        self.protocols = ("tcp",)

    def sensors(self, *names: str, watch_only: bool = False, **constants: int) -> KernelSensors:
        params = {"breaker": CONSTANTS | constants}
        sensors = [Sensor(name=n, blob=f"{n}.blob", params=params.get(n, {})) for n in names]
        places = [Listen(address=self.address, port=PORT, protocol=p, circuit=self.circuit) for p in self.protocols]
        services = [SimpleNamespace(name="api", digest="", listen=places)]
        files = {f"{n}.blob": need_blob(n).encode() for n in names}
        admitted: Any = SimpleNamespace(manifest=SimpleNamespace(sensors=sensors, services=services), files=files)
        made = KernelSensors(admitted, Rules(), self.gate, self.pins, succeed=self._succeed, watch_only=watch_only)
        self.made.append(made)
        return made

    def _succeed(self, kept: KernelSensors | None) -> KernelSensors | None:
        before, self.kept = self.kept, kept
        return before


@pytest.fixture
def life(tmp_path: Path, network: None, group: Cgroup) -> Iterator[Life]:
    if not os.path.ismount("/sys/fs/bpf"):
        pytest.skip("no bpf file system at /sys/fs/bpf")
    life = Life(tmp_path, group.path)
    yield life
    for made in life.made:
        made.leave()
    life.pins.drop()


def breaker_of(sensors: KernelSensors) -> BreakerSensor:
    assert sensors.breaker is not None
    return sensors.breaker


def lose(sensors: KernelSensors, count: int) -> None:
    """As if the ring had been full so often."""
    breaker_of(sensors)._maps["counters"].set(bytes(4), COUNTERS.pack(count, count))


def test_what_is_lost_before_the_links_are_off_can_be_counted_after(life: Life) -> None:
    sensors = life.sensors("breaker")
    sensors.keep()
    sensors.force(HERE, PORT, soon(60))
    assert sensors.lost() == {"breaker": 0}
    lose(sensors, 9)
    with listen(PORT):
        assert connect(PORT) == BLOCKED
        sensors.stop(leave=False)
        assert connect(PORT) == OK  # it sees and refuses nothing any more, so nothing more can be lost
    assert sensors.lost() == {"breaker": 9}
    assert life.pins.lost == 0  # there is no pinned breaker that this could be of
    sensors.leave()
    assert sensors.lost() == {}
    assert not life.pins.found()


def test_what_stays_pinned_is_counted_by_the_next_from_where_the_last_one_looked(life: Life) -> None:
    first = life.sensors("breaker")
    first.keep()
    lose(first, 5)
    first.stop(leave=True)
    assert first.lost() == {"breaker": 5}
    lose(first, 7)  # it goes on, and nobody looks
    first.leave()
    second = life.sensors("breaker")
    life.kept = None
    second.keep()
    assert second.lost() == {"breaker": 2}


def test_what_the_last_one_has_counted_is_not_counted_again_by_one_that_ends_at_once(life: Life) -> None:
    first = life.sensors("breaker")
    first.keep()
    lose(first, 5)
    assert first.lost() == {"breaker": 5}
    second = life.sensors("breaker")
    second.keep()
    first.stop(leave=True)
    first.leave()
    second.stop(leave=False)  # before anybody has asked it
    assert second.lost() == {"breaker": 0}


def test_a_new_breaker_does_not_inherit_what_the_old_one_lost(life: Life) -> None:
    first = life.sensors("breaker")
    first.keep()
    lose(first, 5)
    second = life.sensors("breaker", threshold=4)  # other constants: other programs
    second.keep()
    first.stop(leave=True)
    assert first.lost() == {"breaker": 5}
    first.leave()
    assert life.pins.lost == 0
    assert second.lost() == {"breaker": 0}
    lose(second, 3)
    second.leave()
    life.kept = None
    third = life.sensors("breaker", threshold=4)
    third.keep()
    assert third.lost() == {"breaker": 3}


def test_a_pinned_breaker_that_is_taken_up_again_has_the_values_of_the_new_manifest(life: Life) -> None:
    first = life.sensors("breaker")
    first.keep()
    assert [connect(PORT) for _ in range(2)] == [REFUSED] * 2
    numbers = first.programs()
    first.stop(leave=True)
    first.leave()
    life.kept, life.circuit = None, Circuit(threshold=4, refuse_errno="EHOSTUNREACH")
    second = life.sensors("breaker")
    assert second.programs() == numbers
    second.keep()
    assert [connect(PORT) for _ in range(3)] == [REFUSED] * 2 + ["EHOSTUNREACH"]  # the two from before count
    life.circuit = None
    third = life.sensors("breaker")
    assert third.programs() == numbers
    assert connect(PORT) == "EHOSTUNREACH"  # nothing has changed before it is kept
    third.keep()
    assert connect(PORT) == BLOCKED


def test_a_pinned_breaker_with_circuits_of_one_namespace_is_not_node_wide(life: Life) -> None:
    """Other constants: it is another breaker, which goes on with what is open where the process is the same."""
    life.address = "192.0.2.1"
    lo_address(life.address)
    first = life.sensors("breaker")
    first.keep()
    first.force(Address.parse(life.address), PORT, soon(60))
    second = life.sensors("breaker", node_wide=1)
    assert second.programs() != first.programs()
    second.keep()
    first.stop(leave=True)
    first.leave()
    assert connect(PORT, life.address) == BLOCKED
    assert [each.destination.netns for each in second.states()] == [0]
    second.stop(leave=True)
    second.leave()
    life.kept = None
    third = life.sensors("breaker", node_wide=1)
    third.keep()
    assert connect(PORT, life.address) == BLOCKED
    with private_network():
        lo_address(life.address)
        assert connect(PORT, life.address) == BLOCKED


def no_pin(*_: object) -> None:
    raise KernelError("it could not be pinned", id="kernel.pin")


def no_isolation(patch: pytest.MonkeyPatch) -> None:
    """The second cgroup that is isolated cannot be: when the first one was done."""
    real = isolation._pin
    count = itertools.count()
    patch.setattr(isolation, "_pin", lambda *args: no_pin() if next(count) else real(*args))


def no_breaker(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BreakerSensor, "pin", no_pin)


def no_record(patch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(os, "fsync", full)


@pytest.mark.parametrize("broken", [no_breaker, no_record, no_isolation])
def test_what_cannot_be_pinned_changes_nothing(
    life: Life, group: Cgroup, monkeypatch: pytest.MonkeyPatch, broken: Callable[[pytest.MonkeyPatch], None]
) -> None:
    first = life.sensors("breaker", "isolate")
    first.keep()
    first.force(HERE, PORT, soon(60))
    beside = Cgroup.create("pctest-beside", group.path)
    held = {each.id: soon(60) for each in (group, beside)}
    for cgroup_id, until_ns in held.items():
        first.isolate(cgroup_id, until_ns)
    record = (life.state / "pins.json").read_bytes()
    second = life.sensors("breaker", "isolate", threshold=4)
    with monkeypatch.context() as patch:
        broken(patch)
        with pytest.raises(KernelError) as refused:
            second.keep()
    assert refused.value.id == "kernel.pin"
    second.detach()
    assert life.kept is first
    assert life.pins.found()
    assert (life.state / "pins.json").read_bytes() == record
    first.unwatch(group.id + 1)  # another service moves: who isolates looks what is over
    assert first.isolations() == pinned_isolations(life.pins.isolations) == held
    third = life.sensors("breaker", "isolate", threshold=5)
    third.keep()
    first.unwatch(group.id + 1)
    assert third.isolations() == pinned_isolations(life.pins.isolations) == held
    first.stop(leave=True)
    first.leave()
    with listen(PORT), listen(PORT + 1):
        assert connect(PORT + 1) == BLOCKED  # the isolation went from the first to the third
        for cgroup_id in held:
            third.end_isolation(cgroup_id)
        assert connect(PORT + 1) == OK
        assert connect(PORT) == BLOCKED  # and so did the lease of the circuit
        third.detach()
        assert connect(PORT) == OK
    beside.remove()
    assert not life.pins.found()


def test_what_could_not_be_replaced_is_taken_up_again(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    first = life.sensors("breaker")
    first.keep()
    first.force(HERE, PORT, soon(60))
    numbers = first.programs()
    second = life.sensors("breaker", threshold=4)
    with monkeypatch.context() as patch:
        no_record(patch)
        with pytest.raises(KernelError):
            second.keep()
    second.detach()
    first.stop(leave=True)
    first.leave()
    life.kept = None
    third = life.sensors("breaker")
    assert third.programs() == numbers
    with listen(PORT):
        assert connect(PORT) == BLOCKED


@pytest.mark.parametrize("declared", [True, False])
def test_an_isolation_that_an_earlier_executor_left_is_known_and_can_end(
    life: Life, group: Cgroup, declared: bool
) -> None:
    first = life.sensors("breaker", "isolate")
    first.keep()
    until_ns = soon(60)
    first.isolate(group.id, until_ns)
    first.stop(leave=True)
    first.leave()
    life.kept = None
    with listen(PORT):
        assert connect(PORT) == BLOCKED
        second = life.sensors("breaker", *(["isolate"] if declared else []))
        assert second.isolations() == {group.id: until_ns}
        second.keep()
        assert second.isolations() == {group.id: until_ns}
        assert connect(PORT) == BLOCKED
        if declared:
            second.isolate(group.id, soon(1))  # a longer one stays
            assert second.isolated_until(group.id) == until_ns
            second.end_isolation(group.id)
            assert connect(PORT) == OK
            assert pinned_isolations(life.pins.isolations) == {}
        second.detach()
        assert connect(PORT) == OK


def test_pins_without_a_session_can_be_taken_out(life: Life) -> None:
    first = life.sensors("breaker")
    first.keep()
    first.force(HERE, PORT, soon(60))
    first.leave()
    with listen(PORT):
        assert connect(PORT) == BLOCKED
        assert life.pins.found()
        life.pins.drop()
        deadline = time.monotonic() + 5  # the kernel lets go of what nobody holds a moment later
        while connect(PORT) != OK:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not life.pins.found()


@pytest.mark.parametrize("kept", [False, True])
def test_nothing_is_isolated_any_more_once_it_is_disarmed(life: Life, group: Cgroup, kept: bool) -> None:
    sensors = life.sensors("breaker", "isolate")
    if kept:
        sensors.keep()
    with listen(PORT):
        sensors.isolate(group.id, soon(60))
        sensors.stop(leave=False)
        with pytest.raises(KernelError) as refused:  # an action that began before
            sensors.isolate(group.id, soon(60))
        assert refused.value.id == "executor.disarmed"
        sensors.end_isolation(group.id)
        sensors.leave()
        assert connect(PORT) == OK
    assert pinned_isolations(life.pins.isolations) == {}
    life.pins.drop()
    assert not life.pins.found()


def test_what_is_being_isolated_when_it_is_disarmed_ends_too(
    life: Life, group: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disarming waits for the one that has begun, and then takes it out."""
    sensors = life.sensors("breaker", "isolate")
    sensors.keep()
    real, begun, go_on = isolation._pin, threading.Event(), threading.Event()

    def slow(folder: Path, links: dict[str, int], slot: int) -> None:
        begun.set()
        assert go_on.wait(30)
        real(folder, links, slot)

    monkeypatch.setattr(isolation, "_pin", slow)
    with ThreadPoolExecutor(2) as pool, listen(PORT):
        isolating = pool.submit(sensors.isolate, group.id, soon(60))
        assert begun.wait(30)
        disarming = pool.submit(sensors.detach)
        with pytest.raises(TimeoutError):
            disarming.result(0.2)
        go_on.set()
        isolating.result(30)
        disarming.result(30)
        assert connect(PORT) == OK
    assert not life.pins.found()


# ---- mode monitor ---------------------------------------------------------------------------------------------------


def next_life(life: Life, sensors: KernelSensors) -> None:
    """The process is gone; what it pinned stays."""
    sensors.leave()
    life.kept = None


def test_in_mode_monitor_nothing_is_refused_and_everything_is_counted(life: Life) -> None:
    sensors = life.sensors("breaker", watch_only=True)
    sensors.keep()
    assert [connect(PORT) for _ in range(6)] == [REFUSED] * 6
    (circuit,) = sensors.states()
    assert (circuit.state, circuit.watch_only, circuit.failures, circuit.refused) == (State.OPEN, True, 6, 3)
    assert [decode(record).kind for record in sensors.drain()] == [Kind.CIRCUIT_OPENED]


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("constants", [{}, {"threshold": 4}])
def test_what_refused_before_lets_pass_in_mode_monitor(life: Life, forced: bool, constants: dict[str, int]) -> None:
    first = life.sensors("breaker")
    first.keep()
    if forced:
        first.force(HERE, PORT, soon(60))
    else:
        assert [connect(PORT) for _ in range(4)] == [REFUSED] * 3 + [BLOCKED]
    next_life(life, first)
    second = life.sensors("breaker", watch_only=True, **constants)
    second.keep()
    with listen(PORT):
        wait_for(lambda: connect(PORT) == OK)  # a program goes a moment after its last pin
    (circuit,) = second.states()
    assert (circuit.state, circuit.watch_only, circuit.refused) == (State.CLOSED, True, 0)
    assert [connect(PORT) for _ in range(6)] == [REFUSED] * 6
    next_life(life, second)
    third = life.sensors("breaker", watch_only=True, **constants)  # the same mode: it goes on
    third.keep()
    (circuit,) = third.states()
    assert (circuit.state, circuit.failures) == (State.OPEN, 6)


def test_what_only_watched_refuses_again_in_mode_enforce(life: Life) -> None:
    first = life.sensors("breaker", watch_only=True)
    first.keep()
    assert [connect(PORT) for _ in range(6)] == [REFUSED] * 6
    next_life(life, first)
    second = life.sensors("breaker")
    second.keep()
    (circuit,) = second.states()
    assert (circuit.state, circuit.watch_only) == (State.CLOSED, False)  # what nobody was kept from is not held on
    assert [connect(PORT) for _ in range(5)] == [REFUSED] * 3 + [BLOCKED] * 2


def test_one_that_could_not_be_kept_leaves_the_policy_as_it_was(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    first = life.sensors("breaker")
    first.keep()
    first.force(HERE, PORT, soon(60))
    second = life.sensors("breaker", watch_only=True)
    with monkeypatch.context() as patch:
        no_record(patch)
        with pytest.raises(KernelError):
            second.keep()
    second.detach()
    with listen(PORT):
        assert connect(PORT) == BLOCKED


def test_a_circuit_goes_over_to_another_breaker_under_the_policy_of_the_new_one(life: Life) -> None:
    first = life.sensors("breaker")
    first.keep()
    first.force(HERE, PORT, soon(60))
    second = life.sensors("breaker", threshold=4, watch_only=True)
    second.keep()  # in one process the mode cannot change; whoever calls this gets what was asked for all the same
    first.stop(leave=True)
    first.leave()
    with listen(PORT):
        assert connect(PORT) == OK
    assert [c.watch_only for c in second.states()] == [True]


def test_a_lease_that_was_over_when_its_executor_died_is_not_said_to_refuse(life: Life) -> None:
    first = life.sensors("breaker")
    first.keep()
    until_ns = soon(1)
    first.force(HERE, PORT, until_ns)
    assert [to[1:] for to in left.forced(first)] == [(PORT, until_ns // 1000 * 1000)]
    next_life(life, first)
    assert life.pins.in_force() == {"circuits": [f"tcp://{HERE}:{PORT}"]}
    time.sleep(max(0, until_ns - time.monotonic_ns()) / 1e9 + 0.001)
    assert life.pins.in_force() == {}
    second = life.sensors("breaker")
    second.keep()
    assert [c.state for c in second.states()] == [State.FORCED]  # nobody has connected since
    assert left.forced(second) == []
    with listen(PORT):
        assert connect(PORT) == OK


def test_what_is_pinned_lets_pass_before_anything_is_armed(life: Life, group: Cgroup) -> None:
    first = life.sensors("breaker", "isolate")
    first.keep()
    first.force(HERE, PORT, soon(60))
    first.isolate(group.id, soon(60))
    numbers = breaker_of(first).programs()
    next_life(life, first)
    with listen(PORT):
        assert connect(PORT) == BLOCKED
        there = str(group.path.relative_to(find_root()))
        assert life.pins.in_force() == {"circuits": [f"tcp://{HERE}:{PORT}"], "isolations": [there]}
        life.pins.let_pass()
        life.pins.let_pass()
        assert connect(PORT) == OK
        assert life.pins.in_force() == {}
    assert pinned_isolations(life.pins.isolations) == {}
    second = life.sensors("breaker", "isolate")
    second.keep()
    assert set(numbers) <= set(second.programs())  # it is still the one that was pinned
    assert [c.watch_only for c in second.states()] == [False]


def udp(port: int) -> str:
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        return outcome(lambda: sock.connect(("127.0.0.1", port)))


@pytest.mark.parametrize("protocols", [("tcp", "udp"), ("udp", "tcp")])
def test_who_trips_a_port_trips_it_for_tcp_and_for_udp(life: Life, protocols: tuple[str, str]) -> None:
    """A name server listens on both; a command names an address and a port."""
    life.protocols = protocols
    sensors, until_ns = life.sensors("breaker"), soon(60) // 1000 * 1000
    with listen(PORT):
        sensors.force(HERE, PORT, until_ns)
        assert (connect(PORT), udp(PORT)) == (BLOCKED, BLOCKED)
        assert sensors.forced_until(HERE, PORT) == until_ns
        breaker_of(sensors).close_circuit(next(c.destination for c in sensors.states() if c.destination.protocol == 6))
        assert sensors.forced_until(HERE, PORT) == 0  # not all of it is held
        assert sensors.still_forced(HERE, PORT)  # but some
        sensors.force(HERE, PORT, until_ns)
        sensors.close_circuit(HERE, PORT)
        assert (connect(PORT), udp(PORT)) == (OK, OK)
        assert sensors.forced_until(HERE, PORT) == 0
        assert not sensors.still_forced(HERE, PORT)


def held(sensors: KernelSensors) -> dict[int, object]:
    """The word of each circuit, by its protocol."""
    return {each.destination.protocol: each.word for each in sensors.states()}


def busy(patch: pytest.MonkeyPatch, sensors: KernelSensors) -> None:
    """The second command loses against the other CPUs."""
    breaker, count = breaker_of(sensors), itertools.count()
    real = breaker._command

    def command(*args: Any) -> Any:
        if next(count):
            raise CircuitError("it could not be commanded", id="kernel.circuit.busy")
        return real(*args)

    patch.setattr(breaker, "_command", command)


@pytest.mark.parametrize("before", ["closed", "counted", "open", "forced"])
@pytest.mark.parametrize("protocols", [("tcp", "udp"), ("udp", "tcp")])
def test_a_command_that_cannot_be_given_to_both_changes_neither(
    life: Life, monkeypatch: pytest.MonkeyPatch, protocols: tuple[str, str], before: str
) -> None:
    life.protocols = protocols
    sensors = life.sensors("breaker")
    if before == "forced":
        sensors.force(HERE, PORT, soon(60))
    for _ in range({"counted": 2, "open": 3}.get(before, 0)):
        assert connect(PORT) == REFUSED
    words = held(sensors)
    counters = sorted((each.failures, each.opened) for each in sensors.states())
    commands: list[Callable[[], None]] = [
        lambda: sensors.force(HERE, PORT, soon(30)),
        lambda: sensors.close_circuit(HERE, PORT),
    ]
    for command in commands:
        with monkeypatch.context() as patch:
            busy(patch, sensors)
            with pytest.raises(CircuitError) as refused:
                command()
        assert refused.value.id == "kernel.circuit.busy"
        assert held(sensors) == words
        assert sorted((each.failures, each.opened) for each in sensors.states()) == counters
    assert sensors.still_forced(HERE, PORT) is (before == "forced")
    with listen(PORT):
        assert (connect(PORT) == BLOCKED) is (before in ("open", "forced"))


def test_a_lease_that_is_over_holds_nothing_open(life: Life) -> None:
    """The kernel notices at the next connect: one protocol may have had one, the other not."""
    life.protocols = ("tcp", "udp")
    sensors = life.sensors("breaker")
    sensors.force(HERE, PORT, soon(0.2))
    assert sensors.still_forced(HERE, PORT)
    time.sleep(0.25)
    with listen(PORT):
        assert connect(PORT) == OK
    assert sorted(each.state for each in sensors.states()) == [State.CLOSED, State.FORCED]
    assert not sensors.still_forced(HERE, PORT)
