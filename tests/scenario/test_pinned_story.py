"""A pinned breaker while nobody is there: it goes on, and the next executor writes down what happened meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.entry import Entry
from pointcall_executor.api.client import Client
from pointcall_executor.api.roles import Role
from pointcall_executor.journal import JournalReader
from pointcall_executor.kernel.bpf import prog_exists
from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.kernel.probe import BLOBS
from pointcall_executor.pins import Pins
from pointcall_executor.services.groups import remove_empty
from tests.lab import Lab
from tests.scenario.test_detectors_story import DEAD_PORT, declare
from tests.scenario.test_real_story import ENVIRONMENT, bpffs, program_ids, real_kernel, running

__all__ = ["bpffs", "real_kernel"]  # fixtures
pytestmark = pytest.mark.kernel
THRESHOLD = 3
RUNBOOK = '''"""Tell a channel that a circuit opened."""
from pointcall_runbook import CircuitOpened, Decision, Level, Notify, channel, runbook

@runbook
def opened(e: CircuitOpened) -> Decision:
    return [Notify(channel=channel("ops"), level=Level.WARNING, code=1)]
'''
CONNECT = """
import errno, os, socket, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
for _ in range(int(sys.argv[3])):
    with socket.socket() as s:
        print(errno.errorcode.get(s.connect_ex(("127.0.0.1", int(sys.argv[2]))), "OK"))
"""


def put(lab: Lab, folder: Path, sequence: int, **params: int) -> None:
    """A signed manifest with one service and its dead second address, where `pointcall run` looks."""
    lab.runbook("opened", RUNBOOK)
    places = [{"address": "127.0.0.1", "port": DEAD_PORT}]
    constants = {"threshold": THRESHOLD, "cooldown_us": 10**8, "window_us": 10**8, "stuck_ms": 0}
    body: dict[str, Any] = {
        "runbooks": [{"name": "opened", "source": "opened", "grants": {"actions": ["notify"], "channels": ["ops"]}}],
        "sensors": [{"name": "breaker", "params": constants | params}],
        "services": [{"name": "worker", "declaration": declare(lab, folder), "listen": places}],
        "channels": [{"name": "ops", "kind": "log"}],
    }
    assembled = lab.assemble(body, sequence, blobs=BLOBS)
    manifest = lab.state / "manifest"
    shutil.rmtree(manifest, ignore_errors=True)
    assembled.write(manifest)
    (manifest / "manifest.sigstore.json").write_bytes(lab.sign(assembled).signatures[0])


def connects(n: int) -> list[str]:
    gate = Cgroup.create(f"pointcall-run-{os.getpid()}/clients/keep")
    command = [sys.executable, "-c", CONNECT, str(gate.path), str(DEAD_PORT), str(n)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout.split()


def receipts(lab: Lab) -> list[Entry]:
    with contextlib.closing(JournalReader.open(lab.state / "journal.db")) as journal:
        return journal.entries(kind="receipt")


def lost(lab: Lab) -> list[int]:
    with contextlib.closing(JournalReader.open(lab.state / "journal.db")) as journal:
        return [e.body["count"] for e in journal.entries(kind="lost")]


def test_what_happened_while_nobody_was_there_has_its_receipt(
    real_kernel: None, bpffs: None, lab: Lab, tmp_path: Path
) -> None:
    put(lab, tmp_path, 1)
    pins = Pins(lab.state)
    try:
        with running(lab, pin=True) as run:
            run.until("armed")
            numbers = program_ids(lab).values()
            run.process.kill()
            run.process.wait()
        assert all(map(prog_exists, numbers))
        assert connects(THRESHOLD + 2) == ["ECONNREFUSED"] * THRESHOLD + ["EPERM"] * 2
        assert receipts(lab) == []
        again_ns = time.monotonic_ns()
        with running(lab, pin=True) as run:
            run.until("armed")
            deadline = time.monotonic() + 10
            while not (found := receipts(lab)):
                assert time.monotonic() < deadline, "what happened meanwhile is not in the log"
                time.sleep(0.05)
            receipt = found[0].receipt()
            assert (receipt.trigger.event, receipt.actions[0].outcome) == ("CircuitOpened", "applied")
            assert receipt.trigger.at_ns < again_ns  # it happened before this executor was there
            assert connects(1) == ["EPERM"]  # and the circuit is still open
            assert lost(lab) == []
            with Client(lab.state / "run" / f"{Role.OPERATOR.value}.sock") as client:
                client.call("Control/Disarm", reason="enough")
            assert connects(1) == ["ECONNREFUSED"]
        assert len(receipts(lab)) == 1
    finally:
        pins.drop()
        remove_empty(f"pointcall-run-{os.getpid()}/clients/keep")


def test_a_newer_manifest_goes_on_with_open_circuits(real_kernel: None, lab: Lab, tmp_path: Path) -> None:
    """Other constants mean other programs: the circuits' state goes over to them."""
    put(lab, tmp_path, 1)
    with running(lab) as run:
        run.until("armed")
        first = set(program_ids(lab).values())
        assert connects(THRESHOLD + 1)[-1] == "EPERM"
        put(lab, tmp_path, 3, threshold=9)  # not the one after it: that would have to name it
        run.process.send_signal(1)  # SIGHUP
        assert "sequence=3" in run.until("armed")
        assert not first & set(program_ids(lab).values())
        assert connects(2) == ["EPERM"] * 2


def test_without_pins_a_killed_executor_leaves_nothing(real_kernel: None, lab: Lab, tmp_path: Path) -> None:
    put(lab, tmp_path, 1)
    with running(lab) as run:
        run.until("armed")
        numbers = list(program_ids(lab).values())
        assert connects(THRESHOLD + 1)[-1] == "EPERM"
        run.process.kill()
        run.process.wait()
        deadline = time.monotonic() + 5
        while any(map(prog_exists, numbers)):
            assert time.monotonic() < deadline, "a program outlived its executor"
            time.sleep(0.05)
        assert connects(2) == ["ECONNREFUSED"] * 2
    assert not Pins(lab.state).folder.exists()
