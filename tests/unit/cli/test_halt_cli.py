"""`pointcall halt`: what it takes out of the kernel is what `pointcall run` put there, however the folder is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pointcall_executor import cli
from pointcall_executor.halt import halted
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
