"""Installations for stories. Sigstore and TEE keys are made once: they cost half a second each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest import signature
from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.services.groups import trees
from pointcall_keys.private_sigstore import PrivateSigstore
from tests.lab import Lab, now


@pytest.fixture(scope="session")
def sigstore(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSigstore]:
    with PrivateSigstore.start(tmp_path_factory.mktemp("sigstore"), clock=now) as running:
        yield running


@pytest.fixture(autouse=True)
def verified_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures are verified in this process: a child for it imports for a second, each time.

    test_loop_story and the stories that run the program itself have the child, tests/unit/signing is about it.
    """
    if request.path.stem != "test_loop_story":
        real = signature.verify_each

        def verify_each(*groups: Any, **how: Any) -> Any:
            return real(*groups, **(how | {"in_process": True}))

        monkeypatch.setattr(signature, "verify_each", verify_each)


@pytest.fixture(scope="session")
def tee_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tee")


@pytest.fixture
def make_lab(tmp_path: Path, sigstore: PrivateSigstore, tee_folder: Path) -> Callable[..., Lab]:
    def make(**policy: Any) -> Lab:
        return Lab(tmp_path / "state", sigstore, tee_folder, **policy)

    return make


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab()


@pytest.fixture(autouse=True)
def no_survivors() -> Iterator[None]:
    """Services and the spawner outlive an executor that is killed: here they end with the test."""
    yield
    group = f"pointcall-run-{os.getpid()}"
    for root in trees():
        Cgroup(root / group).remove()
