"""A moment of fuzzing for every parser of TEE evidence; `make fuzz` runs a million inputs."""

from __future__ import annotations

import pytest

from tests.fuzz.attest.mutants import run, targets

SHORT = 250


@pytest.mark.parametrize("name", [target.name for target in targets()])
def test_only_malformed_comes_out(name: str) -> None:
    (target,) = (one for one in targets() if one.name == name)
    assert run(target, SHORT, seed=0x5EED) <= SHORT
