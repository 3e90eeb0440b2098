"""A prepared installation and a teller, made once: Sigstore and imports cost seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pointcall_keys.private_sigstore import PrivateSigstore
from tests.fault.executor.setting import Teller, prepare
from tests.lab import Lab, now


@pytest.fixture(scope="session")
def sigstore(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSigstore]:
    with PrivateSigstore.start(tmp_path_factory.mktemp("sigstore"), clock=now) as running:
        yield running


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, sigstore: PrivateSigstore) -> Path:
    return prepare(Lab(tmp_path_factory.mktemp("lab") / "state", sigstore, tmp_path_factory.mktemp("tee")))


@pytest.fixture(scope="session")
def teller() -> Iterator[Teller]:
    with Teller() as running:
        yield running
