"""From a kernel event to its action through the whole executor: ring, core, Wasm, guard, journal, action.

Two kinds: a lease in the kernel (open_circuit: applied at once, its entry follows) and an action with a durable intent
(recreate: begins once the intent is on disk). Kernel and client are real; the services behind the circuits are not, so
that what is measured is the executor. Then what others do with the same (loop_peers.py). Needs root and the blobs.

usage: python -m tests.bench.loop [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import queue
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pointcall_attest.admission import Admitted
from pointcall_executor.core.event import CircuitEvent, Destination, Kind
from pointcall_executor.core.guard import Rules
from pointcall_executor.core.history import KEYS_MAX, History
from pointcall_executor.core.trigger import Topology, notice
from pointcall_executor.daemon import Executor
from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.kernel.probe import BLOBS
from pointcall_executor.node import KernelSensors
from pointcall_executor.recorded import RecordedNode
from pointcall_executor.run import Run
from pointcall_keys.private_sigstore import PrivateSigstore
from pointcall_runbook.vocabulary import Address
from tests.bench import loop_peers
from tests.bench.figures import figure, percentile
from tests.lab import Lab, now

SERVICES = 100
FIRST_PORT = 20_000  # below the ephemeral range
THRESHOLD = 3
LOOPBACK = Address.parse("127.0.0.1")
CLIENT = """
import socket, sys
open(sys.argv[1], "w").write("0")
for line in sys.stdin:
    for _ in range(3):
        with socket.socket() as client:
            try: client.connect(("127.0.0.1", int(line)))
            except OSError: pass
"""
LEASE = '''"""Keep a failed destination closed off for a while."""
from pointcall_runbook import CircuitOpened, Decision, OpenCircuit, runbook, seconds

@runbook
def decide(e: CircuitOpened) -> Decision:
    return [OpenCircuit(address=e.address, port=e.port, hold=seconds(60))]
'''
DURABLE = '''"""Recreate a service whose clients are refused."""
from pointcall_runbook import NO_SERVICE, CircuitOpened, Decision, Recreate, runbook

@runbook
def decide(e: CircuitOpened) -> Decision:
    if e.service == NO_SERVICE:
        return []
    return [Recreate(service=e.service, grace=0)]
'''


class BenchNode(RecordedNode):
    """The real kernel, and services that start at once."""

    def __init__(self, gate: Path) -> None:
        super().__init__()
        self.gate = gate
        self.kernel: KernelSensors | None = None

    def sensors(self, admitted: Admitted, rules: Rules) -> KernelSensors:  # type: ignore[override]
        self.kernel = KernelSensors(admitted, rules, self.gate)
        return self.kernel


def ports() -> list[int]:
    """Closed ports, one for each service."""
    found = []
    for port in range(FIRST_PORT, 32_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
        if len(found) == SERVICES:
            return found
    sys.exit("no closed ports")


def spec(lab: Lab, closed: list[int], action: str) -> dict[str, Any]:
    program = Path("/bin/true").resolve()
    digest = __import__("hashlib").sha256(program.read_bytes()).hexdigest()
    process = {"argv": [str(program)], "files": [{"path": str(program), "sha256": digest}]}
    names = [f"svc-{port}" for port in closed]
    grants = {"actions": [action], "services": names[:64], "networks": ["127.0.0.1/32"]}
    limits = {"perMinute": 600, "burst": 100}
    return {
        "runbooks": [{"name": action, "source": action, "grants": grants, "limits": limits}],
        "sensors": [{"name": "breaker", "params": {"threshold": THRESHOLD}}],
        "services": [
            {"name": n, "declaration": lab.declare(n, process), "listen": [{"address": "127.0.0.1", "port": p}]}
            for n, p in zip(names, closed, strict=True)
        ],
        "guard": {
            "maxActionsPerMinute": 6000,
            "maxServicesAtOnce": SERVICES,
            "maxCircuitsAtOnce": SERVICES,
            "stormEventsPerMinute": 1_000_000,
        },
    }


def incidents(
    executor: Executor, client: subprocess.Popen[str], closed: list[int], finished: queue.SimpleQueue[Run]
) -> list[Run]:
    """One incident after the other; the run that each led to."""
    runs = []
    assert client.stdin is not None
    for port in closed:
        client.stdin.write(f"{port}\n")
        client.stdin.flush()
        runs.append(finished.get(timeout=10))
    return runs


def us(runs: list[Run], until: str) -> list[float]:
    """Microseconds from the event to `until` (a field of the first action, or of the run)."""
    out = []
    for run in runs:
        end = getattr(run.acts[0], until, None) or getattr(run, until)
        out.append((end - run.event_ns) / 1e3)
    return out


def report(runs: list[Run], metric: str, until: str) -> None:
    woken, took = us(runs, "received_ns"), us(runs, until)
    for share, label in ((0.5, "p50"), (0.99, "p99")):
        value, base = percentile(took, share), percentile(woken, share)
        figure(
            "loop", f"{metric}_us_{label}", value, "us", len(runs), baseline="ring wake-up alone", ratio=value / base
        )


def scanned() -> None:
    """What a record costs the core after a scan, when clients have failed to reach more destinations than it keeps."""
    took = {known: notices(known) for known in (1, 2 * KEYS_MAX)}
    few, many = (percentile(took[known], 0.5) for known in took)
    figure(
        "loop", "notice_after_a_scan_us_p50", many, "us", KEYS_MAX, baseline="one known destination", ratio=many / few
    )


def notices(known: int) -> list[float]:
    """Microseconds for each of so many records that a circuit opened, after `known` destinations."""
    history, took = History(), []
    topology = Topology()
    for number in range(known + KEYS_MAX):
        where = Destination(LOOPBACK, number % min(known, 2**16))
        record = CircuitEvent(Kind.CIRCUIT_OPENED, number, where, THRESHOLD, 111, 1, 1)
        began = time.perf_counter_ns()
        history, _ = notice(record, topology, history)
        took.append((time.perf_counter_ns() - began) / 1e3)
    return took[known:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    if os.geteuid():
        sys.exit("tests.bench.loop needs root")
    scanned()
    closed = ports()[:64]
    gate = Cgroup.create(f"pointcall-bench-{os.getpid()}")
    with (
        tempfile.TemporaryDirectory() as folder,
        PrivateSigstore.start(Path(folder) / "sigstore", clock=now) as sigstore,
    ):
        lab = Lab(Path(folder), sigstore, Path(folder) / "tee")
        lab.runbook("open_circuit", LEASE)
        lab.runbook("recreate", DURABLE)
        node = BenchNode(gate.path)
        procs = str(gate.path / "cgroup.procs")
        client = subprocess.Popen([sys.executable, "-I", "-c", CLIENT, procs], stdin=subprocess.PIPE, text=True)
        try:
            with lab.executor(node) as executor:
                lease_ms = measure(lab, executor, node, client, closed, rounds)
            (Path(folder) / "peers").mkdir()
            loop_peers.compare(Path(folder) / "peers", lease_ms)
        finally:
            client.kill()
            client.wait()
            gate.remove()


def measure(
    lab: Lab, executor: Executor, node: BenchNode, client: subprocess.Popen[str], closed: list[int], rounds: int
) -> float:
    """Milliseconds from event to lease (p50)."""
    finished: queue.SimpleQueue[Run] = queue.SimpleQueue()
    executor.on_receipt = finished.put
    executor.arm(lab.sign(lab.assemble(spec(lab, closed, "open_circuit"), 1, blobs=BLOBS)))
    assert node.kernel is not None
    runs: list[Run] = []
    for _ in range(rounds):
        runs += incidents(executor, client, closed, finished)
        for port in closed:
            node.kernel.close_circuit(LOOPBACK, port)
    report(runs, "event_to_lease", "applied_ns")
    report(runs, "event_to_confirmed_lease", "ended_ns")
    report(runs, "event_to_decision", "decided_ns")
    lease_ms = percentile(us(runs, "ended_ns"), 0.5) / 1e3
    executor.arm(lab.sign(lab.assemble(spec(lab, closed, "recreate"), 3, blobs=BLOBS)))
    report(incidents(executor, client, closed, finished), "event_to_durable_action", "started_ns")
    return lease_ms


if __name__ == "__main__":
    main()
