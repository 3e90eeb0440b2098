"""`pointcall halt`: what it takes out of the kernel is what `pointcall run` put there, however the folder is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pointcall_executor import cli
from pointcall_executor.halt import FILE, halted
from pointcall_executor.pins import Pins


def test_a_relative_state_folder_has_the_pins_of_the_absolute_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[Path] = []
    monkeypatch.setattr(Pins, "drop", lambda pins: dropped.append(pins.folder))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["halt", "--state-dir", "state", "--reason", "stop"]) == 0
    assert dropped == [Pins(tmp_path / "state").folder]
    assert halted(tmp_path / "state") is not None


def test_whatever_lies_there_holds_the_node_still_and_nobody_waits_for_it(tmp_path: Path) -> None:
    assert halted(tmp_path) is None
    path = tmp_path / FILE
    path.mkdir()
    assert "cannot be read" in halted(tmp_path).reason  # type: ignore[union-attr]
    path.rmdir()
    os.mkfifo(path)
    assert "cannot be understood" in halted(tmp_path).reason  # type: ignore[union-attr]
    path.unlink()
    path.symlink_to(path)
    assert "cannot be read" in halted(tmp_path).reason  # type: ignore[union-attr]
    path.unlink()
    path.write_text("")
    assert "cannot be understood" in halted(tmp_path).reason  # type: ignore[union-attr]
    path.unlink()
    assert halted(tmp_path) is None
