"""Readiness by HTTP through a real breaker: its connect is neither refused nor the half-open probe."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from pointcall_attest.declaration import Http, Ready
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.breaker import BreakerSensor, State
from pointcall_executor.kernel.cgroup import Cgroup, find_root
from pointcall_executor.services.ready import unready
from pointcall_executor.services.spawning import Spawner
from tests.kernel.conftest import FAST
from tests.kernel.lab import connects, here, listen
from tests.unit.services.world import wait_for

PORT = 7415
ANSWER = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.fixture
def spawner(network: None, group: Cgroup) -> Iterator[Spawner]:
    """Below the gate's own cgroup: what it connects is judged like everything else there."""
    made = Spawner(f"{group.path.relative_to(find_root())}/inner").watch()
    wait_for(lambda: str(made.pid) in (find_root() / made.cgroup / "cgroup.procs").read_text().split())
    yield made
    made.close()


@pytest.fixture
def gated(breaker_blob: Blob, spawner: Spawner, group: Cgroup) -> Iterator[BreakerSensor]:
    with BreakerSensor(breaker_blob, cgroup=group.path, constants=FAST) as sensor:
        sensor.attach()
        sensor.arm(here(PORT))
        yield sensor


def answer(times: int) -> threading.Thread:
    listener = listen(PORT)

    def serve() -> None:
        with listener:
            for _ in range(times):
                with listener.accept()[0] as channel:
                    channel.recv(4096)
                    channel.sendall(ANSWER)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.kernel
def test_a_forced_circuit_does_not_refuse_the_check(gated: BreakerSensor, spawner: Spawner) -> None:
    ready = Ready(tcp=f"127.0.0.1:{PORT}", http=Http())
    gated.force(here(PORT), time.monotonic_ns() + 60 * 10**9)
    thread = answer(1)
    assert unready(ready, spawner.connecting).startswith("GET /: ")  # judged like any other
    gated.allow(spawner.cgroup_id)
    assert unready(ready, spawner.connecting) == ""
    thread.join()
    assert gated.circuit(here(PORT)).state is State.FORCED


@pytest.mark.kernel
def test_the_check_is_not_the_probe(gated: BreakerSensor, spawner: Spawner) -> None:
    ready = Ready(tcp=f"127.0.0.1:{PORT}", http=Http())
    gated.allow(spawner.cgroup_id)
    connects(3, PORT)
    assert gated.circuit(here(PORT)).state is State.OPEN
    gated.make_probe_ready(here(PORT))
    thread = answer(1)
    assert unready(ready, spawner.connecting) == ""
    thread.join()
    assert gated.circuit(here(PORT)).state is State.OPEN
