"""What is noted beside the pins: how much a pinned breaker had lost when somebody looked last. No kernel."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pointcall_executor.pins import Pins


class Breaker:
    """As much of one as is asked here."""

    def pin(self, folder: Path) -> Any:
        folder.mkdir()
        return SimpleNamespace(identity=SimpleNamespace(as_dict=dict))


@pytest.mark.parametrize(("taken_up", "left"), [(True, 7), (False, 0)])
def test_what_a_breaker_had_lost_stays_noted_as_long_as_it_is_the_same(
    tmp_path: Path, taken_up: bool, left: int
) -> None:
    pins = Pins(tmp_path, bpffs=tmp_path)
    pins.note_lost(7)
    pins.note_lost(3)
    assert pins.lost == 7
    pins.keep(Breaker(), taken_up=taken_up)  # type: ignore[arg-type]
    assert Pins(tmp_path, bpffs=tmp_path).lost == left
    pins.drop()
    assert pins.lost == 0
