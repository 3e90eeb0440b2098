"""A sample of the system call faults; `make test-power` injects all of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fault.log import syscalls

EVERY = 80


def test_a_log_survives_every_kind_of_failed_call(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is missing")
    if subprocess.run(["strace", "-qq", "-e", "trace=none", "true"], check=False, capture_output=True).returncode:
        pytest.skip("ptrace is not permitted")
    injected, wrong = syscalls.run(tmp_path, EVERY)
    assert wrong == []
    assert injected > 10
