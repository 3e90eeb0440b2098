"""What a start that fails means to whoever supervises `pointcall run`: try again, or call a person."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pointcall_executor import beginning, cli
from pointcall_executor.cli.output import EnvironmentRefusal, Exit
from pointcall_executor.cli.run import passes
from pointcall_executor.config import ConfigError
from pointcall_executor.journal import DamagedError, Journal, JournalError, StorageError


def opening(path: Path, **settings: Any) -> Exception:
    with pytest.raises(JournalError) as refusal:
        Journal.open(path, origin="pointcall.dev/log/n", **settings).close()
    return refusal.value


class Failing(sqlite3.Connection):
    """A disk that fails in SQLite's own words."""

    code = sqlite3.SQLITE_FULL

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        if "insert into meta" in sql:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = self.code
            raise error
        return super().execute(sql, *args)


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    lock = os.open(tmp_path / "journal.db.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield tmp_path / "journal.db"
    os.close(lock)


def test_another_writer_ends_some_day(locked: Path) -> None:
    assert passes(opening(locked), locked.parent)


@pytest.mark.parametrize(
    ("code", "again"),
    [
        (sqlite3.SQLITE_FULL, True),
        (sqlite3.SQLITE_IOERR_FSYNC, True),
        (sqlite3.SQLITE_READONLY_DBMOVED, True),
        (sqlite3.SQLITE_BUSY, True),
        (sqlite3.SQLITE_CANTOPEN, False),
        (sqlite3.SQLITE_CORRUPT, False),
    ],
)
def test_what_sqlite_says_of_the_disk_counts(
    tmp_path: Path, code: int, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "code", code)
    error = opening(tmp_path / "journal.db", connection=Failing)
    assert isinstance(error, StorageError)
    assert passes(error, tmp_path) == again


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_fails_is_tried_again_and_another_file_system_is_not(tmp_path: Path, number: int) -> None:
    assert passes(OSError(number, "write"), tmp_path)
    assert passes(OSError(number, "open", str(tmp_path / "run/executor.json")), tmp_path)
    assert not passes(OSError(number, "mkdir", "/sys/fs/cgroup/pointcall"), tmp_path)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE])
def test_a_machine_that_is_short_of_something_is_tried_again_wherever_it_was(tmp_path: Path, number: int) -> None:
    assert passes(OSError(number, "fork"), tmp_path)
    assert passes(OSError(number, "open", "/sys/fs/cgroup/pointcall"), tmp_path)
    assert passes(MemoryError(), tmp_path)


def test_what_a_restart_cannot_mend_is_not_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(b"no database at all" * 400)
    for error in (
        opening(path),
        EnvironmentRefusal("no hook", id="kernel.missing"),
        ConfigError("wrong"),
        PermissionError(errno.EACCES, "open", str(path)),
        FileNotFoundError(errno.ENOENT, "open", str(path)),
        ValueError("a bug"),
    ):
        assert not passes(error, tmp_path), error


def test_an_error_that_is_its_own_cause_ends_the_search(tmp_path: Path) -> None:
    error = ValueError("a bug")
    error.__cause__ = error
    assert not passes(error, tmp_path)
    damaged = tmp_path / "journal.db"
    damaged.write_bytes(b"no database at all" * 400)
    found = opening(damaged)
    assert found.__cause__ is not found


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), Exit.FAILED),
        (PermissionError(errno.EACCES, "Permission denied"), Exit.ENVIRONMENT),
        (EnvironmentRefusal("no hook", id="kernel.missing"), Exit.ENVIRONMENT),
        (ConfigError("wrong"), Exit.USAGE),
        (MemoryError(), Exit.FAILED),
        (DamagedError("entry 7 is missing"), Exit.LOG),
        (JournalError("of another node", id="journal.origin"), Exit.LOG),
        (StorageError("unable to open database file"), Exit.REFUSED),
    ],
)
def test_the_verb_ends_with_the_code_that_says_so(
    error: Exception, code: Exit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def begin(*_: Any) -> None:
        raise error

    monkeypatch.setattr(beginning, "begin", begin)
    monkeypatch.setattr(beginning, "leave_in_order", lambda: None)
    assert cli.main(["run", "--state-dir", str(tmp_path)]) == code
    assert "pointcall: error:" in capsys.readouterr().err
