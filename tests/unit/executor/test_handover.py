"""Handing the state folder over: the account gets what it writes, and nothing that a link of its own leads to."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from pointcall_executor import probes
from pointcall_executor.durable import write_whole
from pointcall_executor.handover import OURS, READ, hand_over
from pointcall_executor.privileges import PrivilegeError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
NOBODY = pwd.getpwnam("nobody")


def owner(path: Path) -> tuple[int, int, int]:
    about = path.lstat()
    return about.st_uid, about.st_gid, about.st_mode & 0o7777


def test_it_gets_what_it_writes_and_reads_the_rest(tmp_path: Path) -> None:
    state = tmp_path / "state"
    (state / "services" / "api").mkdir(parents=True)
    (state / "services" / "api" / "output.log").write_text("said")
    (state / "trust").mkdir(mode=0o700)
    (state / "trust" / "policy.json").write_text("{}")
    probes.note(state, {"what": "begins"})  # by root, while no executor ran
    files = ("journal.db", "journal.db-wal", "pins.lost", "learned.json", "standing.json")  # by an executor as root
    for name in files:
        (state / name).touch()
    hand_over(state, "nobody")
    mine, group = NOBODY.pw_uid, NOBODY.pw_gid
    for name in (*OURS, *files, "services/api", "services/api/output.log", "probes.jsonl"):
        assert owner(state / name)[:2] == (mine, group), name
    for name in READ:
        assert owner(state / name) == (0, group, 0o750), name
    assert owner(state / "trust" / "policy.json") == (0, group, 0o640)
    assert owner(state) == (0, group, 0o1771)


def folder_is_a_link(state: Path, elsewhere: Path) -> None:
    (state / "services").symlink_to(elsewhere)


def read_folder_is_a_link(state: Path, elsewhere: Path) -> None:
    (state / "manifest").symlink_to(elsewhere)


def file_has_another_name(state: Path, elsewhere: Path) -> None:
    (state / "run").mkdir()
    os.link(elsewhere / "shadow", state / "run" / "x")


def journal_is_a_link(state: Path, elsewhere: Path) -> None:
    (state / "journal.db-x").symlink_to(elsewhere / "shadow")


@pytest.mark.parametrize("trick", [folder_is_a_link, read_folder_is_a_link, file_has_another_name, journal_is_a_link])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, trick: Callable[[Path, Path], None]) -> None:
    state, elsewhere = tmp_path / "state", tmp_path / "etc"
    state.mkdir()
    elsewhere.mkdir()
    (elsewhere / "shadow").touch(mode=0o600)
    trick(state, elsewhere)
    with pytest.raises(PrivilegeError) as refused:
        hand_over(state, "nobody")
    assert refused.value.id == "privilege.handover"
    assert owner(elsewhere / "shadow") == (0, 0, 0o600)


def test_a_link_below_a_folder_stays_as_it_is(tmp_path: Path) -> None:
    state, elsewhere = tmp_path / "state", tmp_path / "etc"
    (state / "services").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "shadow").touch(mode=0o600)
    (state / "services" / "folder").symlink_to(elsewhere)
    (state / "services" / "file").symlink_to(elsewhere / "shadow")
    hand_over(state, "nobody")
    assert owner(elsewhere / "shadow") == (0, 0, 0o600)


def test_root_writes_through_no_link_that_the_account_made(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    (tmp_path / f"halt.json.{os.getpid()}.new").symlink_to(victim)
    write_whole(tmp_path / "halt.json", b"{}")
    (tmp_path / probes.FILE).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic"):
        probes.note(tmp_path, {"what": "begins"})
    assert (victim.read_text(), (tmp_path / "halt.json").read_bytes()) == ("as it was", b"{}")


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "halt.json", b"old")

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "halt.json", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["halt.json"]
    assert (tmp_path / "halt.json").read_bytes() == b"old"
