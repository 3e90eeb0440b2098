"""Whole executors over units of a real service manager, beside a process: what happens to them meanwhile, and to us."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pointcall_executor.arming import ArmingError
from pointcall_executor.backend import ExecutorBackend
from pointcall_executor.config import Config
from pointcall_executor.daemon import Executor
from pointcall_executor.demo import story
from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.kernel.probe import BLOBS
from pointcall_executor.node import KernelNode
from pointcall_executor.run import Run
from pointcall_executor.services import cluster, systemd
from pointcall_executor.services.container import Podman
from pointcall_executor.services.declared import FOLLOW_SECONDS
from pointcall_executor.services.groups import Freezer, group_of, remove_empty
from pointcall_executor.services.managed import ServiceError
from pointcall_runbook.vocabulary import Outcome, service
from tests.lab import Lab
from tests.scenario.test_adopted_story import RUNBOOK, executes
from tests.unit.services.apiserver import IMAGE, ApiServer
from tests.unit.services.manager import Manager
from tests.unit.services.podman import PodmanService
from tests.unit.services.world import SLEEP, process, sha256, wait_for

# What happens to the unit `a` is decided by which of the others was killed.
HOLDS = '''"""Every action that holds something."""
from pointcall_runbook import Decision, Freeze, Isolate, Kill, ProcessExited, Thaw, runbook, service

A = service("a")
HOLD = 60_000_000_000

@runbook
def decide(e: ProcessExited) -> Decision:
    if e.service == service("f"):
        return [Freeze(service=A, hold=HOLD)]
    if e.service == service("i"):
        return [Isolate(service=A, hold=HOLD)]
    if e.service == service("t"):
        return [Thaw(service=A)]
    if e.service == service("k"):
        return [Kill(service=A, signal=15)]
    return []
'''
KILLED = RUNBOOK.replace("e.service == NO_SERVICE", "e.service == NO_SERVICE or e.signal != 9")

pytestmark = pytest.mark.kernel


class Stage:
    """One installation with a service manager; executors one after another."""

    def __init__(self, lab: Lab, manager: Manager, folder: Path) -> None:
        self.lab, self.manager, self.folder = lab, manager, folder
        self.group = f"pointcall-kinds-{os.getpid()}"
        self.config = Config(
            node="lab", tee="emulated", cgroup=f"{self.group}/services", gate=f"{self.group}/gate",
            systemd_bus=manager.bus,
        )  # fmt: skip
        self.sequence = -1
        self.receipts: queue.SimpleQueue[Run] = queue.SimpleQueue()

    def unit(self, name: str, unit: str = "", text: str = "ExecStart=/bin/sleep 600", **over: Any) -> None:
        """Declare a service by this name as a unit, whose file has this text."""
        unit = unit or name
        path = self.manager.units / f"{unit}.service"
        written = f"[Service]\n{text}\n"
        if not path.exists() or path.read_text() != written:
            path.write_text(written)
        files = [{"path": str(path), "sha256": sha256(path)}]
        body = {"unit": f"{unit}.service", "fragment": str(path), "files": files, "ready": {"timeout_ms": 3000}}
        self.lab.declare(name, body | over, kind="systemd")

    def container(self, name: str, podman: PodmanService, **over: Any) -> None:
        """Declare a container, and reach for this Podman."""
        self.config = self.config.model_copy(update={"podman_socket": str(podman.socket)})
        body = {"image": podman.image, "command": ["/bin/busybox", "sleep", "600"]}
        self.lab.declare(name, body | over, kind="container")

    def process(self, name: str) -> None:
        self.lab.declare(name, process(self.folder, SLEEP, name=name).process.model_dump(mode="json"))

    def signed(self, *names: str, actions: Sequence[str] = ("recreate",)) -> Any:
        """A manifest of these services, as they are declared now."""
        self.sequence += 2  # the next one would have to name the one before
        kinds = {n: json.loads((self.lab.sources / f"{n}.json").read_text())["kind"] for n in names}
        grants, limits = {"actions": [*actions], "services": list(names)}, {"perMinute": 600, "burst": 100}
        body = {
            "runbooks": [{"name": "again", "source": "again", "grants": grants, "limits": limits}],
            "sensors": [{"name": "breaker"}, {"name": "lifecycle"}, {"name": "isolate"}],
            "services": [{"name": n, "kind": kind, "declaration": f"{n}.json"} for n, kind in kinds.items()],
            "guard": {"maxServicesAtOnce": 10, "maxServicesPercent": 100, "minHealthyPercent": 0},
        }
        return self.lab.sign(self.lab.assemble(body, self.sequence, blobs=BLOBS))

    @contextlib.contextmanager
    def executor(
        self, *names: str, stop_services: bool = True, actions: Sequence[str] = ("recreate",)
    ) -> Iterator[Executor]:
        """One that has armed these services; they are stopped at its end unless they shall go on."""
        executor = Executor(self.lab.state, self.config, self.lab.platform, KernelNode(self.config, self.lab.state))
        executor.on_receipt = self.receipts.put
        try:
            executor.arm(self.signed(*names, actions=actions))
            yield executor
        finally:
            executor.close(stop_services=stop_services)

    def receipt(self) -> Run:
        """Of the next run that did something."""
        while not (run := self.receipts.get(timeout=15)).acts:
            pass
        return run


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    if lacks := Manager.missing():
        pytest.skip(f"needs {lacks}")
    with Manager(tmp_path_factory.mktemp("m") / "d") as manager:
        yield manager


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodmanService]:
    if lacks := PodmanService.missing():
        pytest.skip(f"needs {lacks}")
    with PodmanService(tmp_path_factory.mktemp("p")) as podman:
        yield podman


@pytest.fixture
def stage(lab: Lab, manager: Manager, tmp_path: Path) -> Iterator[Stage]:
    if missing := story.missing_features():
        pytest.skip("the kernel lacks " + ", ".join(f"{f.id} ({f.detail})" for f in missing))
    stage = Stage(lab, manager, tmp_path)
    Cgroup.create(stage.config.gate)
    lab.runbook("again", RUNBOOK)
    yield stage
    remove_empty(stage.config.cgroup)
    remove_empty(stage.config.gate)
    for path in manager.units.glob("*.service"):
        if path.name != "dbus.service":
            path.unlink()
    manager.run("daemon-reload")


def test_a_manager_that_hangs_holds_up_nothing_but_its_own_units(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "ANSWER_SECONDS", 5.0)
    names = ["a", "b", "c"]
    for name in names:
        stage.unit(name)
    stage.process("own")
    with stage.executor(*names, "own") as executor:
        backend, pids = ExecutorBackend(executor), dict(executor.running_services())
        assert all(pids.values())
        with stage.manager.hung():
            begin = time.monotonic()
            assert {s.name: s.pid for s in backend.status().services} == pids
            for name in names:
                os.kill(pids[name], signal.SIGKILL)
            os.kill(pids["own"], signal.SIGKILL)
            assert stage.receipt().acts[0].target == "own"
            assert {s.name: s.state for s in backend.status().services} == dict.fromkeys(names, "stopped") | {
                "own": "running"
            }
            executor.pause("looking", 60)
            executor.disarm("it hangs")
            assert time.monotonic() - begin < 5
        outcomes = [stage.receipt().acts[0].outcome for _ in names]
        assert outcomes == [Outcome.APPLIED] * 3  # begun before the end was asked for, done when it answers


def test_a_unit_that_could_not_be_ended_is_still_watched(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.unit("a")
    with stage.executor("a") as executor:
        assert executor.session is not None
        with monkeypatch.context() as patch, stage.manager.hung():
            patch.setattr(systemd, "ANSWER_SECONDS", 0.3)
            with pytest.raises(ServiceError, match="does not answer"):
                executor.session.services.destroy(service("a").number, 0)
        os.kill(executor.running_services()["a"], signal.SIGKILL)
        assert stage.receipt().acts[0].outcome is Outcome.APPLIED


def test_a_unit_that_somebody_has_restarted_is_watched_on(stage: Stage) -> None:
    stage.lab.runbook("again", KILLED)
    stage.unit("a")
    with stage.executor("a") as executor:
        first = executor.running_services()["a"]
        stage.manager.run("restart", "a.service")
        wait_for(lambda: executor.running_services()["a"] not in (0, first))
        restarted = executor.running_services()["a"]
        session = executor.session
        assert session is not None
        wait_for(lambda: group_id(restarted) in session.topology.cgroups)
        os.kill(restarted, signal.SIGKILL)
        assert stage.receipt().acts[0].outcome is Outcome.APPLIED
        assert executor.running_services()["a"] not in (0, first, restarted)
        time.sleep(2 * FOLLOW_SECONDS)  # what we did ourselves is nobody else's doing
        assert stage.receipts.qsize() == 0


def group_id(pid: int) -> int:
    found = group_of(pid)
    return found.id if found is not None else 0


@pytest.mark.parametrize("disarmed", [False, True])
def test_what_somebody_has_started_otherwise_is_not_taken_over_by_the_next_manifest(
    stage: Stage, disarmed: bool
) -> None:
    stage.lab.runbook("again", KILLED)
    stage.unit("a")
    stage.unit("b")
    with stage.executor("a", "b") as executor:
        before = dict(executor.running_services())
        if disarmed:
            executor.disarm("work by hand")
        stage.unit("a", text="ExecStart=/bin/sleep 666")
        time.sleep(1.1)  # the manager compares whole seconds
        stage.manager.run("daemon-reload")
        stage.manager.run("restart", "a.service")
        other = executor.running_services()["a"]
        wait_for(lambda: command(other) == "/bin/sleep 666")
        stage.unit("a")  # and puts the file back
        executor.arm(stage.signed("a", "b"))
        now = executor.running_services()
        wait_for(lambda: command(now["a"]) == "/bin/sleep 600")
        assert not executes(other)
        assert now["b"] == before["b"]


def test_a_unit_whose_file_was_away_for_a_while_is_started(stage: Stage) -> None:
    stage.unit("a")
    with stage.executor("a") as executor:
        session, path = executor.session, stage.manager.units / "a.service"
        assert session is not None
        text = path.read_text()
        path.unlink()
        stage.manager.run("daemon-reload")
        os.kill(executor.running_services()["a"], signal.SIGKILL)
        assert stage.receipt().acts[0].outcome is Outcome.FAILED
        path.write_text(text)
        assert session.services.start(service("a").number).pid


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()


def test_two_services_that_exchange_their_units_both_run_afterwards(stage: Stage) -> None:
    stage.unit("a")
    stage.unit("b")
    with stage.executor("a", "b") as executor:
        before = dict(executor.running_services())
        stage.unit("a", "b")
        stage.unit("b", "a")
        executor.arm(stage.signed("a", "b"))
        now = executor.running_services()
        assert all(map(executes, now.values()))
        assert not set(now.values()) & set(before.values())
        os.kill(now["a"], signal.SIGKILL)
        assert stage.receipt().acts[0].target == "a"
        assert all(map(executes, executor.running_services().values()))


def test_a_service_takes_the_unit_of_one_that_is_not_declared_any_more(stage: Stage) -> None:
    stage.unit("a")
    stage.unit("b")
    with stage.executor("a", "b") as executor:
        before = dict(executor.running_services())
        stage.unit("a", "b")
        executor.arm(stage.signed("a"))
        now = executor.running_services()
        assert executes(now["a"])
        assert not any(map(executes, before.values()))


def test_what_fails_while_it_is_put_back_leaves_nothing_else_down(stage: Stage, tmp_path: Path) -> None:
    names = ("a", "b", "c", "d")
    for name in names:
        stage.unit(name)
    with stage.executor(*names) as executor:
        for name in names:
            stage.unit(name, grace_ms=7)
        stage.unit("a", text="ExecStart=/bin/sleep 601")  # what ran of it is not there any more
        stage.unit("d", ready={"file": str(tmp_path / "never"), "timeout_ms": 200})
        with pytest.raises(ServiceError) as refusal:
            executor.arm(stage.signed(*names))
        assert refusal.value.id == "service.not-ready"
        assert executor.admitted is not None
        assert executor.admitted.manifest.sequence == 1
        assert {name for name, pid in executor.running_services().items() if executes(pid)} == {"b", "c", "d"}
        told = {e.body["check"]: e.body["got"] for e in executor.journal.entries("refusal")}
        assert "service.digest" in told["service.put-back"] or "service.unit" in told["service.put-back"]
        os.kill(executor.running_services()["b"], signal.SIGKILL)
        assert (stage.receipt().acts[0].target, stage.receipts.qsize()) == ("b", 0)


def test_one_unit_cannot_be_two_services(stage: Stage) -> None:
    stage.unit("a")
    stage.unit("b", "a")
    with pytest.raises(ServiceError) as refusal, stage.executor("a", "b"):
        pass
    assert (refusal.value.id, refusal.value.got) == ("service.unit", "a.service of a and of b")


def test_a_container_lives_through_the_lives_of_executors(stage: Stage, podman: PodmanService) -> None:
    stage.container("box", podman)
    with stage.executor("box", stop_services=False) as first:
        pid = first.running_services()["box"]
        assert executes(pid)
        first.disarm("a look")
        assert first.running_services()["box"] == pid
        first.arm(stage.signed("box"))
        assert first.running_services()["box"] == pid
    with stage.executor("box") as second:
        assert second.running_services()["box"] == pid
        os.kill(pid, signal.SIGKILL)
        run = stage.receipt()
        assert (run.acts[0].outcome, run.acts[0].target) == (Outcome.APPLIED, "box")
        now = second.running_services()["box"]
        assert executes(now)
        stage.container("box", podman, environment={"COLOUR": "red"})
        second.arm(stage.signed("box"))
        third = second.running_services()["box"]
        assert executes(third)
        assert not executes(now)
        with contextlib.suppress(ServiceError):  # by hand, beside us: we may be faster to remove it
            Podman(str(podman.socket)).ask("POST", "/containers/pointcall-box/stop", timeout=0)
        assert stage.receipt().acts[0].outcome is Outcome.APPLIED
        assert executes(second.running_services()["box"])
        assert stage.receipts.qsize() == 0
    assert podman.run("ps", "-a", "-q") == ""


@pytest.mark.parametrize("disarmed", [False, True])
def test_arming_while_the_manager_hangs_ends_and_leaves_what_ran(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, disarmed: bool
) -> None:
    monkeypatch.setattr(systemd, "ANSWER_SECONDS", 0.5)
    stage.unit("a")
    stage.unit("b")
    with stage.executor("a", "b") as executor, ThreadPoolExecutor(1) as beside:
        before = dict(executor.running_services())
        stage.unit("a", grace_ms=7)
        armed = stage.signed("a", "b")
        with stage.manager.hung():
            arming = beside.submit(executor.arm, armed)
            if disarmed:
                executor.disarm("it hangs")
            assert isinstance(arming.exception(timeout=10), ServiceError | ArmingError)
            assert executor.running_services() == before
        if not disarmed:
            os.kill(before["a"], signal.SIGKILL)
            assert stage.receipt().acts[0].outcome is Outcome.APPLIED
        stage.unit("a", grace_ms=8)
        executor.arm(stage.signed("a", "b"))
        assert all(map(executes, executor.running_services().values()))
        assert executor.running_services()["b"] == before["b"]


def test_closing_while_the_manager_hangs_ends(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "ANSWER_SECONDS", 0.5)
    stage.unit("a")
    stage.unit("b")
    with stage.executor("a", "b", stop_services=False) as executor:
        for name, pid in executor.running_services().items():
            with stage.manager.hung():
                os.kill(pid, signal.SIGKILL)
                if name == "b":
                    executor.close()
    stage.unit("a")
    with stage.executor("a", "b") as executor:
        assert all(map(executes, executor.running_services().values()))


def test_a_cluster_that_hangs_is_not_asked_for_the_status_or_for_a_hot_reload(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 5.0)
    body = {"namespace": "shop", "workload": "Deployment/web", "selector": {"app": "web"}, "images": {"web": IMAGE}}
    stage.lab.declare("web", body, kind="kubernetes")
    stage.process("own")
    with ApiServer(tmp_path) as server:
        stage.config = stage.config.model_copy(update={"kubeconfig": str(server.kubeconfig())})
        entered = contextlib.ExitStack()
        executor = entered.enter_context(stage.executor("web", "own"))
    with entered, socket.create_server(("127.0.0.1", server.port)):  # it lets in, and says nothing
        begin = time.monotonic()
        state = {s.name: (s.state, s.health) for s in ExecutorBackend(executor).status().services}
        assert state == {"web": ("elsewhere", "elsewhere"), "own": ("running", "running")}
        executor.arm(stage.signed("web", "own"))
        os.kill(executor.running_services()["own"], signal.SIGKILL)
        assert stage.receipt().acts[0].target == "own"
        executor.disarm("it hangs")  # and its services are what they were
        now = {s.name: (s.kind, s.state, s.health) for s in ExecutorBackend(executor).status().services}
        assert now == {"web": ("kubernetes", "elsewhere", "elsewhere"), "own": ("process", "running", "running")}
        assert time.monotonic() - begin < 5


@pytest.mark.parametrize("hung", [False, True])
def test_a_unit_is_frozen_freed_isolated_and_killed_by_a_runbook(stage: Stage, hung: bool) -> None:
    stage.lab.runbook("again", HOLDS)
    stage.unit("a")
    others = ("f", "t", "i", "k")
    for name in others:
        stage.process(name)
    with stage.executor("a", *others, actions=["freeze", "thaw", "isolate", "kill"]) as executor:
        session, number = executor.session, service("a").number
        assert session is not None
        unit = executor.running_services()["a"]
        with stage.manager.hung() if hung else contextlib.nullcontext():
            for name, amiss in (("f", "it is frozen"), ("t", ""), ("i", "")):
                os.kill(executor.running_services()[name], signal.SIGKILL)
                (act,) = stage.receipt().acts
                assert (act.target, act.outcome) == ("a", Outcome.APPLIED)
                assert session.services.healthy(number) == amiss
            assert group_id(unit) in session.sensors.isolations()
        os.kill(executor.running_services()["k"], signal.SIGKILL)
        assert stage.receipt().acts[0].outcome is Outcome.APPLIED
        wait_for(lambda: not executes(unit))
        assert session.services.healthy(number) == "its unit is inactive"


@pytest.mark.parametrize("frozen", [False, True])
def test_an_executor_that_is_killed_leaves_its_unit_running_for_the_next_one(stage: Stage, frozen: bool) -> None:
    stage.unit("a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: it needs none of them
        child = os.fork()
    if child == 0:
        _killed(stage, frozen)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    stage.sequence += 2  # that it has armed
    unit = int((stage.folder / "pid").read_text())
    group = group_of(unit)
    assert group is not None
    wait_for(lambda: not Freezer(group.path).frozen)
    with stage.executor("a") as executor:
        assert executor.running_services()["a"] == unit
        assert executor.journal.entries("refusal") == []
        os.kill(unit, signal.SIGKILL)
        assert stage.receipt().acts[0].outcome is Outcome.APPLIED


def _killed(stage: Stage, frozen: bool) -> NoReturn:
    """An executor in a process of its own, which dies in the middle of its work."""
    try:
        with stage.executor("a") as executor:
            (stage.folder / "pid").write_text(str(executor.running_services()["a"]))
            if frozen:
                number = service("a").number
                executor.session.services.freeze(number, time.monotonic_ns() + 60_000_000_000)
                assert executor.session.services.frozen(number, 0)
            os.kill(os.getpid(), signal.SIGKILL)
    finally:
        os._exit(1)
