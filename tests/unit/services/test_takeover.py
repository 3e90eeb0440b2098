"""One session's services take over from another's, with real processes: what changed is replaced, or put back."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointcall_attest.declaration import ServiceDeclaration
from pointcall_executor.kernel.cgroup import find_root
from pointcall_executor.services.chores import CHORES
from pointcall_executor.services.declared import DeclaredServices, Kinds
from pointcall_executor.services.groups import ServiceGroups, remove_empty
from pointcall_executor.services.managed import ServiceError
from pointcall_executor.services.record import FILE
from pointcall_executor.services.spawning import Spawner
from pointcall_runbook.vocabulary import service
from tests.unit.services.world import wait_for

PARENT = f"pointcall-takeover-{os.getpid()}"
SLEEP = "import time; time.sleep(600)"
A, B, C = (service(name).number for name in "abc")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access(find_root(), os.W_OK), reason="needs root and a writable cgroup v2 tree"
)


class Stage:
    """Makes services one after another, and remembers every move that they announce."""

    def __init__(self, folder: Path, spawner: Spawner) -> None:
        self.folder, self.kinds = folder, Kinds(PARENT, folder, spawner)
        self.made: list[DeclaredServices] = []
        self.moves: list[tuple[int, bool]] = []

    def declaration(self, name: str, source: str) -> ServiceDeclaration:
        script, program = self.folder / f"{name}-{len(source)}.py", Path(sys.executable).resolve()
        script.write_text(source)
        files = [{"path": str(p), "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in (program, script)]
        process = {"argv": [str(program), "-I", "-S", str(script)], "files": files, "directory": str(self.folder)}
        body = {"format": "pointcall-service/v1", "name": name, "kind": "process", "process": process}
        return ServiceDeclaration.parse(json.dumps(body).encode())

    def services(self, before: DeclaredServices | None = None, **sources: str) -> DeclaredServices:
        declarations = {n: self.declaration(n, s) for n, s in sources.items()}
        moved = lambda number, cgroup: self.moves.append((number, bool(cgroup)))  # noqa: E731 - one callback
        self.made.append(DeclaredServices(declarations, self.kinds, before, moved))
        return self.made[-1]

    def started(self, before: DeclaredServices | None = None, **sources: str) -> DeclaredServices:
        found = self.services(before, **sources)
        for number in found.adopt():
            found.start(number)
        return found


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    spawner = Spawner(PARENT).watch()
    stage = Stage(tmp_path, spawner)
    yield stage
    for services in stage.made:
        services.stop_all()
    spawner.close()
    remove_empty(PARENT)


def test_what_is_declared_alike_goes_on_and_is_announced_again(stage: Stage) -> None:
    first = stage.started(a=SLEEP, b=SLEEP)
    first.commit()
    stage.moves.clear()
    second = stage.started(first, a=SLEEP, b=SLEEP)
    second.commit()
    assert second.pids() == first.pids()
    assert stage.moves == [(A, True), (B, True)]


def test_what_changed_is_replaced_and_what_is_gone_is_destroyed_at_the_end(stage: Stage) -> None:
    first = stage.started(a=SLEEP, b=SLEEP, c=SLEEP)
    first.commit()
    before = first.pids()
    second = stage.started(first, a=SLEEP, b=SLEEP + " # other")
    assert first.pids()["c"] == before["c"]
    second.commit()
    assert second.pids()["a"] == before["a"]
    assert second.pids()["b"] not in (0, before["b"])
    assert first.pids()["c"] == first.pids()["b"] == 0


def test_what_was_begun_is_put_back(stage: Stage) -> None:
    first = stage.started(a=SLEEP, b=SLEEP)
    first.commit()
    before = first.pids()
    second = stage.started(first, a=SLEEP, b=SLEEP + " # other", c=SLEEP)
    assert first.pids()["b"] == 0
    second.undo()
    assert first.pids()["a"] == before["a"]
    assert first.pids()["b"] not in (0, before["b"])
    assert second.pids()["c"] == 0
    assert CHORES.finish()
    assert {p.name.split(".")[0] for p in (find_root() / PARENT).iterdir() if p.is_dir()} == {"a", "b"}


def test_a_start_that_fails_half_way_leaves_the_old_one_to_be_put_back(stage: Stage) -> None:
    first = stage.started(a=SLEEP)
    first.commit()
    broken = stage.services(first, a=SLEEP + " # other")
    (stage.folder / f"a-{len(SLEEP + ' # other')}.py").write_text("changed after it was declared")
    (number,) = broken.adopt()
    with pytest.raises(ServiceError):
        broken.start(number)
    broken.undo()
    assert first.pids()["a"] != 0


@pytest.mark.parametrize("ended", [False, True])
def test_what_replaces_another_keeps_its_own_record(stage: Stage, ended: bool) -> None:
    first = stage.started(b=SLEEP)
    first.commit()
    if ended:  # it is destroyed only after the new one has written its record
        first.signal(B, signal.SIGKILL)
        wait_for(lambda: not first.pids()["b"])
    second = stage.started(first, b=SLEEP + " # other")
    second.commit()
    assert CHORES.finish()
    third = stage.services(None, b=SLEEP + " # other")
    assert third.adopt() == []
    assert third.pids() == second.pids()


def test_what_cannot_be_ended_is_still_watched(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    first = stage.started(b=SLEEP)
    first.commit()
    stage.moves.clear()

    def refused(_self: ServiceGroups) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(ServiceGroups, "destroy", refused)
        with pytest.raises(ServiceError, match="cannot be ended"):
            first.destroy(B, 0)
    assert stage.moves == [(B, False), (B, True)]
    first.destroy(B, 0)
    assert stage.moves[2:] == [(B, False)]


def test_what_is_put_back_keeps_its_own_record(stage: Stage) -> None:
    first = stage.started(b=SLEEP)
    first.commit()
    second = stage.started(first, b=SLEEP + " # other")
    second.undo()
    assert CHORES.finish()
    third = stage.services(None, b=SLEEP)
    assert third.adopt() == []
    assert third.pids() == first.pids()


def test_what_ended_for_good_leaves_no_record(stage: Stage) -> None:
    first = stage.started(b=SLEEP)
    first.commit()
    assert (stage.folder / "b" / FILE).exists()
    first.stop_all()
    assert CHORES.finish()
    assert not (stage.folder / "b" / FILE).exists()


def test_an_earlier_executors_service_is_adopted_if_it_is_declared_alike_and_destroyed_if_not(stage: Stage) -> None:
    first = stage.started(a=SLEEP, b=SLEEP, c=SLEEP)
    old = first.pids()
    stage.moves.clear()
    second = stage.started(None, a=SLEEP, b=SLEEP + " # other")
    assert second.pids()["a"] == old["a"]
    assert second.pids()["b"] not in (0, old["b"])
    assert second.refused == {"a": "", "b": "it was declared otherwise"}
    assert stage.moves[0] == (A, True)
    assert first.pids() == {"a": old["a"], "b": 0, "c": old["c"]}
    second.commit()
    assert first.pids()["c"] == 0


def test_an_empty_folder_is_nothing_that_was_left(stage: Stage) -> None:
    empty = find_root() / PARENT / "a.77"
    empty.mkdir(parents=True)
    second = stage.started(None, a=SLEEP)
    assert second.refused == {"a": ""}
    assert not empty.exists()
    (find_root() / PARENT / "c.78").mkdir()
    assert second.commit() == {}
