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
    (tmp_path / "cgroup.subtree_control").write_text("pids")
    (tmp_path / "parent/cgroup.subtree_control").write_text("memory")
    made.limit_tasks(8)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "pids"
    assert (tmp_path / "parent/cgroup.subtree_control").read_text() == "+pids"
    assert (made.folder / "pids.max").read_text() == "8"
