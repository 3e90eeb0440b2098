"""What this machine does not grant: each is named, and nothing goes on without it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pointcall_executor import beginning
from pointcall_executor.cli.output import EnvironmentRefusal
from pointcall_executor.config import Config, ConfigError
from pointcall_executor.kernel.probe import Feature
from pointcall_executor.services.groups import Freezer
from pointcall_executor.services.managed import ServiceError
from pointcall_executor.services.spawning import Spawner
from pointcall_executor.tee.platform import PlatformError
from tests.unit.services.world import needs_cgroups, remove_spawners

LOCKED = """
import ctypes, json, sys
from pointcall_executor import privileges
libc = ctypes.CDLL(None, use_errno=True)
KEEP_CAPS_LOCKED, SET_SECUREBITS = 1 << 5, 28
assert libc.prctl(SET_SECUREBITS, KEEP_CAPS_LOCKED, 0, 0, 0) == 0
try:
    privileges.drop("nobody", [])
except privileges.PrivilegeError as error:
    print(json.dumps([error.id, error.got]))
"""


def test_a_kernel_that_does_not_grant_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    def feature(id: str, present: bool, required: bool) -> Feature:
        return Feature(id, present, f"{id}: EPERM", "a test", required)

    rows = [feature("a", True, True), feature("b", False, False), feature("c", False, True), feature("d", False, True)]
    monkeypatch.setattr(beginning, "probe_required", lambda: [row for row in rows if row.required])
    with pytest.raises(EnvironmentRefusal) as refused:
        beginning.check_kernel()
    assert (refused.value.id, refused.value.want, refused.value.got) == ("kernel.missing", "c, d", "c: EPERM")
    monkeypatch.setattr(beginning, "probe_required", lambda: rows[:1])
    beginning.check_kernel()


def test_hardware_that_is_not_there_is_not_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pointcall_executor.tee import hardware

    for platform in ("snp", "tdx"):
        with pytest.raises(PlatformError) as absent:
            hardware.open_hardware(platform, tmp_path)  # type: ignore[arg-type]
        assert absent.value.id == "tee.unavailable"
    real = hardware.open_hardware
    monkeypatch.setattr(hardware, "open_hardware", lambda platform: real(platform, tmp_path))
    for tee in ("sev-snp", "tdx"):
        with pytest.raises(EnvironmentRefusal) as refused:
            beginning.platform_of(Config(node="n", tee=tee), tmp_path)  # type: ignore[arg-type]
        assert (refused.value.id, refused.value.want) == ("tee.absent", tee)
    assert list(tmp_path.iterdir()) == []


def test_telemetry_that_was_asked_for_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from pointcall_executor.telemetry.station import Station

    executor: Any = SimpleNamespace(on_receipt=lambda _run: None, on_record=lambda _record: None, journal=None)
    backend: Any = SimpleNamespace(status=lambda: None)
    before = executor.on_receipt
    monkeypatch.setitem(sys.modules, "pointcall_executor.telemetry.otlp", None)
    with pytest.raises(ConfigError) as refused:
        Station(executor, backend, Config(otlp="http://127.0.0.1:4318"))
    assert refused.value.id == "config.otlp"
    assert executor.on_receipt is before  # nobody listens to an executor that does not start


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to give up")
def test_a_privilege_that_cannot_be_given_up_is_no_start() -> None:
    """Securebits that an ancestor locked, as some containers have them."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", LOCKED], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    which, got = json.loads(done.stdout)
    assert which == "privilege.drop"
    assert got.startswith("PR_SET_KEEPCAPS")


@needs_cgroups
def test_what_the_spawner_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = f"pointcall-refusals-{os.getpid()}"
    spawner = Spawner(parent)
    try:
        gone = Freezer(tmp_path / "gone")
        with pytest.raises(ServiceError) as refused:
            spawner.freeze(gone, 2**62)
        assert refused.value.id == "service.freeze"
        assert spawner._leases == {}  # what could not begin is not begun again by the next process
        spawner.thaw(gone)  # one that is gone is free

        def none(_group: Any) -> Any:
            raise OSError(11, "no more processes")

        monkeypatch.setattr("pointcall_executor.services.spawning._Process", none)
        os.kill(spawner.pid, signal.SIGKILL)
        with pytest.raises(ServiceError) as refused:
            spawner.freeze(Freezer(tmp_path), 2**62)
        assert refused.value.id == "service.spawner"
        monkeypatch.undo()
        spawner.thaw(gone)  # it is replaced as soon as that can be done
        assert spawner._process.alive
        spawner.close()
        with pytest.raises(ServiceError) as refused:
            spawner.freeze(gone, 2**62)
        assert refused.value.id == "service.spawner"
        assert not spawner._process.alive  # what was let go does not come back
    finally:
        monkeypatch.undo()
        spawner.close()
        remove_spawners(parent)
