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
    (tmp_path / "state" / "run").mkdir(parents=True)
    assert cli.main(["halt", "--state-dir", "state", "--reason", "stop"]) == 0
    assert dropped == [Pins(tmp_path / "state").folder]
    assert halted(tmp_path / "state") is not None


@pytest.mark.parametrize("words", [("--reason", "stop"), ("--clear",)])
def test_a_folder_that_no_executor_has_is_not_said_to_be_halted(
    tmp_path: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The real node would go on while somebody believes that it stands still."""
    assert cli.main(["halt", *words, "--state-dir", str(tmp_path / "other")]) == 5
    assert "[halt.state]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_halt_needs_a_reason_with_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    assert cli.main(["halt", "--reason", " ", "--state-dir", str(tmp_path)]) == 2
    assert "this needs a reason" in capsys.readouterr().err
    assert halted(tmp_path) is None


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
