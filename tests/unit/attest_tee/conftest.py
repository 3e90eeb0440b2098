"""Emulated machines with keys that are made once for the run; nothing here is on disk or in the tree."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from pointcall_attest.emulated import TCBS, EmulatedSnp, Keys
from pointcall_attest.emulated_tdx import EmulatedTdx
from pointcall_attest.emulated_tdx import Keys as TdxKeys
from pointcall_attest.tee_policy import Line

NOW = datetime(2026, 11, 20, tzinfo=UTC)
Machine = Callable[..., EmulatedSnp]
TdxMachine = Callable[..., EmulatedTdx]


@cache
def _rsa(name: str) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 4096)


@pytest.fixture(scope="session")
def machine() -> Machine:
    """machine(line, kind="VCEK", **changes): the same RSA keys for every line, one leaf key for each call's line."""

    @cache
    def make(line: Line = "Milan", kind: str = "VCEK", chip: bytes = b"12345678") -> EmulatedSnp:
        keys = Keys(_rsa("ark"), _rsa("ca"), ec.generate_private_key(ec.SECP384R1()))
        return EmulatedSnp(line, keys, chip, NOW - timedelta(days=1), NOW + timedelta(days=6), TCBS[line], kind)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def td_keys() -> TdxKeys:
    return TdxKeys(*(ec.generate_private_key(ec.SECP256R1()) for _ in range(5)))


@pytest.fixture(scope="session")
def td(td_keys: TdxKeys) -> TdxMachine:
    """td(**versions): an emulated TDX machine; the same keys for all."""

    @cache
    def make(**versions: Any) -> EmulatedTdx:
        return EmulatedTdx(td_keys, NOW - timedelta(days=1), NOW + timedelta(days=6), **versions)

    return make


@pytest.fixture(scope="session")
def now() -> datetime:
    return NOW
