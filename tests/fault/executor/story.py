"""The life of an executor that is cut off: armed, two runs, by hand, a new epoch, a takeover, disarmed, closed.

`python -m tests.fault.executor.story FOLDER` imports everything once and then forks a fresh process for each line
on standard input: {"label": ..., "act": "live" | "restart", "state": ..., "short": bool, "kernel": bool,
"pin": bool, "group": ...}. It answers with
one line each: how the process ended, and the labels that it passed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pointcall_attest.admission import check_manifest
from pointcall_executor import sessions
from pointcall_executor.config import Config
from pointcall_executor.core import guard
from pointcall_executor.core.event import CircuitEvent, Destination, Kind
from pointcall_executor.daemon import ARMED, Executor
from pointcall_executor.kernel.cgroup import Cgroup, find_root
from pointcall_executor.node import KernelNode
from pointcall_executor.recorded import RecordedNode
from pointcall_executor.run import Run
from pointcall_executor.session import Bundle
from pointcall_executor.tee.emulated import EmulatedPlatform
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.vocabulary import Address
from tests.fault.executor.labels import Cut, install
from tests.kernel.lab import connect

PORT = 18443
HERE = Address.parse("127.0.0.1")
WAIT_S = 20
RUNBOOK = '''"""Hold the circuit, recreate what is behind it, tell somebody, remember how often."""
from pointcall_runbook import (
    ActionDone, CircuitOpened, Decision, Level, Notify, OpenCircuit, Recreate, Remember, channel, remembered, runbook,
    seconds
)

TIMES = remembered(0, hi=7)

@runbook
def opened(e: CircuitOpened) -> Decision:
    return [
        OpenCircuit(address=e.address, port=e.port, hold=seconds(1)),
        Recreate(service=e.service),
        Notify(channel=channel("ops"), level=Level.WARNING, code=1),
        Remember(slot=TIMES.slot, value=min(TIMES + 1, 7)),
    ]

@runbook
def done(e: ActionDone) -> Decision:
    return [Notify(channel=channel("ops"), level=Level.INFO, code=2)]
'''


class Life:
    """One executor process."""

    def __init__(self, order: dict[str, Any], cut: Cut) -> None:
        self.state, self.kernel, self.cut = Path(order["state"]), bool(order["kernel"]), cut
        group = str(order.get("group", ""))
        config = Config(
            node="lab", tee="emulated", pin=bool(order["pin"]), cgroup=f"{group}/services" if group else "pointcall",
            gate=f"{group}/clients" if group else "", epoch_minutes=60,
        )  # fmt: skip
        self.node: Any = KernelNode(config, self.state, lambda _line: None) if self.kernel else RecordedNode()
        platform = EmulatedPlatform.open(self.state / "tee", clock=lambda: datetime.now(UTC))
        self.runs: queue.SimpleQueue[Run] = queue.SimpleQueue()
        self.executor = Executor(self.state, config, platform, self.node)
        self.executor.on_receipt = self._told

    def _told(self, run: Run) -> None:
        self.cut.at("told.before")
        self.cut.tell("told", run=run.id, index=run.receipt_index)
        self.runs.put(run)

    def arm(self, sequence: int) -> None:
        self.executor.arm(Bundle.read(self.state / f"manifest-{sequence}"))

    def event(self) -> None:
        """The circuit opens; its run and the two that its actions start are over."""
        if self.kernel:
            self._fail_for_real()
        else:
            self.node.current_sensors.happen(
                CircuitEvent(Kind.CIRCUIT_OPENED, time.monotonic_ns(), Destination(HERE, PORT), 5, 111, 0, 0)
            )
        for _ in range(3):
            self.runs.get(timeout=WAIT_S)

    def wait(self) -> None:
        """Until the guard lets every service be recreated again: also what was done before a restart counts."""
        armed, held = self.executor.state.armed, self.executor.state.guard
        assert armed is not None
        for number, (_, last_ns) in held.recreated.items():
            now_ns = time.monotonic_ns()
            time.sleep(max(0, last_ns + guard.flap_ns(held, number, now_ns, armed.rules) - now_ns) / 1e9)

    def _fail_for_real(self) -> None:
        """Kill the service and connect until the breaker has opened."""
        pid = self.executor.running_services()["api"]
        os.kill(pid, 9)
        time.sleep(0.02)
        for _ in range(50):
            connect(PORT)
            if not self.runs.empty():
                return
            time.sleep(0.005)

    def end(self) -> None:
        self.executor.close(stop_services=True)


def live(order: dict[str, Any], cut: Cut) -> None:
    """Everything once; `short`: only one event."""
    life = Life(order, cut)
    life.arm(1)
    life.event()
    if order["short"]:
        life.end()
        return
    life.executor.trip(HERE, PORT, 10**9, "by hand")
    life.executor.release(HERE, PORT, "by hand")
    life.executor.roll_epoch()
    life.wait()
    life.arm(3)
    life.event()
    life.executor.checkpoint_now()
    life.executor.disarm("enough")
    life.end()


def restart(order: dict[str, Any], cut: Cut) -> None:
    """Start again, arm what may still be armed, and see that it works."""
    life = Life(order, cut)
    cut.tell("restarted")
    try:
        life.arm(life.executor.journal.highest_sequence(ARMED) or 1)
    except PointcallError as refusal:
        cut.tell("refused", check=refusal.id)
        raise
    if life.kernel:
        cut.tell("running", count=len(members(order["group"])), services=dict(life.executor.running_services()))
    life.wait()
    life.event()
    life.end()


def members(group: str) -> list[int]:
    """Processes of the declared services."""
    procs = (find_root() / group / "services").rglob("cgroup.procs")
    return [int(line) for path in procs for line in path.read_text().split()]


def obey(order: dict[str, Any]) -> int:
    """In a process of its own."""
    cut = Cut(order.get("label", ""), Path(order["state"]) / "truth.jsonl")
    install(cut)
    if order["kernel"]:
        Cgroup.create(f"{order['group']}/clients").add(0)  # its connects go through the breaker's gate
    sessions.check_manifest = functools.partial(check_manifest, in_process=True)  # what it imports is here already
    {"live": live, "restart": restart}[order["act"]](order, cut)
    (Path(order["state"]) / "labels.json").write_text(json.dumps(cut.seen))
    return 0


def main() -> None:
    import sigstore.models
    import sigstore.verify

    assert sigstore.models, sigstore.verify
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            code = 1
            with contextlib.suppress(BaseException):
                try:
                    code = obey(order)
                except BaseException:
                    (Path(order["state"]) / "error.txt").write_text(traceback.format_exc())
                    raise
            os._exit(code)
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(json.dumps({"status": os.waitstatus_to_exitcode(status)}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
