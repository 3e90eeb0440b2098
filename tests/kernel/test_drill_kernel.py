"""Drill faults: what is injected is what was drawn from the seed, and it ends by itself."""

from __future__ import annotations

import errno
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.kernel.drill import DrillInjector, Fault, expected
from pointcall_executor.kernel.errors import KernelError
from pointcall_runbook.vocabulary import Address
from tests.kernel.lab import (
    BLOCKED,
    DGRAM,
    OK,
    V4,
    V6,
    connect,
    connects,
    here,
    listen,
    member,
    need_blob,
    private_network,
)

pytestmark = pytest.mark.kernel
PORT = 30701


class Here:
    """An injector on the cgroup of this test."""

    def __init__(self, drill: DrillInjector, group: Cgroup) -> None:
        self.drill, self.group = drill, group
        self.end, self.observed, self.close = drill.end, drill.observed, drill.close

    def inject(self, fault: Fault, until_ns: int) -> None:
        self.drill.inject(self.group.path, fault, until_ns)


@pytest.fixture
def injector() -> Iterator[Here]:
    blob = need_blob("drill")
    with private_network(), member("drill") as group, DrillInjector(blob) as drill:
        yield Here(drill, group)


def soon(ms: int) -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) + ms * 1_000_000


def test_the_first_n_connects_are_refused_with_the_chosen_errno(injector: Here) -> None:
    injector.inject(Fault(here(PORT), seed=1, first=3, refuse_errno=errno.ECONNREFUSED), soon(5000))
    with listen(PORT), listen(PORT + 1):
        assert connects(5, PORT) == ["ECONNREFUSED"] * 3 + [OK] * 2
        assert connect(PORT + 1) == OK
    observed = injector.end()
    assert (observed.attempts, observed.refused) == (5, 3)


@pytest.mark.parametrize(
    ("ip", "family", "to"),
    [("0.0.0.0", V4, "127.0.0.1"), ("::ffff:0.0.0.0", V6, "127.0.0.1"), ("::", V6, "::1"), ("::1", V6, "::")],
)
def test_the_unspecified_address_is_loopback(injector: Here, ip: str, family: int, to: str) -> None:
    injector.inject(Fault(here(PORT, Address.parse(to)), seed=1, first=1), soon(10_000))
    with listen(PORT, "::1" if ":" in to else "127.0.0.1"):
        assert connects(2, PORT, ip, family) == [BLOCKED, OK]
    assert injector.end().refused == 1


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_chance_is_drawn_from_the_seed(injector: Here, seed: int) -> None:
    fault = Fault(here(PORT), seed=seed, refuse_ppm=300_000)
    injector.inject(fault, soon(5000))
    with listen(PORT):
        answers = connects(100, PORT)  # the listener accepts none of them: fewer than its backlog
    observed = injector.end()
    assert observed.refused == answers.count("EPERM") == expected(fault, 100)[0]
    assert 10 < observed.refused < 50


def test_the_lease_ends_in_the_kernel(injector: Here) -> None:
    injector.inject(Fault(here(PORT), seed=1, refuse_ppm=1_000_000), until_ns := soon(800))
    with listen(PORT):
        assert connect(PORT) == "EPERM"
        time.sleep(max(0, until_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC)) / 1e9 + 0.005)
        assert connects(2, PORT) == [OK] * 2
    assert injector.observed().after == 2


def test_ending_and_closing_end_it_at_once(injector: Here) -> None:
    with listen(PORT):
        injector.inject(Fault(here(PORT), seed=1, refuse_ppm=1_000_000), soon(60_000))
        assert connect(PORT) == "EPERM"
        injector.end()
        assert connect(PORT) == OK
        injector.inject(Fault(here(PORT), seed=1, refuse_ppm=1_000_000), soon(60_000))
        injector.close()
        injector.close()
        assert connect(PORT) == OK


@pytest.mark.parametrize(("family", "bind", "to"), [(V4, "127.0.0.1", "127.0.0.1"), (V6, "::1", "::1")])
def test_packets_are_lost_by_chance(injector: Here, family: int, bind: str, to: str) -> None:
    fault = Fault(here(PORT, Address.parse(to), 17), seed=7, loss_ppm=250_000)
    with socket.socket(family, DGRAM) as server, socket.socket(family, DGRAM) as client:
        server.bind((bind, PORT))
        server.settimeout(0.05)
        injector.inject(fault, soon(10_000))
        sent = sum(_sent(client, to) for _ in range(100))
        got = 0
        while True:
            try:
                server.recv(8)
            except TimeoutError:
                break
            got += 1
    observed = injector.end()
    assert (observed.packets, observed.lost) == (100, expected(fault, 0, 100)[1])
    assert got == 100 - observed.lost
    assert sent <= 100
    assert 10 < observed.lost < 45


def _sent(client: socket.socket, to: str) -> bool:
    """A lost packet is EPERM for UDP: the kernel tells the sender that it was dropped."""
    try:
        client.sendto(b"x", (to, PORT))
    except PermissionError:
        return False
    return True


def test_another_cgroup_or_namespace_is_spared(injector: Here) -> None:
    injector.inject(Fault(here(PORT), seed=1, refuse_ppm=1_000_000), soon(5000))
    with private_network(), listen(PORT):
        assert connect(PORT) == OK
    with member("outside"), listen(PORT):
        assert connect(PORT) == OK


@pytest.mark.parametrize("left_ms", [-1, 0, 600_001 + 1000])
def test_a_drill_without_an_end_is_refused(injector: Here, left_ms: int) -> None:
    with pytest.raises(KernelError) as refused:
        injector.inject(Fault(here(PORT), seed=1, first=1), soon(left_ms))
    assert refused.value.id == "kernel.drill.lease"


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"refuse_ppm": 1_000_001},
        {"delay_us": 5_000_001},
        {"loss_ppm": -1},
        {"first": 1, "seed": -1},
        {"first": 1, "refuse_errno": 5000},
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        Fault(here(PORT), **({"seed": 1} | wrong))


def test_a_delay_needs_a_device_that_can_wait(injector: Here) -> None:
    with pytest.raises(KernelError) as refused:
        injector.inject(Fault(here(PORT), seed=1, delay_us=1000), soon(5000))
    assert refused.value.id == "kernel.drill.delay"
    with listen(PORT):
        assert connect(PORT) == OK


@pytest.mark.parametrize("protocol", [6, 17])
def test_packets_leave_later(injector: Here, protocol: int) -> None:
    try:
        subprocess.run(["tc", "qdisc", "replace", "dev", "lo", "root", "fq"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no qdisc fq in this kernel, or no tc")
    fault = Fault(here(PORT, protocol=protocol), seed=1, delay_us=80_000)
    if protocol == 6:
        with listen(PORT):
            injector.inject(fault, soon(10_000))
            start = time.monotonic()
            assert connect(PORT) == OK
            took = time.monotonic() - start
    else:
        with socket.socket(V4, DGRAM) as server, socket.socket(V4, DGRAM) as client:
            server.bind(("127.0.0.1", PORT))
            injector.inject(fault, soon(10_000))
            start = time.monotonic()
            client.sendto(b"x", ("127.0.0.1", PORT))
            server.recv(8)
            took = time.monotonic() - start
    observed = injector.end()
    assert 0.07 < took < 5
    assert observed.delayed == observed.packets >= 1
