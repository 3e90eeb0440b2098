"""What is noted beside the pins: how much a pinned breaker had lost when somebody looked last. No kernel."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.pins import Pins


class Breaker:
    """As much of one as is asked here."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def pin(self, folder: Path) -> Any:
        folder.mkdir()
        (folder / "number").write_text(str(self.number))
        return SimpleNamespace(identity=SimpleNamespace(as_dict=lambda: {"number": self.number}))


def keep(pins: Pins, number: int = 0, *, taken_up: bool = False) -> None:
    with pins.keep(Breaker(number), taken_up=taken_up):  # type: ignore[arg-type]
        pass


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("taken_up", "left"), [(True, 7), (False, 0)])
def test_what_a_breaker_had_lost_stays_noted_as_long_as_it_is_the_same(
    tmp_path: Path, taken_up: bool, left: int
) -> None:
    pins = Pins(tmp_path, bpffs=tmp_path)
    pins.note_lost(7)
    pins.note_lost(3)
    assert pins.lost == 7
    keep(pins, taken_up=taken_up)
    assert Pins(tmp_path, bpffs=tmp_path).lost == left
    pins.drop()
    assert pins.lost == 0


def test_what_is_kept_replaces_what_was(tmp_path: Path) -> None:
    pins = Pins(tmp_path, bpffs=tmp_path)
    keep(pins, 1)
    keep(pins, 2)
    assert tree(tmp_path) == {f"{pins.folder.name}/number": "2", "pins.json": '{"number": 2}'}
    pins.drop()
    assert tree(tmp_path) == {}
    assert not pins.found()


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.rename", "pathlib.Path.replace", "pathlib.Path.unlink"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_whatever_fails_leaves_pins_and_record_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    """Each of these calls fails once, the first time, then the second, until keeping gets through."""
    pins = Pins(tmp_path, bpffs=tmp_path)
    keep(pins, 1)
    pins.note_lost(7)
    before, real = tree(tmp_path), functools.reduce(getattr, call.split(".")[1:], sys.modules[call.split(".")[0]])
    for number in itertools.count(1):
        calls = itertools.count(1)

        def failing(*args: Any, number: int = number, calls: Iterator[int] = calls, **named: Any) -> Any:
            if next(calls) == number:
                raise OSError(code, os.strerror(code))
            return real(*args, **named)

        with monkeypatch.context() as patch:
            patch.setattr(call, failing)
            entered = False
            try:
                with pins.keep(Breaker(2), taken_up=False):  # type: ignore[arg-type]
                    entered = True
            except (OSError, KernelError):
                assert not entered  # what the block does is never in vain
            else:
                break
        left = {name: text for name, text in tree(tmp_path).items() if not name.endswith(".new")}
        assert left == before, f"{call} failed the {number}. time"
    assert number > 1
    assert tree(tmp_path)["pins.json"] == '{"number": 2}'
    assert (pins.folder / "number").read_text() == "2"


def test_a_full_state_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = Pins(tmp_path, bpffs=tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KernelError) as refused:
        keep(pins)
    assert (refused.value.id, refused.value.got) == ("kernel.pin", "No space left on device")
    assert not pins.found()


def test_a_failing_block_takes_it_back(tmp_path: Path) -> None:
    pins = Pins(tmp_path, bpffs=tmp_path)
    keep(pins, 1)
    pins.note_lost(7)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="no"), pins.keep(Breaker(2), taken_up=False):  # type: ignore[arg-type]
        raise ValueError("no")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("left", ["_next", "_old"])
def test_what_a_killed_process_left_is_not_in_the_way(tmp_path: Path, left: str) -> None:
    pins = Pins(tmp_path, bpffs=tmp_path)
    keep(pins, 1)
    Breaker(9).pin(tmp_path / f"{pins.folder.name}{left}")
    keep(pins, 2)
    assert tree(tmp_path) == {f"{pins.folder.name}/number": "2", "pins.json": '{"number": 2}'}
    Breaker(9).pin(tmp_path / f"{pins.folder.name}{left}")
    assert pins.found()
    pins.drop()
    assert not pins.found()
