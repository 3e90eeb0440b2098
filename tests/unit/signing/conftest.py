"""One private Sigstore for all tests of signing."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

import pytest

from pointcall_keys.private_sigstore import PrivateSigstore
from tests.unit.signing.world import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with PrivateSigstore.start(tmp_path_factory.mktemp("sigstore"), clock=lambda: dt.datetime.now(dt.UTC)) as sigstore:
        yield World(sigstore)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSigstore]:
    """A second instance that nobody trusts."""
    with PrivateSigstore.start(tmp_path_factory.mktemp("other"), clock=lambda: dt.datetime.now(dt.UTC)) as sigstore:
        yield sigstore
