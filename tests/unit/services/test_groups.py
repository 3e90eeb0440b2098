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
