"""One executor ends, the next one adopts its service, sees it die and recreates it: on the real kernel."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sqlite3
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
from pointcall_executor.services.declared import DeclaredServices
from pointcall_executor.services.groups import remove_empty
from pointcall_executor.services.managed import ServiceError
from pointcall_keys.assemble import Assembled
from pointcall_runbook.vocabulary import Outcome
from tests.lab import Lab
from tests.unit.services.manager import Manager
from tests.unit.services.world import SLEEP, process, sha256

RUNBOOK = '''"""Start again what was killed."""
from pointcall_runbook import NO_SERVICE, Decision, ProcessExited, Recreate, runbook

@runbook
def decide(e: ProcessExited) -> Decision:
    if e.service == NO_SERVICE:
        return []
    return [Recreate(service=e.service, grace=0)]
'''

SYSTEM_BUS = "unix:path=/run/dbus/system_bus_socket"


def assembled(lab: Lab, sequence: int, *names: str) -> Assembled:
    """A manifest over services (`svc`) as they are declared now."""
    kinds = {n: json.loads((lab.sources / f"{n}.json").read_text())["kind"] for n in names or ("svc",)}
    grants = {"actions": ["recreate"], "services": [next(iter(kinds))]}
    body = {
        "runbooks": [{"name": "again", "source": "again", "grants": grants}],
        "sensors": [{"name": "breaker"}, {"name": "lifecycle"}],
        "services": [{"name": n, "kind": kind, "declaration": f"{n}.json"} for n, kind in kinds.items()],
    }
    return lab.assemble(body, sequence, blobs=BLOBS)


@pytest.fixture
def start(request: pytest.FixtureRequest, lab: Lab, tmp_path: Path) -> Iterator[Callable[[int], Any]]:
    if missing := story.missing_features():
        pytest.skip("the kernel lacks " + ", ".join(f"{f.id} ({f.detail})" for f in missing))
    group = f"pointcall-adopted-{os.getpid()}"
    Cgroup.create(f"{group}/gate")
    bus = (
        request.getfixturevalue("manager").bus
        if "manager" in request.fixturenames
        else "unix:path=/run/dbus/system_bus_socket"
    )
    config = Config(node="lab", tee="emulated", cgroup=f"{group}/services", gate=f"{group}/gate", systemd_bus=bus)
    lab.runbook("again", RUNBOOK)
    lab.declare("svc", process(tmp_path, SLEEP).process.model_dump(mode="json"))

    @contextlib.contextmanager
    def start(sequence: int = 0, stop_services: bool = False, arm: bool = True) -> Iterator[Executor]:
        executor = Executor(lab.state, config, lab.platform, KernelNode(config, lab.state))
        try:
            if arm:
                executor.arm(lab.sign(assembled(lab, sequence)))
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
def test_what_is_declared_otherwise_after_a_restart_makes_room(
    start: Callable[..., Any], lab: Lab, tmp_path: Path
) -> None:
    with start(1) as first:
        pid = running(first)
        assert first.journal.entries("refusal") == []  # nothing was left by anybody
    lab.declare("svc", process(tmp_path, SLEEP + " # other").process.model_dump(mode="json"))
    with start(3, stop_services=True) as second:
        assert running(second) not in (0, pid)
        assert not executes(pid)
        assert second.journal.entries("refusal") == []  # it was what the manifest before declared


@pytest.mark.kernel
@pytest.mark.parametrize("replaced", [False, True])
def test_where_arming_fails_after_a_restart_what_ran_runs_again_if_it_still_can(
    start: Callable[..., Any], lab: Lab, tmp_path: Path, replaced: bool
) -> None:
    with start(1):
        pass
    (tmp_path / "v2").mkdir()
    folder = tmp_path if replaced else tmp_path / "v2"  # where the file of the first version is replaced, or is not
    lab.declare("svc", process(folder, SLEEP + " # other").process.model_dump(mode="json"))
    never = process(tmp_path, SLEEP, name="web", ready={"file": str(tmp_path / "never"), "timeout_ms": 200})
    lab.declare("web", never.process.model_dump(mode="json"))
    with start(arm=False, stop_services=True) as second:
        with pytest.raises(ServiceError) as refusal:
            second.arm(lab.sign(assembled(lab, 3, "svc", "web")))
        assert refusal.value.id == "service.not-ready"  # and not why something was not put back
        told = [e.body["detail"]["services"] for e in second.journal.entries("config") if "put back" in e.body["what"]]
        refused = [(e.body["check"], e.body["what"]) for e in second.journal.entries("refusal")]
        assert told == [["svc", "web"] if not replaced else ["web"]]
        assert refused == [("service.put-back", "svc")] * replaced + [("service.not-ready", "manifest")]
        source = process(tmp_path, SLEEP).process.model_dump(mode="json")
        lab.declare("svc", source)
        second.arm(lab.sign(assembled(lab, 5)))
        starts = [e for e in second.journal.entries("intent") if e.body["target"] == "svc"]
        assert running(second)
        assert len(starts) == (3 if replaced else 2)  # what was put back is what is declared again, and goes on


@pytest.fixture
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    if lacks := Manager.missing():
        pytest.skip(f"needs {lacks}")
    with Manager(tmp_path_factory.mktemp("m") / "d") as manager:
        (manager.units / "svc.service").write_text("[Service]\nExecStart=/bin/sleep 600\n")
        yield manager


def declare_unit(lab: Lab, manager: Manager, **over: Any) -> None:
    path = manager.units / "svc.service"
    files = [{"path": str(path), "sha256": sha256(path)}]
    lab.declare("svc", {"unit": "svc.service", "fragment": str(path), "files": files, **over}, kind="systemd")


@pytest.mark.kernel
def test_what_was_a_unit_before_the_restart_ends_before_the_process_of_now_starts(
    manager: Manager, start: Callable[..., Any], lab: Lab, tmp_path: Path
) -> None:
    declare_unit(lab, manager)
    with start(1) as first:
        unit = running(first)
        assert executes(unit)
    assert executes(unit)
    lab.declare("svc", process(tmp_path, SLEEP).process.model_dump(mode="json"))
    with start(3) as second:
        pid = running(second)
        assert not executes(unit)
        assert second.journal.entries("refusal") == []
    declare_unit(lab, manager)
    with start(5, stop_services=True) as third:
        assert executes(running(third))
        assert not executes(pid)
        assert third.journal.entries("refusal") == []


@pytest.mark.kernel
def test_a_unit_that_is_declared_otherwise_runs_after_the_new_manifest_is_armed(
    manager: Manager, start: Callable[..., Any], lab: Lab
) -> None:
    declare_unit(lab, manager)
    with start(1, stop_services=True) as executor:
        unit = running(executor)
        declare_unit(lab, manager, grace_ms=5)
        executor.arm(lab.sign(assembled(lab, 3)))
        assert running(executor) not in (0, unit)


@pytest.mark.kernel
def test_what_the_log_does_not_have_any_more_is_said_and_is_no_reason_not_to_arm(
    start: Callable[..., Any], lab: Lab, tmp_path: Path
) -> None:
    with start(1) as first:
        armed = first.admitted.manifest.subjects["services/svc.json"]
    with sqlite3.connect(lab.state / "journal.db") as db:
        db.execute("delete from blob where sha256 = ?", (bytes.fromhex(armed),))
    db.close()
    lab.declare("svc", process(tmp_path, SLEEP + " # other").process.model_dump(mode="json"))
    with start(3, stop_services=True) as second:
        assert running(second)
        refusals = [(e.body["check"], e.body["what"]) for e in second.journal.entries("refusal")]
        assert refusals == [("service.left", "services of another kind"), ("service.adoption", "svc")]


@pytest.mark.kernel
def test_what_a_takeover_that_was_cut_off_did_not_end_any_more_ends_at_the_next_start(
    manager: Manager, start: Callable[..., Any], lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare_unit(lab, manager)
    lab.declare("web", process(tmp_path, SLEEP, name="web").process.model_dump(mode="json"))
    with start(arm=False) as first:
        first.arm(lab.sign(assembled(lab, 1, "svc", "web")))
        pids, other = dict(first.running_services()), lab.sign(assembled(lab, 3, "web"))
        with monkeypatch.context() as killed:  # after the switch, before what is not declared any more has ended
            killed.setattr(DeclaredServices, "commit", lambda _self: {})
            killed.setattr(Executor, "_keep_standing", lambda _self: None)
            first.arm(other)
    assert executes(pids["svc"])
    with start(arm=False, stop_services=True) as second:
        second.arm(other)
        assert not executes(pids["svc"])
        assert second.running_services() == {"web": pids["web"]}
        ended = [e.body["detail"]["services"] for e in second.journal.entries("config") if "ended" in e.body["what"]]
        assert ended == [["svc"]]
