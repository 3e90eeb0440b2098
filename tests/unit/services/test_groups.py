"""The folders of an instance: what cannot be removed is no reason to leave the rest."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pointcall_executor.services import groups


def test_a_folder_that_cannot_be_removed_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy, memory = tmp_path / "v2", tmp_path / "v1"
    for folder in (busy, memory):
        (folder / "below").mkdir(parents=True)
    real, tried = Path.rmdir, []

    def rmdir(path: Path) -> None:
        tried.append(path)
        if path == busy:
            raise OSError(errno.EBUSY, "busy")
        real(path)

    monkeypatch.setattr(groups, "EMPTY_SECONDS", 0.01)
    monkeypatch.setattr(Path, "rmdir", rmdir)
    with pytest.raises(OSError, match="busy"):
        groups._remove_all([busy, memory])
    assert tried[0] == busy / "below"  # in the order that is given
    assert busy.exists()
    assert not memory.exists()


def test_where_a_limit_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, v1 = tmp_path / "v2", tmp_path / "v1"
    root.mkdir()
    monkeypatch.setattr(groups, "find_root", lambda: root)
    monkeypatch.setattr(groups, "v1_mount", lambda name: v1 if name == "pids" else None)
    (root / "cgroup.controllers").write_text("cpu memory\n")
    assert [groups.limit_place(name) for name in ("pids", "memory", "io")] == [str(v1), str(root), ""]
    assert groups.trees() == (root, v1)


def test_on_a_pure_v2_host_each_folder_above_is_told_to_pass_the_controller_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "find_root", lambda: tmp_path)
    monkeypatch.setattr(groups, "v1_mount", lambda _name: None)
    made = groups.ServiceGroups("parent/svc.1")
    made.folder.mkdir(parents=True)
    (tmp_path / "cgroup.controllers").write_text("memory pids")
    (tmp_path / "cgroup.subtree_control").write_text("pids")
    (tmp_path / "parent/cgroup.subtree_control").write_text("memory")
    made.limit_tasks(8)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "pids"
    assert (tmp_path / "parent/cgroup.subtree_control").read_text() == "+pids"
    assert (made.folder / "pids.max").read_text() == "8"


def test_a_pure_v2_host_without_the_controller_says_that_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "find_root", lambda: tmp_path)
    monkeypatch.setattr(groups, "v1_mount", lambda _name: None)
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    with pytest.raises(FileNotFoundError, match="no controller pids"):  # what the kernel calls EINVAL
        groups.ServiceGroups("parent/svc.1").limit_tasks(8)


def test_an_account_gets_the_v2_folders_of_instances_and_empty_v1_folders_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    v2, v1 = tmp_path / "v2", tmp_path / "v1"
    monkeypatch.setattr(groups, "trees", lambda: (v2, v1))
    owned = [v2 / "pc/svc.1", v2 / "pc/svc.1/cgroup.kill", v2 / "pc/a.b.2", v2 / "pc/svc.1/below"]
    others = [v2 / "pc/spawner", v2 / "pc/svc.x", v2 / "pc/svc.1/below/cgroup.kill", v1 / "pc/svc.3/below", v1 / "pc"]
    for path in (*owned, *others):
        if path.name == "cgroup.kill":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        else:
            path.mkdir(parents=True, exist_ok=True)
    (v1 / "pc/svc.4").mkdir()
    given: dict[Path, tuple[int, int]] = {}
    monkeypatch.setattr(groups.os, "chown", lambda path, uid, gid, *, follow_symlinks: given.update({path: (uid, gid)}))
    groups.give_instances("pc", 7, 8)
    assert given == dict.fromkeys(owned, (7, 8))
    assert sorted(p.name for p in (v1 / "pc").iterdir()) == ["svc.3"]
    assert groups.instances("pc", "svc") == {"pc/svc.1", "pc/svc.3"}
    assert groups.instances("pc", "a.b") == {"pc/a.b.2"}
