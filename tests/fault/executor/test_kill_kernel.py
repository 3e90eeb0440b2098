"""kill -9 of the real executor on this very kernel: real services, real circuits, real events; nothing is left."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from pointcall_executor.demo import story as demo
from pointcall_executor.kernel.bpf import prog_exists
from pointcall_executor.kernel.cgroup import Cgroup, find_root, own
from pointcall_executor.kernel.probe import BLOBS
from pointcall_executor.node import Pins
from pointcall_executor.services.groups import remove_empty
from pointcall_keys.private_sigstore import PrivateSigstore
from tests.fault.executor import evidence, story
from tests.fault.executor.setting import Teller, copy, prepare, why
from tests.kernel.lab import BLOCKED, connect, private_network
from tests.lab import Lab

pytestmark = pytest.mark.kernel
GROUP = f"pointcall-kill-{os.getpid()}"
KILLED = -9
LABELS = (
    *("service-start.before#1", "service-start.after#1", "keep.after#1", "switch.after#1", "event.before#1"),
    *("act-open_circuit.before#1", "act-open_circuit.after#1", "record-intent.after#2", "record-intent.after#3"),
    *("act-recreate.before#1", "service-destroy.after#1", "service-start.before#2", "service-start.after#2"),
    *(
        "act-recreate.after#1",
        "log-receipt.before#1",
        "log-receipt.after#2",
        "stop.before#1",
        "leave.before#1",
        "leave.after#1",
    ),
)


@pytest.fixture(scope="module")
def able() -> None:
    if missing := demo.missing_features():
        pytest.skip("the kernel lacks " + ", ".join(f"{f.id} ({f.detail})" for f in missing))


@pytest.fixture(scope="module")
def kernel(real: Path) -> Iterator[None]:
    """A private network and a cgroup of our own. Signing, before it, needs the other network."""
    Cgroup.create(f"{GROUP}/clients/keep")
    with private_network():
        yield
    for name in ("services", "clients/keep"):
        remove_empty(f"{GROUP}/{name}")
    assert not (find_root() / GROUP).exists(), "a cgroup of ours is left"


@pytest.fixture(scope="module")
def real(able: None, tmp_path_factory: pytest.TempPathFactory, sigstore: PrivateSigstore) -> Path:
    lab = Lab(tmp_path_factory.mktemp("lab") / "state", sigstore, tmp_path_factory.mktemp("tee"))
    script = Path(str(resources.files("pointcall_executor.demo"))) / "service.py"
    program = [str(Path(sys.executable).resolve()), "-I", "-S", str(script), str(story.PORT)]
    ready = {"tcp": f"127.0.0.1:{story.PORT}", "timeout_ms": 10_000}
    return prepare(lab, program=program, blobs=BLOBS, ready=ready, stop={"signal": "TERM", "grace_ms": 200})


@pytest.fixture(scope="module")
def teller(kernel: None) -> Iterator[Teller]:
    with Teller() as running:
        yield running


def programs(state: Path) -> list[int]:
    """Kernel ids of every program that was ever armed here."""
    found = [
        e.body["detail"] for e in evidence.entries_of(state) if e.kind == "config" and "programs" in e.body["what"]
    ]
    return [int(str(text).split()[0]) for detail in found for text in detail.values()]


def gone(numbers: list[int]) -> bool:
    deadline = time.monotonic() + 5
    while any(map(prog_exists, numbers)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def as_client() -> Iterator[None]:
    """This process where the breaker's gate sees it."""
    home = own()
    Cgroup(find_root() / GROUP / "clients").add(0)
    try:
        yield
    finally:
        home.add(0)


def restarted(teller: Teller, state: Path, order: dict[str, Any]) -> None:
    """The restart works, the log agrees with the truth, one instance of the service ran, nothing is left."""
    assert teller.tell(state, "restart", **order) == 0, why(state)
    assert evidence.objections(state) == []
    (running,) = (line for line in evidence.truth_of(state) if line["what"] == "running")
    assert running["count"] == 1, "one instance of the service runs, and no other"
    assert list((find_root() / GROUP).glob("services/*")) == []
    assert gone(programs(state))


@pytest.mark.parametrize("label", LABELS)
def test_after_a_kill_on_this_kernel_nothing_is_lost_or_left(
    label: str, real: Path, teller: Teller, tmp_path: Path
) -> None:
    state, order = copy(real, tmp_path / "state"), {"short": True, "kernel": True, "group": GROUP}
    assert teller.tell(state, "live", label, **order) == KILLED, why(state)
    assert gone(programs(state)), "a program outlived its executor"
    restarted(teller, state, order)


@pytest.mark.parametrize("label", ["act-open_circuit.after#1", "act-recreate.before#1"])
def test_a_pinned_lease_outlives_the_executor_and_ends_by_itself(
    label: str, real: Path, teller: Teller, tmp_path: Path
) -> None:
    if not os.path.ismount("/sys/fs/bpf"):
        pytest.skip("no bpf file system is mounted on /sys/fs/bpf")
    state, order = copy(real, tmp_path / "state"), {"short": True, "kernel": True, "pin": True, "group": GROUP}
    try:
        assert teller.tell(state, "live", label, **order) == KILLED, why(state)
        with as_client():
            assert connect(story.PORT) == BLOCKED, "the lease is in the kernel, not in the executor"
            time.sleep(1.1)
            assert connect(story.PORT) != BLOCKED, "the lease ends by itself"
        assert teller.tell(state, "restart", **order) == 0, why(state)
        assert evidence.objections(state) == []
    finally:
        Pins(state).drop()
