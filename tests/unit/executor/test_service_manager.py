"""sd_notify(3) as a service manager hears it, on a socket of the test."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointcall_executor import service_manager
from pointcall_executor.pulse import Pulse
from pointcall_executor.service_manager import MAX_STATUS_CHARS, ServiceManager


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as found:
        found.bind(str(tmp_path / "n"))
        found.settimeout(5)
        yield found


def ours(manager: socket.socket, watchdog_us: int = 0) -> ServiceManager:
    return ServiceManager(manager.getsockname(), watchdog_us)


def heard(manager: socket.socket) -> str:
    return manager.recv(4096).decode()


def test_each_word_is_one_datagram(manager: socket.socket) -> None:
    told = ours(manager)
    told.ready("armed: lab, sequence 3")
    assert heard(manager) == "READY=1\nSTATUS=armed: lab, sequence 3"
    told.reloading()
    first, second = heard(manager).split("\n")
    assert first == "RELOADING=1"
    assert abs(int(second.removeprefix("MONOTONIC_USEC=")) - time.monotonic_ns() // 1000) < 5_000_000
    told.status("two\nlines  become\tone")
    assert heard(manager) == "STATUS=two lines become one"
    told.extend(7)
    assert heard(manager) == "EXTEND_TIMEOUT_USEC=7000000"
    told.stopping()
    assert heard(manager) == "STOPPING=1"
    told.close()
    told.close()


def test_a_start_that_takes_long_asks_for_more_time_until_it_is_over(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_manager, "EXTEND_SECONDS", 0.03)
    told = ours(manager)
    with told.taking_longer():
        assert [heard(manager), heard(manager)] == ["EXTEND_TIMEOUT_USEC=30000"] * 2
    time.sleep(0.05)
    manager.settimeout(0.1)
    with contextlib.suppress(TimeoutError):
        while True:  # one may have been on its way
            heard(manager)
    time.sleep(0.05)
    with pytest.raises(TimeoutError):
        heard(manager)
    told.close()


def test_a_status_is_bounded_and_cannot_smuggle_a_word(manager: socket.socket) -> None:
    told = ours(manager)
    told.status("x\nREADY=1\n" + "y" * 9999)
    line = heard(manager)
    assert "\n" not in line
    assert len(line) == len("STATUS=") + MAX_STATUS_CHARS
    told.close()


def test_an_abstract_name_is_understood() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"pointcall-test-{os.getpid()}"
        manager.bind(f"\0{name}")
        manager.settimeout(5)
        told = ServiceManager(f"@{name}", 0)
        told.stopping()
        assert heard(manager) == "STOPPING=1"
        told.close()


@pytest.mark.parametrize("address", ["", "/nonexistent/notify", "@nobody-listens-here"])
def test_without_a_manager_nothing_happens(address: str) -> None:
    told = ServiceManager(address, 1000)
    told.ready("x")
    told.watch(Pulse(lambda: 0, lambda: False))
    told.close()


def test_a_manager_that_goes_away_does_no_harm(manager: socket.socket) -> None:
    told = ours(manager)
    manager.close()
    told.ready("x")
    told.stopping()
    told.close()


def test_a_manager_that_does_not_listen_does_not_hold_us_up(manager: socket.socket) -> None:
    told = ours(manager)
    begin = time.monotonic()
    for _ in range(5000):  # far more than a socket's queue holds
        told.status("x" * MAX_STATUS_CHARS)
    assert time.monotonic() - begin < 5
    told.close()


def test_the_environment_is_taken_and_emptied(manager: socket.socket) -> None:
    environ = {
        "NOTIFY_SOCKET": manager.getsockname(),
        "WATCHDOG_USEC": "900",
        "WATCHDOG_PID": str(os.getpid()),
        "A": "b",
    }
    told = ServiceManager.of(environ)
    assert (told.watchdog_us, environ) == (900, {"A": "b"})
    told.close()
    other = ServiceManager.of({"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "900", "WATCHDOG_PID": "1"})
    assert other.watchdog_us == 0
    other.close()
    assert ServiceManager.of({"WATCHDOG_USEC": "soon"}).watchdog_us == 0


class Loop:
    """A loop whose turns the test makes."""

    def __init__(self) -> None:
        self.beats, self.failed = 0, False

    def pulse(self) -> Pulse:
        return Pulse(lambda: self.beats, lambda: self.failed)


def test_the_watchdog_is_fed_only_while_the_loop_turns(manager: socket.socket) -> None:
    loop, told = Loop(), ours(manager, watchdog_us=90_000)
    told.watch(loop.pulse())
    for _ in range(3):
        loop.beats += 1
        assert heard(manager) == "WATCHDOG=1"
    manager.settimeout(0.3)
    with pytest.raises(TimeoutError):  # it stands still: ten chances, and nothing is said
        heard(manager)
    loop.beats += 1
    assert heard(manager) == "WATCHDOG=1"
    loop.beats, loop.failed = loop.beats + 1, True
    with pytest.raises(TimeoutError):
        heard(manager)
    told.close()


def test_a_pulse_forgives_a_moment_and_not_a_failure() -> None:
    now, loop = [0.0], Loop()
    pulse = Pulse(lambda: loop.beats, lambda: loop.failed, lambda: now[0])
    now[0] = 4.9
    assert pulse.alive(5)
    now[0] = 5.1
    assert not pulse.alive(5)
    loop.beats = 1
    assert pulse.alive(5)
    loop.failed = True
    assert not pulse.alive(5)
    assert not pulse.moved()
