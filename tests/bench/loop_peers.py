"""From an incident to the action of whoever watches for it: Pointcall beside what a user would pick instead.

Two incidents. A destination refuses: bpftrace with nft blocks it (tests/bench/peers.py says how). A service is killed:
systemd starts the unit that OnFailure names, ansible-rulebook runs a module; Pointcall recreates it, with the intent on
disk before. An action of a peer begins when its program does. ansible-rulebook is told of the incident by a datagram:
how it would find out by itself is not counted. A peer that is not here is named with the reason. Part of
tests.bench.loop. Needs root.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pointcall_executor.run import Run
from tests.bench import peers, services
from tests.bench.figures import figure, percentile
from tests.bench.peers import AbsentError
from tests.kernel.lab import private_network
from tests.unit.services.manager import Manager

ROUNDS = 10
REFUSED_ROUNDS = 5
ACTION_SECONDS = 30.0
BEGIN_SECONDS = 60.0  # ansible-rulebook starts a Java machine
PAUSE_SECONDS = 0.6
UNITS = {
    "victim.service": "[Unit]\nStartLimitIntervalSec=0\nOnFailure=act.service\n[Service]\nExecStart=/bin/sleep 9999\n",
    "act.service": "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=oneshot\nExecStart={stamp} {note}\n",
}
RULEBOOK = """
- name: recover
  hosts: all
  sources:
    - incident: {{port: {port}, ready: {ready}}}
  rules:
    - name: act
      condition: event.killed is defined
      action:
        run_module:
          name: ansible.builtin.command
          module_args: {{cmd: "{stamp} {note}"}}
"""
SOURCE = '''
"""Every datagram is an incident."""
import asyncio, pathlib

class Incidents(asyncio.DatagramProtocol):
    def __init__(self, queue): self.queue = queue
    def datagram_received(self, data, address): self.queue.put_nowait({"killed": data.decode()})

async def main(queue, args):
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(lambda: Incidents(queue), local_addr=("127.0.0.1", args["port"]))
    pathlib.Path(args["ready"]).touch()
    await asyncio.Event().wait()
'''


def pointcall(folder: Path) -> list[float]:
    """Milliseconds from the kill of a service to the beginning of its recreation."""
    finished: queue.SimpleQueue[Run] = queue.SimpleQueue()
    found = []
    ports = services.free_ports(ROUNDS)
    with services.pointcall(folder, services.built(folder), ports, None, finished.put):
        for port in ports:
            time.sleep(PAUSE_SECONDS)
            pid = services.accepting(port)
            begin = time.monotonic_ns()
            os.kill(pid, signal.SIGKILL)
            started_ns = finished.get(timeout=ACTION_SECONDS).acts[0].started_ns
            assert started_ns is not None
            found.append((started_ns - begin) / 1e6)
    return found


def bpftrace(folder: Path) -> list[float]:
    with private_network():
        seen = peers.bpftrace(REFUSED_ROUNDS, folder)
    return [s.blocked_after_ms for s in seen if s.blocked_after_ms is not None]


def stamped(note: Path, incident: Callable[[], None]) -> float:
    """Milliseconds from the incident until the peer's program runs."""
    note.unlink(missing_ok=True)
    begin = time.monotonic_ns()
    incident()
    end = time.monotonic() + ACTION_SECONDS
    while not (note.exists() and note.read_text().endswith("\n")):
        if time.monotonic() > end:
            raise AbsentError(f"it did nothing for {ACTION_SECONDS:.0f} s")
        time.sleep(0.005)
    return (int(note.read_text()) - begin) / 1e6


def on_failure(folder: Path) -> list[float]:
    if lacking := Manager.missing():
        raise AbsentError(f"not here: {lacking}")
    note, found = folder / "note", []
    with Manager(folder / "systemd") as manager:
        for name, text in UNITS.items():
            (manager.units / name).write_text(text.format(stamp=services.built(folder, "stamp"), note=note))
        for _ in range(ROUNDS):
            manager.start("victim.service")
            time.sleep(PAUSE_SECONDS)
            pid = int(manager.run("show", "-p", "MainPID", "--value", "victim.service"))
            found.append(stamped(note, lambda pid=pid: os.kill(pid, signal.SIGKILL)))  # type: ignore[misc]
    return found


@contextlib.contextmanager
def rulebook(folder: Path, port: int, note: Path) -> Iterator[None]:
    """ansible-rulebook, started and listening."""
    beside = str(Path(sys.executable).parent)
    path = os.pathsep.join([beside, os.environ["PATH"]])
    missing = [name for name in ("ansible-rulebook", "ansible", "java") if shutil.which(name, path=path) is None]
    if missing:
        raise AbsentError(f"not installed: {' '.join(missing)}")
    ready, stamp = folder / "ready", services.built(folder, "stamp")
    (folder / "sources").mkdir()
    (folder / "sources/incident.py").write_text(SOURCE)
    (folder / "rulebook.yml").write_text(RULEBOOK.format(port=port, ready=ready, stamp=stamp, note=note))
    host = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    (folder / "inventory.yml").write_text(json.dumps({"all": {"hosts": {"localhost": host}}}))
    command = ["ansible-rulebook", "-r", "rulebook.yml", "-i", "inventory.yml", "-S", "sources"]
    java = Path(str(shutil.which("java", path=path))).resolve().parent.parent
    environment = {"JAVA_HOME": str(java)} | os.environ | {"PATH": path, "HOME": str(folder)}
    log = folder / "log"
    with (
        log.open("wb") as said,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=said, stderr=said, stdin=subprocess.DEVNULL,
            start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            end = time.monotonic() + BEGIN_SECONDS
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > end:
                    raise AbsentError(f"it does not start: {log.read_text()[-300:].strip()}")
                time.sleep(0.1)
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def ansible(folder: Path) -> list[float]:
    note, (port,) = folder / "note", services.free_ports(1)
    found = []
    with rulebook(folder, port, note), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        for _ in range(ROUNDS):
            time.sleep(PAUSE_SECONDS)
            found.append(stamped(note, lambda: channel.sendto(b"victim", ("127.0.0.1", port)) and None))
    return found


def told(peer: str, incident: str, measure: Callable[[Path], list[float]], folder: Path, ours_ms: float) -> None:
    """Print the figures of one peer beside ours for the same incident, or why it is left out."""
    folder.mkdir()
    try:
        found = measure(folder)
    except AbsentError as reason:
        print(json.dumps({"suite": "loop", "peer": peer, "absent": str(reason)}), flush=True)
        return
    for share, label in ((0.5, "p50"), (0.99, "p99")):
        value = percentile(found, share)
        figure(
            "loop", f"{incident}_to_action_ms_{label}", value, "ms", len(found), peer=peer,
            baseline="p50 of Pointcall in this run", ratio=value / ours_ms,
        )  # fmt: skip


def compare(folder: Path, lease_ms: float) -> None:
    """All of them, one after the other. `lease_ms`: how long Pointcall took from the refusal to the lease (p50)."""
    (folder / "pointcall").mkdir()
    ours = pointcall(folder / "pointcall")
    for share, label in ((0.5, "p50"), (0.99, "p99")):
        figure("loop", f"killed_to_action_ms_{label}", percentile(ours, share), "ms", len(ours))
    told("bpftrace + nft", "refused", bpftrace, folder / "bpftrace", lease_ms)
    told("systemd OnFailure", "killed", on_failure, folder / "systemd", percentile(ours, 0.5))
    told("ansible-rulebook", "killed", ansible, folder / "ansible", percentile(ours, 0.5))
