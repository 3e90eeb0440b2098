"""The verifier meets damaged modules and random bytes: only ModuleError comes out, and it never says yes alone."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from pointcall_runbook import ModuleError, verify_module
from pointcall_runbook.binary import HEADER
from tests.fuzz.runbook.mutants import attack, seeds


def test_what_the_verifier_accepts_wasmtime_accepts_and_the_bound_holds() -> None:
    accepted = attack(seeds(), 3_000, seed=1)
    assert accepted > 150  # or the mutants were too wild to prove anything


def test_the_originals_are_accepted() -> None:
    for wasm in seeds():
        verify_module(wasm)


@given(st.binary(max_size=200))
def test_random_bytes(raw: bytes) -> None:
    for wasm in (raw, HEADER + raw):
        with contextlib.suppress(ModuleError):
            verify_module(wasm)
