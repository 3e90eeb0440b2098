"""Births that go wrong in the kernel: each ends with an answer, no process and no open descriptor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pointcall_executor.services.groups import ServiceGroups, remove_empty
from tests.unit.services.world import needs_cgroups

pytestmark = needs_cgroups

PARENT = f"pointcall-birth-{os.getpid()}"
SOURCE = """
import errno, json, os, signal, sys
from pointcall_executor.services import birth

def refuse(*_words):
    raise OSError(int(sys.argv[3]), "refused")

module, name = sys.argv[2].split(".")
count, real = int(sys.argv[4]), getattr({"os": os, "birth": birth}[module], name)
def maybe(*words):
    global count
    count -= 1
    return real(*words) if count >= 0 else refuse()

request = {"argv": ["sleep", "600"], "environment": {}, "directory": "/", "namespaces": [], "no_new_privileges": True}
with open("/usr/bin/sleep", "rb") as program, open(os.devnull, "wb") as output:
    cgroup = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)
    before = len(os.listdir("/proc/self/fd"))
    setattr({"os": os, "birth": birth}[module], name, maybe)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        answer = birth.unborn(birth.Plan(request, program.fileno(), output.fileno(), ()), cgroup).answer
    except OSError as error:
        answer = {"step": str(error), "errno": error.errno}
    setattr({"os": os, "birth": birth}[module], name, real)
    print(json.dumps({"answer": answer, "left": len(os.listdir("/proc/self/fd")) - before}))
"""


@pytest.fixture
def groups() -> Iterator[ServiceGroups]:
    made = ServiceGroups.fresh(PARENT, "svc")
    made.create()
    yield made
    made.destroy()
    remove_empty(PARENT)


def born(groups: ServiceGroups, what: str, error: int, after: int) -> dict[str, Any]:
    """What a birth says in which call number `after` of a function, and all later ones, fail."""
    command = [sys.executable, "-c", SOURCE, str(groups.folder), what, str(error), str(after)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=True)
    return dict(json.loads(done.stdout))


def empty(groups: ServiceGroups) -> bool:
    deadline = time.monotonic() + 5
    while (groups.folder / "cgroup.procs").read_text():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@pytest.mark.parametrize("after", [0, 1])
def test_a_birth_that_cannot_be_traced_to_its_end_is_ended(groups: ServiceGroups, after: int) -> None:
    said = born(groups, "birth._trace", 5, after)
    assert said == {"answer": {"step": "killed", "errno": 3}, "left": 0}
    assert empty(groups)


@pytest.mark.parametrize(("what", "after"), [("os.pipe2", n) for n in range(4)] + [("os.dup", 0)])
def test_a_birth_for_which_no_descriptor_is_left_is_ended(groups: ServiceGroups, what: str, after: int) -> None:
    said = born(groups, what, 24, after)
    assert said == {"answer": {"step": "[Errno 24] refused", "errno": 24}, "left": 0}
    assert empty(groups)
