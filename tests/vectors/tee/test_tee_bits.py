"""A sample of the bits of every real report and quote flipped: none verifies. `make fuzz` flips all of them."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.attest.bits import VECTORS, accepted, authentic, real

if not VECTORS.exists():
    pytest.skip("the TEE vectors are not here", allow_module_level=True)
REAL = real()


@pytest.mark.parametrize("name", list(REAL))
def test_no_flipped_bit_of_real_evidence_verifies(name: str) -> None:
    bundle, at = REAL[name]
    assert authentic(bundle, at)
    bits = random.Random(name).sample(range(len(bundle.evidence) * 8), 400)
    assert list(accepted(bundle, at, bits)) == []
