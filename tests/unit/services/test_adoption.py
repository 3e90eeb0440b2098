"""Services outlive an executor that is killed, and the next one adopts what it can prove, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.declaration import ServiceDeclaration
from pointcall_executor.kernel.cgroup import Cgroup, find_root
from pointcall_executor.services import record as records
from pointcall_executor.services.chores import CHORES
from pointcall_executor.services.groups import remove_empty
from pointcall_executor.services.managed import NOTHING_LEFT, ServiceError
from pointcall_executor.services.process import Process
from pointcall_executor.services.record import RunRecord, born, disproved
from pointcall_executor.services.spawning import Spawner
from tests.unit.services.world import (
    LISTEN,
    declared,
    free_port,
    needs_cgroups,
    process,
    remove_spawners,
    sha256,
    wait_for,
)

PARENT = f"pointcall-adopt-{os.getpid()}"
# An executor reduced to its services: starts one, freezes it if asked to, tells the pids, waits to be killed.
EXECUTOR = """
import sys, time
from pathlib import Path
from pointcall_attest.declaration import ServiceDeclaration
from pointcall_executor.services.process import Process
from pointcall_executor.services.spawning import Spawner
parent, folder, declaration, frozen = sys.argv[1:]
spawner = Spawner(parent).watch()
one = Process(ServiceDeclaration.parse(Path(declaration).read_bytes()), parent, Path(folder), spawner)
one.start()
if frozen == "frozen": one.freeze(time.monotonic_ns() + 600_000_000_000)
print(one.pid, spawner.pid, flush=True)
time.sleep(600)
"""
# The next executor as `pointcall run` is: its spawner has all privileges, it has given up its own.
WITHOUT = """
import sys
from pathlib import Path
from pointcall_attest.declaration import ServiceDeclaration
from pointcall_executor import privileges
from pointcall_executor.services.process import Process
from pointcall_executor.services.spawning import Spawner
parent, folder, declaration = sys.argv[1:]
spawner = Spawner(parent)
privileges.drop("", [], [])
one = Process(ServiceDeclaration.parse(Path(declaration).read_bytes()), parent, Path(folder), spawner)
print(repr(one.adopt()), one.pid, flush=True)
spawner.close()
"""
# As it is after `user` was set: what was root's is handed over, and the executor is that account.
OTHER = """
import os, sys
from pathlib import Path
from pointcall_attest.declaration import ServiceDeclaration
from pointcall_executor import privileges
from pointcall_executor.handover import delegate
from pointcall_executor.services.chores import CHORES
from pointcall_executor.services.groups import instances
from pointcall_executor.services.process import Process
from pointcall_executor.services.record import born
from pointcall_executor.services.spawning import Spawner
parent, folder, declaration, account = sys.argv[1:]
delegate(parent, account)
os.chown(folder, privileges.pwd.getpwnam(account).pw_uid, -1)
spawner = Spawner(parent)
privileges.drop(account, [], [])
declared = ServiceDeclaration.parse(Path(declaration).read_bytes())
one = Process(declared, parent, Path(folder).parent, spawner)
wrong, old = one.adopt(), one.pid
left = len(instances(parent, "svc"))
new = one.start().pid
print(repr(wrong), old, born(old), new != old, left, flush=True)
one.release(); one.destroy(0); CHORES.finish()
print(len(instances(parent, "svc")), flush=True)
spawner.close()
"""
TALK = """
import socket, sys, time
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
n = 0
while True:
    print("line", n, "x" * 80, flush=True); n += 1; time.sleep(0.01)
"""

pytestmark = needs_cgroups


class Stage:
    """Dead executors and a living one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.spawner = Spawner(PARENT).watch()
        self.made: list[Process] = []

    def declaration(self, source: str = LISTEN, **over: Any) -> ServiceDeclaration:
        return process(self.folder, source, str(self.port), ready={"tcp": f"127.0.0.1:{self.port}"}, **over)

    def killed(self, declaration: ServiceDeclaration, raw: bytes, frozen: str = "") -> tuple[int, int]:
        """(pid, pid of its spawner) of a service whose executor was killed."""
        path = self.folder / "declared.json"
        path.write_bytes(raw)
        command = [sys.executable, "-c", EXECUTOR, PARENT, str(self.folder / "state"), str(path), frozen]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as executor:
            assert executor.stdout is not None
            pid, spawner = map(int, executor.stdout.readline().split())
            executor.send_signal(signal.SIGKILL)
        return pid, spawner

    def next(self, declaration: ServiceDeclaration) -> Process:
        self.made.append(Process(declaration, PARENT, self.folder / "state", self.spawner))
        return self.made[-1]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    for one in stage.made:
        one.adopt()
        one.destroy(0)
        one.release()
    stage.spawner.close()
    remove_empty(PARENT)
    remove_spawners(PARENT)


def raw(stage: Stage, source: str = LISTEN, **over: Any) -> bytes:
    """The bytes of the same declaration that `Stage.declaration` parses."""
    one = stage.declaration(source, **over)
    body = {"format": "pointcall-service/v1", "name": "svc", "kind": "process"}
    return json.dumps(body | {"process": one.process.model_dump(mode="json")}).encode()


def killed(stage: Stage, source: str = LISTEN, frozen: str = "") -> tuple[ServiceDeclaration, int, int]:
    content = raw(stage, source)
    declaration = ServiceDeclaration.parse(content)
    return declaration, *stage.killed(declaration, content, frozen)


def test_a_service_goes_on_when_its_executor_is_killed_and_the_next_one_adopts_it(stage: Stage) -> None:
    declaration, pid, _ = killed(stage)
    one = stage.next(declaration)
    assert one.adopt() == ""
    assert one.pid == pid
    assert one.running
    assert one.cgroup_id == (find_root() / records.read(one.folder).cgroup).stat().st_ino  # type: ignore[union-attr]
    assert one.healthy() == ""
    assert one.adopt() == ""
    one.signal(signal.SIGKILL)
    wait_for(lambda: not one.running)
    assert one.start().pid != pid


def test_an_executor_without_privileges_adopts_what_runs_with_all_of_them(stage: Stage) -> None:
    declaration, pid, spawner = killed(stage, TALK)
    os.kill(spawner, signal.SIGKILL)  # so that its output has to be read on as well
    log = stage.folder / "state/svc/output.log"
    wait_for(lambda: not born(spawner))
    command = [sys.executable, "-c", WITHOUT, PARENT, str(stage.folder / "state"), str(stage.folder / "declared.json")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    before = log.stat().st_size
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as executor:
        assert executor.stdout is not None
        assert executor.stdout.readline().split() == ["''", str(pid)]
    wait_for(lambda: log.stat().st_size > before)
    assert stage.next(declaration).adopt() == ""


def test_what_root_started_can_be_ended_by_the_account_that_the_executor_became(stage: Stage) -> None:
    program = Path("/bin/sleep").resolve()
    with tempfile.TemporaryDirectory(prefix="pointcall-", dir="/tmp") as name:  # that every account can enter
        folder, path = Path(name) / "svc", Path(name) / "declared.json"
        Path(name).chmod(0o755)
        body = {"argv": [str(program), "600"], "files": [{"path": str(program), "sha256": sha256(program)}]}
        declaration = declared("process", "svc", body | {"directory": "/"})
        path.write_text(json.dumps({"format": "pointcall-service/v1", "name": "svc", "kind": "process",
                                    "process": declaration.process.model_dump(mode="json")}))  # fmt: skip
        stage.made.append(Process(ServiceDeclaration.parse(path.read_bytes()), PARENT, Path(name), stage.spawner))
        pid = stage.made[0].start().pid
        assert CHORES.finish()  # an instance that waits for its turn
        Cgroup.create(f"{PARENT}/svc.7")  # and one that waited
        command = [sys.executable, "-c", OTHER, PARENT, str(folder), str(path), "nobody"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        said = subprocess.run(command, capture_output=True, env=environment, text=True, check=False, timeout=60)
        assert said.stdout.split() == ["''", str(pid), "0", "True", "1", "0"], said.stderr


def test_a_freeze_ends_with_the_executor_that_asked_for_it(stage: Stage) -> None:
    declaration, pid, _ = killed(stage, frozen="frozen")
    folder = find_root() / records.read(stage.folder / "state/svc").cgroup  # type: ignore[union-attr]
    wait_for(lambda: "frozen 0" in (folder / "cgroup.events").read_text())
    one = stage.next(declaration)
    assert one.adopt() == ""
    assert one.pid == pid


def test_a_restart_thaws_what_a_dead_spawner_left_frozen(stage: Stage) -> None:
    declaration, pid, spawner = killed(stage)
    os.kill(spawner, signal.SIGKILL)
    folder = find_root() / records.read(stage.folder / "state/svc").cgroup  # type: ignore[union-attr]
    (folder / "cgroup.freeze").write_text("1")
    wait_for(lambda: "frozen 1" in (folder / "cgroup.events").read_text())
    one = stage.next(declaration)
    assert one.adopt() == ""
    assert one.pid == pid
    assert "frozen 0" in (folder / "cgroup.events").read_text()


def elsewhere(stage: Stage, declaration: ServiceDeclaration) -> Process:
    """For an executor whose setting `cgroup` is another one."""
    stage.made.append(Process(declaration, f"{PARENT}-other", stage.folder / "state", stage.spawner))
    return stage.made[-1]


def test_what_runs_below_another_cgroup_than_the_settings_name_ends_before_the_next_one_starts(stage: Stage) -> None:
    declaration, pid, _ = killed(stage)
    old = records.read(stage.folder / "state/svc")
    one = elsewhere(stage, declaration)
    assert old is not None
    assert one.adopt() == f"it ran in {old.cgroup}"
    wait_for(lambda: not born(pid))
    assert records.read(stage.folder / "state/svc") is None
    assert one.start().pid != pid
    assert one.healthy() == ""
    one.destroy(0)
    assert CHORES.finish()
    assert not (find_root() / old.cgroup).exists()
    remove_empty(f"{PARENT}-other")


def test_what_lives_in_a_place_that_proves_nothing_is_left_alone_and_no_second_one_starts(stage: Stage) -> None:
    declaration, pid, _ = killed(stage)
    with Path(f"/proc/{pid}/cgroup").open() as rows:
        before = next(row[4:].strip() for row in rows if row.startswith("0::/"))
    moved = Cgroup.create(f"{PARENT}-moved")
    try:
        moved.add(pid)
        for one in (stage.next(declaration), elsewhere(stage, declaration)):
            with pytest.raises(ServiceError) as refusal:
                one.adopt()
            assert (refusal.value.id, f"/{PARENT}-moved" in refusal.value.got) == ("service.elsewhere", True)
            assert born(pid)
    finally:
        Cgroup(find_root() / before).add(pid)
        moved.remove()
    assert stage.made[0].adopt() == ""


def test_a_record_that_names_a_strangers_process_ends_nothing(stage: Stage) -> None:
    declaration, pid, _ = killed(stage)
    good = records.read(stage.folder / "state/svc")
    assert good is not None
    with subprocess.Popen(["/bin/sleep", "600"]) as stranger:
        forged = {"pid": stranger.pid, "born": born(stranger.pid)}
        for cgroup in (good.cgroup, "/", f"{PARENT}/../svc.1"):
            records.write(stage.folder / "state/svc", RunRecord(**good.model_dump() | forged | {"cgroup": cgroup}))
            with pytest.raises(ServiceError, match="another cgroup"):
                elsewhere(stage, declaration).adopt()
            assert stranger.poll() is None
        stranger.kill()
        stranger.wait()
    assert born(pid)
    records.write(stage.folder / "state/svc", good)


@pytest.mark.parametrize("gone", [{"boot": "another"}, {"born": 1}, {"pid": 2**22 + 1}])
def test_a_record_of_what_has_ended_stops_no_start(stage: Stage, gone: dict[str, Any]) -> None:
    declaration, _, _ = killed(stage)
    good = records.read(stage.folder / "state/svc")
    assert good is not None
    records.write(stage.folder / "state/svc", RunRecord(**good.model_dump() | gone))
    assert elsewhere(stage, declaration).adopt() == NOTHING_LEFT
    stage.next(declaration).adopt()


def test_what_is_frozen_and_not_declared_any_more_ends(stage: Stage) -> None:
    declaration, pid, spawner = killed(stage)
    os.kill(spawner, signal.SIGKILL)
    folder = find_root() / records.read(stage.folder / "state/svc").cgroup  # type: ignore[union-attr]
    (folder / "cgroup.freeze").write_text("1")
    wait_for(lambda: "frozen 1" in (folder / "cgroup.events").read_text())
    changed = ServiceDeclaration.parse(raw(stage, environment={"A": "b"}))
    assert stage.next(changed).adopt() == "it was declared otherwise"
    assert not folder.exists()
    wait_for(lambda: not born(pid))
    assert declaration.name == "svc"


@pytest.mark.parametrize("spawner_dies", [False, True])
def test_output_is_kept_while_no_executor_lives_and_after_its_spawner_died(stage: Stage, spawner_dies: bool) -> None:
    declaration, _, spawner = killed(stage, TALK)
    log = stage.folder / "state/svc/output.log"
    if spawner_dies:
        os.kill(spawner, signal.SIGKILL)
        wait_for(lambda: not born(spawner))
    else:
        before = log.stat().st_size
        wait_for(lambda: log.stat().st_size > before + 500)
    one = stage.next(declaration)
    assert one.adopt() == ""
    before = log.stat().st_size
    wait_for(lambda: log.stat().st_size > before + 500)
    lines = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("line")]
    assert lines == list(range(len(lines)))  # nothing lost, nothing twice


def test_the_spawner_ends_with_the_last_of_its_services(stage: Stage) -> None:
    declaration, _, spawner = killed(stage)
    assert born(spawner)
    one = stage.next(declaration)
    assert one.adopt() == ""
    one.destroy(0)
    wait_for(lambda: not born(spawner))


def test_what_changed_on_disk_after_the_start_is_no_proof(stage: Stage) -> None:
    declaration, pid, _ = killed(stage)
    changed = ServiceDeclaration.parse(raw(stage, environment={"A": "b"}))
    one = stage.next(changed)
    assert one.adopt() == "it was declared otherwise"
    wait_for(lambda: not born(pid))
    assert declaration.sha256 != changed.sha256


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "boot": ({"boot": "another"}, "the machine was booted since"),
    "name": ({"name": "other"}, "it was declared otherwise"),
    "declaration": ({"declaration": "0" * 64}, "it was declared otherwise"),
    "born": ({"born": 1}, "its process is not the one that was started"),
    "foreign cgroup": ({"cgroup": "somewhere/svc.1"}, "no cgroup of this service"),
    "climbing cgroup": ({"cgroup": f"{PARENT}/svc.1/../x.2"}, "no cgroup of this service"),
    "earlier cgroup": ({"cgroup": f"{PARENT}/svc.1"}, "in another cgroup"),
    "cgroup id": ({"cgroup_id": 1}, "its cgroup is another one"),
    "inode": ({"inode": 1}, "it runs another program"),
    "device": ({"device": 1}, "it runs another program"),
    "pid": ({"pid": os.getpid()}, "its process is not the one that was started"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_one_wrong_fact_is_enough(stage: Stage, wrong: str) -> None:
    one = stage.next(stage.declaration())
    one.start()
    good = records.read(one.folder)
    assert good is not None
    assert disproved(good, one.declaration, PARENT) == ""
    over, why = WRONG[wrong]
    assert why in disproved(RunRecord(**good.model_dump() | over), one.declaration, PARENT)


def test_a_process_that_became_another_program_is_not_adopted(stage: Stage) -> None:
    source = "import os, socket, sys\nif len(sys.argv) < 3: os.execv('/bin/sleep', ['sleep', '600'])\n"
    content = json.loads(raw(stage, source))
    content["process"]["ready"] = {}
    declaration = ServiceDeclaration.parse(json.dumps(content).encode())
    pid, _ = stage.killed(declaration, json.dumps(content).encode())
    wait_for(lambda: Path(f"/proc/{pid}/exe").resolve().name != Path(sys.executable).resolve().name)
    assert stage.next(declaration).adopt() == "it runs another program"
    wait_for(lambda: not born(pid))


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff" * 5000, b'{"format": "pointcall-running/v1"}'])
def test_a_record_that_is_none_means_that_nothing_is_adopted(stage: Stage, content: bytes) -> None:
    one = stage.next(stage.declaration())
    one.folder.mkdir(parents=True)
    (one.folder / records.FILE).write_bytes(content)
    assert one.adopt() == NOTHING_LEFT
    group = Cgroup.create(f"{PARENT}/{one.name}.7")
    with subprocess.Popen(["/bin/sleep", "600"]) as left:
        group.add(left.pid)  # something of it is left: whoever took its record away is noticed
        assert stage.next(stage.declaration()).adopt() == "there is no record of it"
        assert left.wait() == -signal.SIGKILL
    assert not (find_root() / PARENT / f"{one.name}.7").exists()


def test_a_record_that_cannot_be_written_costs_the_adoption_not_the_start(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_folder: Path, _record: RunRecord) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "write", full)
    one = stage.next(stage.declaration())
    assert one.start().pid
    assert records.read(one.folder) is None


def test_a_service_that_hangs_is_not_adopted(stage: Stage) -> None:
    declaration, pid, _ = killed(
        stage,
        LISTEN.replace("while True:", "import time; time.sleep(1); listener.close()\nwhile True: time.sleep(1)\n#"),
    )
    time.sleep(1.2)
    assert "nobody listens" in stage.next(declaration).adopt()
    wait_for(lambda: not born(pid))
