"""The unit of deploy/systemd under a real systemd: ready once armed, started again after SIGKILL, stopped in order.

A user manager in private namespaces, run by root. Of the unit only the paths change, and what a user manager refuses.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointcall_executor import demo
from pointcall_executor.cli.output import Exit
from pointcall_executor.demo import story
from pointcall_executor.journal import JournalReader
from pointcall_executor.privileges import CAPABILITIES
from pointcall_keys.private_sigstore import PrivateSigstore
from tests.lab import Lab
from tests.scenario.test_operator_story import (
    KEPT,
    PYTHON,
    accepts,
    ask,
    child_of,
    events,
    eventually,
    for_everybody,
    free_port,
    put_service,
    tasks,
)
from tests.unit.services.manager import Manager

UNIT = Path(__file__).parents[2] / "deploy/systemd/pointcall.service"
NAME = UNIT.name
READ_SEARCH, PTRACE = CAPABILITIES["CAP_DAC_READ_SEARCH"], 19
# What a manager of a user cannot do, whoever runs it: folders in /var and /etc, units of the system, and the two that
# need nodes which only the system's manager makes.
NOT_HERE = {
    "StateDirectory", "StateDirectoryMode", "ConfigurationDirectory", "After", "WantedBy",
    "ProtectHome", "ProtectKernelLogs",
}  # fmt: skip

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(Manager.missing() != "", reason=f"needs {Manager.missing()}"),
]


@pytest.fixture(scope="module", autouse=True)
def real_kernel() -> None:
    if missing := story.missing_features():
        pytest.skip("the kernel lacks " + ", ".join(f"{f.id} ({f.detail})" for f in missing))


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for the paths of sockets."""
    made = Path(tempfile.mkdtemp(prefix="pc-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def manager(folder: Path) -> Iterator[Manager]:
    with Manager(folder / "m") as started:
        yield started


def adapted(lab: Lab, config: Path, log: Path) -> str:
    """The unit with our paths and without what is not possible here."""
    words = f"{sys.executable} -m pointcall_executor.cli run --state-dir {lab.state} --config {config}"
    path = os.pathsep.join(p for p in sys.path if p)
    lines = []
    for line in UNIT.read_text().splitlines():
        key = line.partition("=")[0]
        if key == "ExecStart":
            lines += [f"ExecStart={words}", f'Environment="PYTHONPATH={path}"', f"StandardError=append:{log}"]
        elif key not in NOT_HERE:
            lines.append(line)
    return "\n".join(lines) + "\n"


def shown(manager: Manager, *names: str) -> dict[str, str]:
    """Properties of the unit, as the manager has them."""
    out = manager.run("show", NAME, *(f"--property={name}" for name in names))
    return dict(line.split("=", 1) for line in out.splitlines())


def main_pid(manager: Manager) -> int:
    return int(shown(manager, "MainPID")["MainPID"])


def bits(status: str, name: str) -> set[int]:
    """A set of capabilities, by number."""
    found = int(status.split(f"{name}:")[1].split()[0], 16)
    return {number for number in range(64) if found >> number & 1}


def said(folder: Path) -> str:
    return (folder / "log").read_text()[-3000:]


def installed(folder: Path, manager: Manager, sigstore: PrivateSigstore, tee_folder: Path) -> tuple[Lab, int]:
    """A node with its unit, not started, and the port of its service."""
    lab, port = Lab(folder / "s", sigstore, tee_folder), free_port()
    put_service(lab, port)
    config = folder / "pointcall.toml"
    config.write_text('node = "lab"\ntee = "emulated"\n')
    (manager.units / NAME).write_text(adapted(lab, config, folder / "log"))
    return lab, port


def test_the_unit_is_ready_once_armed_fed_restarted_after_sigkill_and_stopped_in_order(
    folder: Path, manager: Manager, sigstore: PrivateSigstore, tee_folder: Path
) -> None:
    lab, port = installed(folder, manager, sigstore, tee_folder)
    manager.start(NAME)  # returns once it said READY=1
    first = shown(manager, "ActiveState", "StatusText", "MainPID", "NRestarts", "WatchdogUSec", "Type")
    assert first["ActiveState"] == "active", said(folder)
    assert re.match(r"armed: .+, sequence 1, emulated", first["StatusText"])
    assert (first["Type"], first["WatchdogUSec"], first["NRestarts"]) == ("notify", "10s", "0")
    assert accepts(port)
    service = ask(lab, "status")["services"][0]["pid"]
    fed = shown(manager, "WatchdogTimestampMonotonic")
    eventually(lambda: shown(manager, "WatchdogTimestampMonotonic") != fed)

    os.kill(int(first["MainPID"]), signal.SIGKILL)
    begin = time.monotonic()
    eventually(lambda: main_pid(manager) not in (0, int(first["MainPID"])))
    eventually(lambda: shown(manager, "ActiveState")["ActiveState"] == "active", seconds=60)
    again = shown(manager, "NRestarts", "StatusText")
    assert again["NRestarts"] == "1", f"{time.monotonic() - begin:.1f} s; {said(folder)}"
    assert again["StatusText"].startswith("armed: ")
    assert accepts(port)
    assert ask(lab, "status")["services"][0]["pid"] == service, "the service outlived it and was adopted"

    os.kill(main_pid(manager), signal.SIGSTOP)  # a loop that is stuck: only the watchdog sees it
    stuck = main_pid(manager)
    eventually(lambda: main_pid(manager) not in (0, stuck), seconds=30)
    eventually(lambda: shown(manager, "ActiveState")["ActiveState"] == "active", seconds=60)
    assert shown(manager, "NRestarts")["NRestarts"] == "2"

    manager.run("stop", NAME)
    assert shown(manager, "ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
    assert said(folder).endswith("pointcall: stopped by=SIGTERM\n"), said(folder)
    with contextlib.closing(JournalReader.open(lab.state / "journal.db")) as journal:
        assert journal.entries()[-1].kind == "epoch-close"
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", port)) == 0, "services go on"


def test_a_damaged_log_ends_it_for_a_person_and_a_new_log_brings_it_back(
    folder: Path, manager: Manager, sigstore: PrivateSigstore, tee_folder: Path
) -> None:
    lab, port = installed(folder, manager, sigstore, tee_folder)
    manager.start(NAME)
    first, service = main_pid(manager), ask(lab, "status")["services"][0]["pid"]
    with contextlib.closing(sqlite3.connect(lab.state / "journal.db")) as journal, journal:
        journal.execute("update entry set raw = x'00' where i = 0")
    os.kill(first, signal.SIGKILL)
    eventually(lambda: shown(manager, "ActiveState")["ActiveState"] == "failed", seconds=60)
    ended = shown(manager, "ExecMainStatus", "NRestarts", "Result")
    assert ended == {"ExecMainStatus": str(int(Exit.LOG)), "NRestarts": "1", "Result": "exit-code"}, said(folder)
    assert "[journal.damaged]" in said(folder)
    assert accepts(port), "services go on"

    time.sleep(6)  # longer than any pause of the unit
    assert shown(manager, "ActiveState", "NRestarts") == {"ActiveState": "failed", "NRestarts": "1"}
    for path in lab.state.glob("journal.db*"):
        path.rename(folder / path.name)
    manager.start(NAME)
    assert shown(manager, "StatusText")["StatusText"].startswith("armed: "), said(folder)
    assert ask(lab, "status")["services"][0]["pid"] == service, "the service outlived it and was adopted"
    manager.run("stop", NAME)


def test_under_the_unit_a_service_with_an_account_of_its_own_is_adopted_and_the_executor_keeps_four_capabilities(
    folder: Path, manager: Manager, sigstore: PrivateSigstore, tee_folder: Path
) -> None:
    if not PYTHON or not for_everybody(demo.__file__):
        pytest.skip("no Python, or no program of ours, that every user may read")
    folder.chmod(0o755)
    lab, port = Lab(folder / "s", sigstore, tee_folder), free_port()
    put_service(lab, port, account="nobody")
    config = folder / "pointcall.toml"
    config.write_text('node = "lab"\ntee = "emulated"\ncapabilities = ["CAP_DAC_READ_SEARCH"]\n')
    (manager.units / NAME).write_text(adapted(lab, config, folder / "log"))
    manager.start(NAME)
    assert accepts(port), said(folder)
    service, first = ask(lab, "status")["services"][0]["pid"], main_pid(manager)
    assert Path(f"/proc/{service}").stat().st_uid == pwd.getpwnam("nobody").pw_uid
    for status in tasks(first).values():
        assert bits(status, "CapEff") == bits(status, "CapPrm") == bits(status, "CapBnd") == {*KEPT, READ_SEARCH}
    assert {READ_SEARCH, PTRACE} <= bits(child_of(first, "pointcall_executor.services.spawner"), "CapBnd")
    assert PTRACE not in bits(Path(f"/proc/{service}/status").read_text(), "CapBnd")

    os.kill(first, signal.SIGKILL)
    eventually(lambda: main_pid(manager) not in (0, first))
    eventually(lambda: shown(manager, "ActiveState")["ActiveState"] == "active", seconds=60)
    refused = [i["text"] for i in events(lab) if i["id"] == "service.adoption"]
    assert refused == [], said(folder)
    assert ask(lab, "status")["services"][0]["pid"] == service, "the service outlived it and was adopted"
    manager.run("stop", NAME)
