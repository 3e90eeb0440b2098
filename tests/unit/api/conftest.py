"""A served API on short socket paths, one for each test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pointcall_executor.api.client import Client
from pointcall_executor.api.roles import Role
from pointcall_executor.api.server import Server, serve
from tests.unit.api.fake_backend import FakeBackend


@dataclass
class Api:
    backend: FakeBackend
    server: Server

    def client(self, role: Role) -> Client:
        return Client(self.server.socket(role), timeout_s=20)


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A folder whose path leaves room for a socket name (unix(7): 107 bytes)."""
    path = Path(tempfile.mkdtemp(prefix="pc-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def api(short_dir: Path) -> Iterator[Api]:
    backend = FakeBackend(short_dir)
    server = serve(backend, short_dir / "run")
    yield Api(backend, server)
    server.stop(0)
