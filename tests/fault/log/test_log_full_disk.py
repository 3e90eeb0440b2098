"""A disk that is full in earnest: a small tmpfs in a mount namespace of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def test_a_full_disk_stops_the_journal_and_loses_nothing(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("unshare is missing")
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("mount namespaces are not permitted")
    command = ["unshare", "-m", sys.executable, "-m", "tests.fault.log.full_disk", str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()[-500:]
    row = json.loads(done.stdout)
    assert row["acknowledged"] > 100
    assert row["size"] - row["acknowledged"] in (0, 1)  # the last one may have arrived without being acknowledged
    assert row["more"] == row["size"]
    assert row["stopped"] == [True, True, True]
    assert row["wrong"] == []
