"""Nothing stays behind: not after close, not after a refused load, not after kill -9."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pointcall_executor.kernel.blob import Blob, Program
from pointcall_executor.kernel.breaker import BreakerSensor
from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.kernel.errors import KernelError, LoadError
from pointcall_executor.kernel.loader import load
from pointcall_executor.kernel.probe import missing, probe
from tests.kernel.lab import BLOCKED, REFUSED, connects, here, member, private_network

pytestmark = pytest.mark.kernel
BPFTOOL = shutil.which("bpftool") or "/usr/sbin/bpftool"


def ours(ids: set[int]) -> set[int]:
    """Which of these programs the kernel still has."""
    out = subprocess.run([BPFTOOL, "-j", "prog", "show"], capture_output=True, text=True, check=True).stdout
    return {program["id"] for program in json.loads(out or "[]")} & ids


def gone(ids: set[int]) -> bool:
    """The kernel frees a program a moment after its last descriptor is closed."""
    for _ in range(50):
        if not ours(ids):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(autouse=True)
def _bpftool() -> None:
    if not Path(BPFTOOL).exists():
        pytest.skip("bpftool is not installed")


def test_close_takes_everything_out(breaker_blob: Blob) -> None:
    with member("close") as group, BreakerSensor(breaker_blob, cgroup=group.path) as breaker:
        breaker.attach()
        ids = {number for _, number, _ in breaker.programs()}
        assert ours(ids) == ids
    assert gone(ids)


def test_tags_are_stable_and_depend_on_the_constants(breaker_blob: Blob) -> None:
    with member("tags") as group:
        tags = []
        for constants in ({}, {}, {"threshold": 4}):
            with BreakerSensor(breaker_blob, cgroup=group.path, constants=constants) as breaker:
                tags.append({name: tag for name, _, tag in breaker.programs()})
    assert tags[0] == tags[1]
    assert set(tags[0]) == {p.name for p in breaker_blob.programs}


CHILD = """
import os, sys, time
from pathlib import Path
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.breaker import BreakerSensor
from tests.kernel.lab import here
blob = Blob.parse(Path(sys.argv[1]).read_bytes())
breaker = BreakerSensor(blob, cgroup=Path(sys.argv[2]), constants={"threshold": 2})
breaker.attach()
breaker.arm(here(int(sys.argv[3])))
print(*[number for _, number, _ in breaker.programs()], flush=True)
time.sleep(60)
"""


def test_a_killed_executor_leaves_nothing_and_connects_pass_again(breaker_blob: Blob, tmp_path: Path) -> None:
    path = tmp_path / "breaker.blob"
    path.write_bytes(breaker_blob.encode())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with private_network(), member("killed") as group:
        command = [sys.executable, "-c", CHILD, str(path), str(group.path), "30301"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
            assert child.stdout is not None
            ids = set(map(int, child.stdout.readline().split()))
            assert connects(3, 30301) == [REFUSED, REFUSED, BLOCKED]
            child.send_signal(signal.SIGKILL)
        assert gone(ids)
        assert connects(3, 30301) == [REFUSED] * 3


def test_a_refused_load_says_why_and_leaves_nothing(breaker_blob: Blob) -> None:
    """An unknown helper in the programs: the verifier refuses, and its log names the reason."""
    helper = bytes.fromhex("8500000005000000")  # call bpf_ktime_get_ns
    assert helper in breaker_blob.data
    broken = dataclasses.replace(
        breaker_blob, data=breaker_blob.data.replace(helper, bytes.fromhex("85000000ffff0000"))
    )
    before = _program_ids()
    with pytest.raises(LoadError) as refused:
        load(broken)
    assert refused.value.id == "kernel.load"
    assert "func" in refused.value.log
    assert gone(_program_ids() - before)


@pytest.mark.parametrize("broken", ["insns", "data"])
def test_garbage_loads_nothing(breaker_blob: Blob, broken: str) -> None:
    blob = dataclasses.replace(breaker_blob, **{broken: bytes(len(getattr(breaker_blob, broken)))})
    with pytest.raises(KernelError):
        load(blob)


def _program_ids() -> set[int]:
    out = subprocess.run([BPFTOOL, "-j", "prog", "show"], capture_output=True, text=True, check=True).stdout
    return {program["id"] for program in json.loads(out or "[]")}


def test_a_gate_on_a_cgroup_that_is_gone_is_an_error(breaker_blob: Blob) -> None:
    with member("gone") as group:
        doomed = Cgroup.create("doomed", group.path)
        with BreakerSensor(breaker_blob, cgroup=doomed.path) as breaker:
            doomed.remove()
            with pytest.raises(LoadError) as refused:
                breaker.attach()
            assert refused.value.id == "kernel.attach"
            assert "v2 tree" in refused.value.hint


def test_the_probe_finds_what_the_breaker_needs_and_leaves_nothing(breaker_blob: Blob) -> None:
    before = _program_ids()
    features = probe()
    assert missing(features) == []
    assert len({f.id for f in features}) == len(features)
    assert gone(_program_ids() - before)


def test_a_destination_survives_detach(breaker_blob: Blob) -> None:
    assert Program("pc_command", "syscall") in breaker_blob.programs
    with private_network(), member("detached") as group, BreakerSensor(breaker_blob, cgroup=group.path) as breaker:
        breaker.arm(here(30302))
        breaker.attach()
        breaker.detach()
        assert [c.destination for c in breaker.circuits()] == [here(30302)]
