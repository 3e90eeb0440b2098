"""A few rounds of every power-cut method; `make test-power` runs hundreds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.log import power

ROUNDS = 3


@pytest.mark.parametrize("method", power.METHODS)
def test_nothing_acknowledged_is_lost(method: str, tmp_path: Path) -> None:
    lack = power.missing(method)
    if lack is not None:
        pytest.skip(f"{lack} is missing")
    result = power.METHODS[method](ROUNDS, tmp_path)
    assert (result.lost, result.damaged, result.idle) == (0, 0, 0)
    assert result.acknowledged > 0
