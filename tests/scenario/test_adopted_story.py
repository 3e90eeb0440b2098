"""One executor ends, the next one adopts its service, sees it die and recreates it: on the real kernel."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pointcall_executor.config import Config
from pointcall_executor.daemon import Executor
from pointcall_executor.demo import story
from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.kernel.probe import BLOBS
from pointcall_executor.node import KernelNode
from pointcall_executor.run import Run
from pointcall_executor.services.groups import remove_empty
from pointcall_runbook.vocabulary import Outcome
from tests.lab import Lab
from tests.unit.services.world import SLEEP, process

RUNBOOK = '''"""Start again what was killed."""
from pointcall_runbook import NO_SERVICE, Decision, ProcessExited, Recreate, runbook

@runbook
def decide(e: ProcessExited) -> Decision:
    if e.service == NO_SERVICE:
        return []
    return [Recreate(service=e.service, grace=0)]
'''


@pytest.fixture
def start(lab: Lab, tmp_path: Path) -> Iterator[Callable[[int], Any]]:
    if missing := story.missing_features():
        pytest.skip("the kernel lacks " + ", ".join(f"{f.id} ({f.detail})" for f in missing))
    group = f"pointcall-adopted-{os.getpid()}"
    Cgroup.create(f"{group}/gate")
    config = Config(node="lab", tee="emulated", cgroup=f"{group}/services", gate=f"{group}/gate")
    lab.runbook("again", RUNBOOK)
    lab.declare("svc", process(tmp_path, SLEEP).process.model_dump(mode="json"))

    @contextlib.contextmanager
    def start(sequence: int, stop_services: bool = False) -> Iterator[Executor]:
        executor = Executor(lab.state, config, lab.platform, KernelNode(config, lab.state))
        try:
            grants = {"actions": ["recreate"], "services": ["svc"]}
            body = {
                "runbooks": [{"name": "again", "source": "again", "grants": grants}],
                "sensors": [{"name": "breaker"}, {"name": "lifecycle"}],
                "services": [{"name": "svc", "declaration": "svc.json"}],
            }
            executor.arm(lab.sign(lab.assemble(body, sequence, blobs=BLOBS)))
            yield executor
        finally:
            executor.close(stop_services=stop_services)

    yield start
    remove_empty(f"{group}/services")
    remove_empty(f"{group}/gate")


def running(executor: Executor) -> int:
    assert executor.session is not None
    return executor.session.services.pids()["svc"]


def executes(pid: int) -> bool:
    """False also for a zombie: whose child it became takes its time to collect it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(") ")[2][0] != "Z"


@pytest.mark.kernel
def test_an_adopted_service_is_watched_and_recreated(start: Callable[..., Any]) -> None:
    with start(1) as first:
        pid = running(first)
        assert pid
    os.kill(pid, 0)
    finished: queue.SimpleQueue[Run] = queue.SimpleQueue()
    with start(3, stop_services=True) as second:
        second.on_receipt = finished.put
        assert running(second) == pid
        os.kill(pid, signal.SIGKILL)
        run = finished.get(timeout=20)
        assert [act.outcome for act in run.acts] == [Outcome.APPLIED]
        assert running(second) not in (0, pid)
        intents = [e.body["grant"] for e in second.journal.entries("intent")]
        assert len(intents) == 2  # the first start and the recreate: adopting starts nothing


@pytest.mark.kernel
def test_what_was_declared_otherwise_is_not_adopted_and_the_log_says_so(
    start: Callable[..., Any], lab: Lab, tmp_path: Path
) -> None:
    with start(1) as first:
        pid = running(first)
        assert first.journal.entries("refusal") == []  # nothing was left by anybody
    lab.declare("svc", process(tmp_path, SLEEP + " # other").process.model_dump(mode="json"))
    with start(3, stop_services=True) as second:
        assert running(second) not in (0, pid)
        assert not executes(pid)
        (refusal,) = second.journal.entries("refusal")
        assert (refusal.body["check"], refusal.body["what"]) == ("service.adoption", "svc")
        assert refusal.body["got"] == "it was declared otherwise"
