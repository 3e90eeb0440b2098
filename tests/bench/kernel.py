"""What the kernel room costs and how fast it is: `python -m tests.bench.kernel` prints one JSON object a figure.

Ratios come from interleaved A/B blocks of one run, so that a busy machine shifts both sides. Needs root and the blobs
(`make -C bpf`). Nothing is asserted here.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pointcall_executor.core.event import Destination, Kind, decode
from pointcall_executor.kernel import bpf
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.breaker import BreakerSensor, CircuitPolicy
from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.kernel.lifecycle import LifecycleSensor
from pointcall_executor.kernel.loader import Loaded, load
from pointcall_executor.kernel.maps import Map
from pointcall_executor.kernel.ring import Ring
from pointcall_executor.kernel.sensor import Sensor
from pointcall_executor.kernel.storage import STARTED, StorageSensor
from tests.bench import peers
from tests.kernel.lab import black_hole, here, private_network, read_blob

ROOT = Path(__file__).resolve().parents[2]
DEAD_PORT = 30999
THRESHOLD = 3
FILLED = 200_000  # records of one pc_fill
FAR_US = 60_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--openings", type=int, default=10_000, help="openings for leaked_connects")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved blocks for the ratios")
    args = parser.parse_args()
    if os.geteuid():
        sys.exit("tests.bench.kernel needs root")
    with private_network(), tempfile.TemporaryDirectory() as folder, _load_process(Path(folder)) as clients:
        breaker_figures(clients, args.openings, args.rounds)
        half_open(clients)
        peer_figures(clients)
        always_on_figures(Path(folder), args.rounds)
    in_flight_figures()
    ring_figures()
    peers.compare()


def figure(
    metric: str,
    value: float,
    unit: str,
    n: int,
    baseline: str = "",
    ratio: float | None = None,
    peer: str | None = None,
) -> None:
    row = {"suite": "kernel", "metric": metric, "value": round(value, 3), "unit": unit, "n": n, "baseline": baseline}
    print(json.dumps(row | {"ratio": None if ratio is None else round(ratio, 3), "peer": peer}), flush=True)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class Clients:
    """The C load process, in its own cgroup."""

    def __init__(self, process: subprocess.Popen[str], group: Cgroup) -> None:
        self._process, self.group = process, group
        self.port = int(self._line())

    def run(self, n: int, port: int = 0, mode: str = "") -> tuple[int, int, int, float, float, float]:
        """(ok, refused, blocked, p50 ns, p99 ns, mean ns) of n connects."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{n} {port} {mode}\n")
        self._process.stdin.flush()
        ok, refused, blocked, *times = self._line().split()
        p50, p99, mean = map(float, times)
        return int(ok), int(refused), int(blocked), p50, p99, mean

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@contextlib.contextmanager
def _load_process(folder: Path) -> Iterator[Clients]:
    binary = folder / "connect_load"
    subprocess.run(["cc", "-O2", "-Wall", "-o", binary, Path(__file__).with_name("connect_load.c")], check=True)
    group = Cgroup.create(f"pcbench-{os.getpid()}")
    with subprocess.Popen([binary, "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        group.add(process.pid)
        try:
            yield Clients(process, group)
        finally:
            process.kill()
    group.remove()


def breaker_figures(clients: Clients, openings: int, rounds: int) -> None:
    constants = {"threshold": THRESHOLD, "cooldown_us": FAR_US, "window_us": FAR_US}
    with BreakerSensor(read_blob("breaker"), cgroup=clients.group.path, constants=constants) as breaker:
        dead, alive = here(DEAD_PORT), here(clients.port)
        breaker.arm(dead)
        leaked_and_open(clients, breaker, dead, openings)
        refused_and_blocked(clients, breaker, dead, rounds)
        successful(clients, breaker, alive, rounds)


def leaked_and_open(clients: Clients, breaker: BreakerSensor, dead: Destination, openings: int) -> None:
    breaker.attach()
    with _stamps() as reset_ns:
        leaked, opened_us, refused_us = 0, [], []
        for _ in range(openings):
            leaked += clients.run(THRESHOLD + 50, dead.port, "b")[1] - THRESHOLD
            circuit = breaker.circuit(dead)
            opened_us.append((circuit.t_open_ns - reset_ns(dead.port)) / 1e3)
            refused_us.append((circuit.t_refused_ns - circuit.t_open_ns) / 1e3)
            breaker.close_circuit(dead)
            breaker.ring.drain()
    figure("leaked_connects", leaked, "connects", openings, f"connects that passed after failure {THRESHOLD}")
    figure("open_us_p50", percentile(opened_us, 0.5), "us", openings, "reset received in the kernel")
    figure("open_us_p99", percentile(opened_us, 0.99), "us", openings, "reset received in the kernel")
    figure("first_refusal_us_p50", percentile(refused_us, 0.5), "us", openings, "circuit opened")
    figure("first_refusal_us_p99", percentile(refused_us, 0.99), "us", openings, "circuit opened")
    breaker.detach()


def refused_and_blocked(clients: Clients, breaker: BreakerSensor, dead: Destination, rounds: int) -> None:
    refused, blocked = [], []
    for _ in range(rounds):
        refused.append(clients.run(1000, dead.port)[3])
        breaker.attach()
        breaker.force(dead, time.clock_gettime_ns(time.CLOCK_MONOTONIC) + FAR_US * 1000)
        blocked.append(clients.run(1000, dead.port)[3])
        breaker.detach()
        breaker.close_circuit(dead)
    ratio = statistics.median(b / r for b, r in zip(blocked, refused, strict=True))
    figure("blocked_connect_us_p50", statistics.median(blocked) / 1e3, "us", rounds, "a refused connect", ratio)
    figure("refused_connect_us_p50", statistics.median(refused) / 1e3, "us", rounds)


def successful(clients: Clients, breaker: BreakerSensor, alive: Destination, rounds: int) -> None:
    """Detector and gate on, the destination armed and healthy, against nothing attached."""
    breaker.arm(alive)
    clients.run(5000)
    plain, gated = [], []
    for _ in range(rounds):
        for on in random.sample((False, True), 2):
            if on:
                breaker.attach()
            (gated if on else plain).append(clients.run(2000)[3])
            breaker.detach()
    ratio = statistics.median(g / p for g, p in zip(gated, plain, strict=True))
    figure("successful_connect_ratio", ratio, "ratio", rounds * 2000, "nothing attached", ratio)
    figure("successful_connect_us_p50", statistics.median(gated) / 1e3, "us", rounds * 2000, "nothing attached", ratio)


AT_ONCE = """
import errno, os, socket, sys, time
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
sock, at = socket.socket(), float(sys.argv[3])
sock.settimeout(5)
while time.monotonic() < at:
    pass
try:
    sys.exit(sock.connect_ex(("127.0.0.1", int(sys.argv[2]))))
except TimeoutError:
    sys.exit(errno.ETIMEDOUT)
"""


def half_open(clients: Clients, budgets: tuple[int, ...] = (1, 3, 8), at_once: int = 64) -> None:
    """64 processes connect at the same moment to a half-open circuit whose probes get no answer: how many pass."""
    for budget in budgets:
        constants = {"threshold": THRESHOLD, "cooldown_us": FAR_US, "window_us": FAR_US, "probe_us": FAR_US}
        blob, group = read_blob("breaker"), clients.group
        with BreakerSensor(blob, cgroup=group.path, constants=constants | {"probe_budget": budget}) as breaker:
            breaker.attach()
            dead = here(DEAD_PORT)
            breaker.arm(dead)
            clients.run(THRESHOLD, dead.port)
            breaker.make_probe_ready(dead)
            with black_hole(dead.port):
                at = time.monotonic() + 8  # until all of them have started
                words = [sys.executable, "-S", "-c", AT_ONCE, str(group.path), str(dead.port), str(at)]
                children = [subprocess.Popen(words) for _ in range(at_once)]
                codes = [child.wait() for child in children]
            circuit = breaker.circuit(dead)
        blocked = codes.count(errno.EPERM)
        figure(f"half_open_passed_budget_{budget}", at_once - blocked, "connects", at_once, f"{budget} allowed")
        assert circuit.probes == at_once - blocked, "the kernel counts what the clients see"


def peer_figures(clients: Clients) -> None:
    """The same failure, decided in user space: how many refused connects get through until the gate is shut.

    The gate is ours in both; what differs is who decides. `refusals` counts what came after the third one.
    """
    constants = {"threshold": THRESHOLD, "cooldown_us": FAR_US, "window_us": FAR_US}
    with BreakerSensor(read_blob("breaker"), cgroup=clients.group.path, constants=constants) as breaker:
        breaker.attach()
        dead = here(DEAD_PORT)
        breaker.arm(dead, CircuitPolicy(watch_only=True))
        from_ring = [_until_shut(clients, dead, lambda: _shut_on_event(breaker, dead)) for _ in range(50)]
        middle = statistics.median(from_ring)
        what = "decided by a ring consumer, in steps of 20"
        figure("leaked_connects_ring_p50", middle, "connects", 50, what, peer="python, event-driven")
        polled = [_until_shut(clients, dead, lambda: _shut_on_poll(dead), pause=0.37) for _ in range(3)]
        middle, what = statistics.median(polled), "decided by a 1-second poll, in steps of 20"
        figure("leaked_connects_poll_p50", middle, "connects", 3, what, peer="1-second polling loop")


def _until_shut(clients: Clients, dead: Destination, decide: Callable[[], None], pause: float = 0.0) -> int:
    """Connect as fast as one client can until the decider returns; how many were refused by the dead server."""
    time.sleep(pause)
    decider = threading.Thread(target=decide)
    decider.start()
    refused = 0
    while decider.is_alive():
        refused += clients.run(20, dead.port)[1]
    decider.join()
    return max(refused - THRESHOLD, 0)


def _shut_on_event(breaker: BreakerSensor, dead: Destination) -> None:
    while True:
        breaker.ring.wait(1)
        if any(decode(record).kind is Kind.CIRCUIT_OPENED for record in breaker.ring.drain()):
            breaker.close_circuit(dead)
            return


def _shut_on_poll(dead: Destination) -> None:
    """Look once a second; three failures in a row decide."""
    failures = 0
    while failures < THRESHOLD:
        time.sleep(1)
        with socket.socket() as sock:
            failures = failures + 1 if sock.connect_ex(("127.0.0.1", dead.port)) else 0


def always_on_figures(folder: Path, rounds: int) -> None:
    """Block, FUSE, fsync and process detectors attached, against nothing attached: cost of a system call."""
    binary = folder / "syscall_load"
    subprocess.run(["cc", "-O2", "-Wall", "-o", binary, Path(__file__).with_name("syscall_load.c")], check=True)
    command = [binary, folder / "file", "1"]
    with contextlib.ExitStack() as stack:
        load_ = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        stack.callback(load_.kill)
        sensors: list[Sensor] = [LifecycleSensor(read_blob("lifecycle"))]
        sensors += [StorageSensor(read_blob(name)) for name in ("storage", "fuse", "fsync")]
        for sensor in sensors:
            stack.callback(sensor.close)
        for mode, name in (("g", "getppid"), ("r", "pread"), ("w", "pwrite")):
            _always_on(load_, sensors, mode, name, rounds)


def _always_on(load_: subprocess.Popen[str], sensors: list[Sensor], mode: str, name: str, rounds: int) -> None:
    plain, watched = [], []
    for _ in range(rounds):
        for on in random.sample((False, True), 2):
            for sensor in sensors:
                sensor.attach() if on else sensor.detach()
            (watched if on else plain).append(_ask(load_, f"{mode} 20000"))
    ratio = percentile(watched, 0.2) / percentile(plain, 0.2)
    figure(f"always_on_{name}_ratio", ratio, "ratio", rounds * 20_000, "nothing attached, lower quintile", ratio)


def _ask(process: subprocess.Popen[str], line: str) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


@contextlib.contextmanager
def _bench_object() -> Iterator[Loaded]:
    path = ROOT / "bpf" / "build" / "stamp.blob"
    if not path.exists():
        subprocess.run(["make", "-s", "-C", ROOT / "bpf", "bench"], check=True)
    loaded = load(Blob.parse(path.read_bytes()))
    try:
        yield loaded
    finally:
        loaded.close()


@contextlib.contextmanager
def _stamps() -> Iterator[Callable[[int], int]]:
    """port -> when the last reset from there came in, CLOCK_MONOTONIC ns."""
    with _bench_object() as loaded:
        link = bpf.raw_tracepoint_open(loaded.programs["pc_reset"])
        times = Map(loaded.maps["reset_ns"])
        try:
            yield lambda port: int.from_bytes(times.get(port.to_bytes(4, "little")) or b"", "little")
        finally:
            os.close(link)


def in_flight_figures(operations: int = 1000) -> None:
    """One look at what is in flight, as the executor has every 10 s: at nothing, at many, at many that ended unseen."""
    with StorageSensor(read_blob("storage")) as sensor:
        sensor.attach()
        nothing = statistics.median(_look(sensor, 0) for _ in range(200))
        figure("look_in_flight_us", nothing, "us", 200)
        for number in range(operations):
            sensor._maps["in_flight"].set((2**63 + 8 * number).to_bytes(8, "little"), STARTED.pack(1, 0, 0, 0))
        young = statistics.median(_look(sensor, 0) for _ in range(20))
        figure("look_many_in_flight_us", young, "us", operations, "nothing in flight", young / nothing)
        asked = _look(sensor, 2)
        figure("look_many_asked_about_us", asked, "us", operations, "not asked about", asked / young)


def _look(sensor: StorageSensor, before_ns: int) -> float:
    start = time.perf_counter_ns()
    sensor.in_flight(before_ns)
    return (time.perf_counter_ns() - start) / 1e3


def ring_figures() -> None:
    with _bench_object() as loaded:
        ring = Ring(loaded.maps["events"])
        try:
            drain_rate(loaded, ring)
            handler_latency(loaded, ring)
        finally:
            ring.close()


def drain_rate(loaded: Loaded, ring: Ring) -> None:
    best_raw = best_typed = float("inf")
    for _ in range(5):
        best_raw = min(best_raw, _drained(loaded, ring, lambda records: len(records)))
        best_typed = min(best_typed, _drained(loaded, ring, lambda records: len([decode(r) for r in records])))
    figure("drain_events_per_s", FILLED / best_raw, "events/s", FILLED, "records out of the ring as bytes")
    figure("drain_decode_events_per_s", FILLED / best_typed, "events/s", FILLED, "the same, decoded to typed events")


def _drained(loaded: Loaded, ring: Ring, use: Callable[[list[bytes]], int]) -> float:
    bpf.prog_run(loaded.programs["pc_fill"], bytes(8))
    start, seen = time.perf_counter(), 0
    while batch := ring.drain(8192):
        seen += use(batch)
    took = time.perf_counter() - start
    assert seen == FILLED, f"{seen} of {FILLED} records"
    return took


def handler_latency(loaded: Loaded, ring: Ring, n: int = 2000) -> None:
    """Kernel timestamp -> inside the Python handler, woken by poll; the event comes from another process."""
    pid = os.fork()
    if pid == 0:
        for _ in range(n):
            time.sleep(0.0005)
            bpf.prog_run(loaded.programs["pc_tick"], bytes(8))
        os._exit(0)
    took: list[float] = []
    while len(took) < n and ring.wait(2):
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        took += [(now - decode(record).at_ns) / 1e3 for record in ring.drain()]
    os.waitpid(pid, 0)
    figure("event_to_handler_us_p50", percentile(took, 0.5), "us", len(took), "kernel timestamp")
    figure("event_to_handler_us_p99", percentile(took, 0.99), "us", len(took), "kernel timestamp")


if __name__ == "__main__":
    main()
