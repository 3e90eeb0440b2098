"""Services of kind `systemd` on a real service manager that the tests start in namespaces of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.declaration import ServiceDeclaration
from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.services import systemd
from pointcall_executor.services.declared import DeclaredServices, Kinds
from pointcall_executor.services.groups import remove_empty
from pointcall_executor.services.managed import NOTHING_LEFT, ServiceError
from pointcall_executor.services.reach import Reach
from pointcall_executor.services.spawning import Spawner
from pointcall_executor.services.systemd import SystemdService, Units, _unit_group
from tests.unit.services.manager import Manager
from tests.unit.services.world import SLEEP, declared, needs_cgroups, process, sha256, wait_for

PARENT = f"pointcall-units-{os.getpid()}"

pytestmark = pytest.mark.skipif(Manager.missing() != "", reason=f"needs {Manager.missing()}")


class Stage:
    """A manager, and declared units of it."""

    def __init__(self, manager: Manager, spawner: Spawner) -> None:
        self.manager, self.spawner = manager, spawner
        self.units = Units(manager.bus)
        self.path = manager.units / "svc.service"

    def write(self, command: str = "/bin/sleep 600", *more: str) -> None:
        self.path.write_text("\n".join(["[Service]", f"ExecStart={command}", *more, ""]))

    def declaration(self, **over: Any) -> ServiceDeclaration:
        files = [{"path": str(self.path), "sha256": sha256(self.path)}]
        body = {"unit": "svc.service", "fragment": str(self.path), "files": files, "ready": {"timeout_ms": 3000}}
        return declared("systemd", "svc", body | over)

    def service(self, **over: Any) -> SystemdService:
        return SystemdService(self.declaration(**over), self.units, self.spawner)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Manager(tmp_path_factory.mktemp("m") / "d") as manager:
        spawner = Spawner(PARENT).watch()
        stage = Stage(manager, spawner)
        yield stage
        stage.units.close()
        spawner.close()
    remove_empty(PARENT)


@pytest.fixture
def stage(shared: Stage) -> Iterator[Stage]:
    shared.write()
    yield shared
    shared.write()
    drop_ins = shared.manager.units / "svc.service.d"
    for path in drop_ins.glob("*"):
        path.unlink()
    shared.manager.run("daemon-reload")
    shared.service().destroy(0)


def test_a_unit_is_started_and_stopped(stage: Stage) -> None:
    one, moved = stage.service(), []
    started = one.start(moved.append)
    assert started.pid == one.pid
    wait_for(lambda: Path(f"/proc/{started.pid}/comm").read_text() == "sleep\n")
    assert Path(f"/proc/{started.pid}/cgroup").read_text().count("/app.slice/svc.service\n")
    assert moved == [started.cgroup_id] == [one.cgroup_id]
    assert one.running
    assert one.healthy() == ""
    assert one.start().pid == started.pid  # it runs already: nothing to do
    one.destroy(5_000_000_000)
    one.destroy(5_000_000_000)
    assert not one.running
    assert one.healthy() == "its unit is inactive"
    assert not Path(f"/proc/{started.pid}").exists()


def test_a_unit_that_ignores_the_stop_is_killed_after_the_grace(stage: Stage) -> None:
    stage.write("/bin/sh -c 'trap : TERM; while :; do sleep 1; done'", "TimeoutStopSec=100")
    one = stage.service()
    pid = one.start().pid
    assert one.destroy(300_000_000) < 5_000_000_000
    assert not Path(f"/proc/{pid}").exists()


def test_a_killed_unit_is_recreated(stage: Stage) -> None:
    one = stage.service()
    first = one.start()
    one.signal(signal.SIGKILL)
    wait_for(lambda: not one.running)
    assert one.healthy() == "its unit is failed"
    with pytest.raises(ServiceError) as refusal:
        one.signal(signal.SIGTERM)
    assert refusal.value.id == "service.not-running"
    one.destroy(0)
    assert one.start().pid != first.pid


def test_a_unit_that_ends_before_anybody_watches_it_was_not_started(stage: Stage) -> None:
    one = stage.service()

    def killed(_cgroup: int) -> None:
        pid = one.pid
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: one.pid != pid)

    with pytest.raises(ServiceError) as refusal:
        one.start(killed)
    assert refusal.value.id == "service.ended"
    assert not one.running


def test_a_unit_is_recreated_more_often_than_its_manager_would_start_it(stage: Stage) -> None:
    one, wants = stage.service(), stage.manager.units / "basic.target.wants"
    wants.mkdir()
    (wants / "svc.service").symlink_to(stage.path)  # enabled: the manager keeps in mind how often it started
    stage.manager.run("daemon-reload")
    try:
        for _ in range(8):  # StartLimitBurst is 5 in 10 s unless the unit says otherwise
            one.destroy(5_000_000_000)
            assert one.start().pid
    finally:
        (wants / "svc.service").unlink()
        wants.rmdir()


def test_a_freeze_is_a_lease(stage: Stage) -> None:
    one = stage.service()
    one.start()
    one.freeze(time.monotonic_ns() + 600_000_000)
    wait_for(lambda: one.healthy() == "it is frozen")
    assert one.running
    wait_for(lambda: one.healthy() == "")
    one.freeze(time.monotonic_ns() + 600_000_000_000)
    wait_for(lambda: one.healthy() == "it is frozen")
    one.thaw()
    one.thaw()
    wait_for(lambda: one.healthy() == "")
    one.freeze(time.monotonic_ns() + 600_000_000_000)
    assert one.destroy(5_000_000_000) < 5_000_000_000


def test_a_unit_file_that_changed_is_not_started(stage: Stage) -> None:
    one = stage.service()
    stage.write("/bin/sleep 601")
    with pytest.raises(ServiceError) as refusal:
        one.start()
    assert refusal.value.id == "service.digest"
    assert not one.running


def test_a_unit_file_that_is_new_is_loaded_first(stage: Stage) -> None:
    stage.service().start()
    stage.service().destroy(0)
    time.sleep(1.1)  # the manager compares whole seconds
    stage.write("/bin/sleep 602")
    pid = stage.service().start().pid
    wait_for(lambda: Path(f"/proc/{pid}/cmdline").read_bytes() == b"/bin/sleep\x00602\x00")


def test_a_drop_in_that_is_not_declared_is_refused(stage: Stage) -> None:
    folder = stage.manager.units / "svc.service.d"
    folder.mkdir(exist_ok=True)
    drop_in = folder / "more.conf"
    drop_in.write_text("[Service]\nEnvironment=EVIL=1\n")
    stage.manager.run("daemon-reload")
    with pytest.raises(ServiceError) as refusal:
        stage.service().start()
    assert (refusal.value.id, refusal.value.got) == ("service.unit", f"it has the drop-in {drop_in}")
    files = [{"path": str(p), "sha256": sha256(p)} for p in (stage.path, drop_in)]
    assert stage.service(files=files).start().files == 2


def test_another_unit_file_than_the_declared_one_is_refused(stage: Stage, tmp_path: Path) -> None:
    other = tmp_path / "svc.service"
    other.write_text(stage.path.read_text())
    files = [{"path": str(other), "sha256": sha256(other)}]
    with pytest.raises(ServiceError) as refusal:
        stage.service(fragment=str(other), files=files).start()
    assert (refusal.value.id, refusal.value.got) == ("service.unit", f"its unit file is {stage.path}")


def test_a_unit_that_does_not_exist_is_refused_and_can_be_destroyed(stage: Stage) -> None:
    one = stage.service(unit="absent.service")
    with pytest.raises(ServiceError) as refusal:
        one.start()
    assert (refusal.value.id, refusal.value.got) == ("service.unit", "it is not-found")
    one.destroy(0)


def test_a_unit_that_fails_or_is_never_ready_is_an_error_and_does_not_run(stage: Stage, tmp_path: Path) -> None:
    stage.write("/bin/false", "Type=exec")
    ready = {"file": str(tmp_path / "never"), "timeout_ms": 300}
    with pytest.raises(ServiceError) as refusal:
        stage.service(ready=ready).start()
    assert refusal.value.id == "service.ended"
    stage.write()
    time.sleep(1.1)
    stage.write()
    with pytest.raises(ServiceError) as refusal:
        stage.service(ready=ready).start()
    assert refusal.value.id == "service.not-ready"
    assert not stage.service().running


def test_what_runs_as_declared_is_adopted_and_what_was_started_from_other_files_is_not(stage: Stage) -> None:
    first = stage.service()
    pid = first.start().pid
    next_one = stage.service()
    assert next_one.adopt() == ""
    assert next_one.pid == pid
    stage.path.touch()
    wrong = stage.service().adopt()
    assert wrong in ("it was started before its files were as they are", "its unit file changed since it was loaded")
    assert not stage.service().running
    assert stage.service().adopt() == NOTHING_LEFT


@pytest.mark.parametrize("timeout_ms", [5000, 100])
def test_a_unit_that_its_manager_is_just_starting_is_waited_for_as_long_as_it_may_take(
    stage: Stage, timeout_ms: int
) -> None:
    stage.write("/bin/sleep 600", "ExecStartPre=/bin/sleep 0.7")
    stage.manager.run("daemon-reload")
    stage.manager.run("start", "--no-block", "svc.service")
    one = stage.service(ready={"timeout_ms": timeout_ms})
    assert one.adopt() == ("" if timeout_ms > 700 else "it is activating")
    assert one.running == (timeout_ms > 700)


class Life:
    """Services of one executor after another, on the stage's manager."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.kinds = Kinds(PARENT, folder / "services", stage.spawner, Reach(systemd_bus=stage.manager.bus))

    def started(
        self, declaration: ServiceDeclaration, before: DeclaredServices | None = None, *earlier: ServiceDeclaration
    ) -> DeclaredServices:
        moved = lambda _number, _cgroup: None  # noqa: E731 - one callback
        if earlier:
            before = DeclaredServices.left({d.name: d for d in earlier}, self.kinds)
        services = DeclaredServices({declaration.name: declaration}, self.kinds, before, moved)
        for number in services.adopt():
            services.start(number)
        services.commit()
        return services


@pytest.fixture
def life(stage: Stage, tmp_path: Path) -> Iterator[Life]:
    life = Life(stage, tmp_path)
    yield life
    life.kinds.close()


@pytest.mark.parametrize("name", ["svc", "other"])
def test_a_unit_that_is_declared_otherwise_or_under_another_name_goes_on_as_the_new_one(
    stage: Stage, life: Life, name: str
) -> None:
    first = life.started(stage.declaration())
    pid = first.pids()["svc"]
    body = stage.declaration(grace_ms=5).body.model_dump(mode="json")
    second = life.started(declared("systemd", name, body), first)
    assert second.pids()[name] not in (0, pid)
    assert stage.service().running


@needs_cgroups
def test_a_service_that_is_of_another_kind_after_a_restart_runs_once(stage: Stage, life: Life, tmp_path: Path) -> None:
    unit, program = stage.declaration(), process(tmp_path, SLEEP)
    old = life.started(unit).pids()["svc"]
    second = life.started(program, None, unit)
    assert not stage.service().running
    assert not Path(f"/proc/{old}").exists()
    pid = second.pids()["svc"]
    assert pid
    third = life.started(unit, None, program)
    assert third.pids()["svc"]
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    second.release()
    third.stop_all()


@needs_cgroups
def test_a_process_that_is_a_unit_now_ends_also_where_the_log_does_not_know_it(
    stage: Stage, life: Life, tmp_path: Path
) -> None:
    first = life.started(process(tmp_path, SLEEP))
    pid = first.pids()["svc"]
    second = life.started(stage.declaration())
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    first.release()
    assert second.pids()["svc"]
    second.stop_all()


def test_of_a_unit_that_failed_nothing_is_left_to_adopt(stage: Stage) -> None:
    one = stage.service()
    os.kill(one.start().pid, signal.SIGKILL)
    wait_for(lambda: one.healthy() == "its unit is failed")
    assert stage.service().adopt() == NOTHING_LEFT


def test_a_bus_that_is_not_there_is_an_error_with_its_address(tmp_path: Path) -> None:
    address = f"unix:path={tmp_path}/no-bus"
    units = Units(address)
    with pytest.raises(ServiceError) as refusal:
        units.state("x.service")
    assert (refusal.value.id, refusal.value.want) == ("service.manager", address)


def test_a_bus_that_was_restarted_meanwhile_costs_no_answer(stage: Stage) -> None:
    assert stage.units.state("svc.service").load == "loaded"
    for connection in stage.units._idle:
        connection.sock.shutdown(2)
    assert stage.units.state("svc.service").load == "loaded"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "ANSWER_SECONDS", 0.5)


@contextlib.contextmanager
def silent_bus(path: Path) -> Iterator[str]:
    """Everybody is let in, and nobody is answered."""
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as opened:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    channel = opened.enter_context(listener.accept()[0])
                    channel.recv(4096)
                    channel.sendall(b"OK 0123456789abcdef0123456789abcdef\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"unix:path={path}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.usefixtures("impatient")
def test_a_bus_that_lets_in_and_says_nothing_is_given_up(tmp_path: Path) -> None:
    with silent_bus(tmp_path / "bus") as address:
        units, begin = Units(address), time.monotonic()
        with pytest.raises(ServiceError) as refusal:
            units.state("x.service")
        assert (refusal.value.id, refusal.value.want) == ("service.manager", address)
        assert time.monotonic() - begin < 5


@pytest.mark.usefixtures("impatient")
def test_who_asks_a_manager_that_hangs_waits_for_his_own_answer_only(tmp_path: Path) -> None:
    with silent_bus(tmp_path / "bus") as address, ThreadPoolExecutor(8) as pool:
        units, begin = Units(address), time.monotonic()
        asked = [pool.submit(units.state, "x.service") for _ in range(8)]
        assert {type(each.exception(timeout=20)) for each in asked} == {ServiceError}
        assert time.monotonic() - begin < 8 * 0.5


@pytest.mark.parametrize(
    ("process", "unit", "found"),
    [
        ("/c/app.slice/x.service", "/app.slice/x.service", "/c/app.slice/x.service"),
        ("/c/app.slice/x.service/sub/leaf", "/app.slice/x.service", "/c/app.slice/x.service"),
        ("/c/init.scope", "/app.slice/x.service", None),  # forked, not yet moved
        ("/c/app.slice/x.service2", "/app.slice/x.service", None),
        ("/c/anything", "", None),
        ("/c/anything", "/", None),
        (None, "/app.slice/x.service", None),
    ],
)
def test_only_the_units_own_cgroup_is_ever_taken(process: str | None, unit: str, found: str | None) -> None:
    got = _unit_group(Cgroup(Path(process)) if process else None, unit)
    assert (str(got.path) if got else None) == found
