"""A disk that is full for a moment: the executor ends with a code of its own, and is back once there is room.

The state folder lies on a small tmpfs in a mount namespace that one thread has for itself, with all that it starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pointcall_executor.api.roles import Role
from pointcall_executor.cli.output import Exit
from pointcall_executor.journal import JournalReader
from pointcall_executor.journal_check import check_journal
from pointcall_executor.kernel.bpf import prog_exists
from pointcall_executor.pins import Pins
from pointcall_executor.services.groups import remove_empty
from pointcall_keys.private_sigstore import PrivateSigstore
from tests.lab import Lab
from tests.scenario.test_operator_story import eventually
from tests.scenario.test_pinned_story import THRESHOLD, connects, put
from tests.scenario.test_real_story import ENVIRONMENT, Running, bpffs, program_ids, real_kernel, running
from tests.scenario.test_systemd_story import NAME, adapted, main_pid, said, shown
from tests.unit.services.manager import Manager

__all__ = ["bpffs", "real_kernel"]  # fixtures
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode != 0,
        reason="mount namespaces are not permitted",
    ),
]

DISK_BYTES = 48 << 20
PAUSE_SECONDS = 5  # of the unit, after this code
CLONE_NEWNS, MS_REC_PRIVATE = 0x20000, 1 << 14 | 1 << 18
WRITE = """
import pathlib, sys, time
from pointcall_executor.api.client import Client
from pointcall_runbook.errors import PointcallError
while True:
    try:
        with Client(pathlib.Path(sys.argv[1])) as client:
            while True:
                client.call("Control/Resume", reason="x" * 500)
    except (PointcallError, OSError):
        time.sleep(0.05)
"""


def alone(story: Callable[[Path], None]) -> None:
    """Play it in a thread whose mounts are its own, with a small disk of that thread's."""
    failures: list[BaseException] = []

    def play() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        folder = Path(tempfile.mkdtemp(prefix="pc-"))
        try:
            assert libc.unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
            assert libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None) == 0, os.strerror(ctypes.get_errno())
            size = f"size={DISK_BYTES}".encode()
            assert libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, size) == 0, os.strerror(ctypes.get_errno())
            story(folder)
        except BaseException as error:
            failures.append(error)
        finally:
            libc.umount2(bytes(folder), 2)
            folder.rmdir()

    thread = threading.Thread(target=play)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """Until the end there is no room."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(1 << 10))
    assert shutil.disk_usage(folder).free < 1 << 12
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def writing(lab: Lab) -> Iterator[None]:
    """Entries, one after the other, whoever serves. By a process: threads of gRPC's do not see this thread's mounts."""
    command = [sys.executable, "-c", WRITE, str(lab.state / "run" / f"{Role.OPERATOR.value}.sock")]
    writer = subprocess.Popen(command, env=ENVIRONMENT)
    try:
        yield
    finally:
        writer.kill()
        writer.wait()


def ends(run: Running) -> int:
    return run.process.wait(timeout=30)


def test_a_full_disk_ends_it_for_a_moment_and_the_next_start_arms_with_the_circuit_as_it_was(
    real_kernel: None, bpffs: None, tmp_path: Path, sigstore: PrivateSigstore, tee_folder: Path
) -> None:
    def story(disk: Path) -> None:
        lab = Lab(disk / "s", sigstore, tee_folder)
        put(lab, tmp_path, 1)
        pins = Pins(lab.state)
        try:
            with running(lab, pin=True) as run:
                run.until("armed")
                assert connects(THRESHOLD + 1)[-1] == "EPERM"
                numbers = program_ids(lab).values()
                with full(disk), writing(lab):
                    assert ends(run) == Exit.FAILED
                    assert "stopped by a failure" in (lab.state / "run.err").read_text()
                    assert any(map(prog_exists, numbers)), "what is pinned stays"
                    assert connects(1) == ["EPERM"]
                    again = Running(lab, f"pointcall-run-{os.getpid()}", pin=True)
                    assert ends(again) == Exit.FAILED, "a start without room is a failure of the same kind"
            with running(lab, pin=True) as run:
                run.until("armed")
                assert connects(1) == ["EPERM"], "the circuit is still open"
            with contextlib.closing(JournalReader.open(lab.state / "journal.db")) as journal:
                assert check_journal(journal).failed == ()
        finally:
            pins.drop()
            remove_empty(f"pointcall-run-{os.getpid()}/clients/keep")

    alone(story)


@pytest.mark.skipif(Manager.missing() != "", reason=f"needs {Manager.missing()}")
def test_under_the_unit_it_tries_again_without_haste_until_there_is_room(
    real_kernel: None, tmp_path: Path, sigstore: PrivateSigstore, tee_folder: Path
) -> None:
    def story(disk: Path) -> None:
        lab, config = Lab(disk / "s", sigstore, tee_folder), tmp_path / "pointcall.toml"
        put(lab, tmp_path, 1)
        config.write_text('node = "lab"\ntee = "emulated"\n')
        with Manager(disk / "m") as manager:
            (manager.units / NAME).write_text(adapted(lab, config, tmp_path / "log"))
            manager.start(NAME)
            first = main_pid(manager)
            with full(disk):
                with writing(lab):
                    eventually(lambda: main_pid(manager) != first, seconds=60)
                assert shown(manager, "ExecMainStatus")["ExecMainStatus"] == str(int(Exit.FAILED)), said(tmp_path)
                begin = time.monotonic()
                eventually(lambda: int(shown(manager, "NRestarts")["NRestarts"]) >= 2, seconds=40)
                assert time.monotonic() - begin > 2 * PAUSE_SECONDS - 1, "it tries without a pause"
            eventually(lambda: shown(manager, "ActiveState")["ActiveState"] == "active", seconds=60)
            assert shown(manager, "StatusText")["StatusText"].startswith("armed: "), said(tmp_path)
            manager.run("stop", NAME)

    alone(story)
