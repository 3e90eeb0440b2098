"""From kill -9 of a service to its next accept: Pointcall (`recreate`, kind process) beside supervisord and systemd.

The same small C program under each of them, killed in turn, all waiting at the same time; the same client connects
until somebody else answers. Pointcall's figure is of the whole path: kernel event, Wasm, guard, durable intent,
digests, cgroup, start. The baseline is a loop that does nothing but waitpid and posix_spawn. Needs root and the
blobs; a peer that is not installed is left out.

usage: python -m tests.bench.services [--rounds N]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pointcall_executor.config import Config
from pointcall_executor.daemon import Executor
from pointcall_executor.kernel.probe import BLOBS
from pointcall_executor.node import KernelNode
from pointcall_executor.run import Run
from pointcall_keys.private_sigstore import PrivateSigstore
from tests.bench.figures import figure, percentile
from tests.lab import Lab, now
from tests.unit.services.manager import Manager

PAUSE_SECONDS = 0.8  # between two kills: the next instance gets ready, old cgroups go
WAIT_SECONDS = 10.0
FLOOR = """
import os, sys
while True:
    os.waitpid(os.posix_spawn(sys.argv[1], sys.argv[1:], {}), 0)
"""
# The limit of starts belongs to [Unit]; elsewhere it is ignored, and the sixth kill within ten seconds is the last.
SYSTEMD_UNIT = """
[Unit]
StartLimitIntervalSec=0
[Service]
ExecStart={program} {at}
Restart=always
RestartSec=0
"""
RUNBOOK = '''"""Start again what was killed."""
from pointcall_runbook import NO_SERVICE, Decision, ProcessExited, Recreate, runbook

@runbook
def decide(e: ProcessExited) -> Decision:
    if e.service == NO_SERVICE:
        return []
    return [Recreate(service=e.service, grace=0)]
'''


def built(folder: Path, name: str = "listener") -> Path:
    program = folder / name
    source = Path(__file__).with_name(f"{name}.c")
    compiler = shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        sys.exit("tests.bench.services needs a C compiler")
    subprocess.run([compiler, "-O2", "-o", program, source], check=True)
    return program


def free_ports(count: int) -> list[int]:
    """Below the ephemeral range: a client that connects where nobody listens must not meet itself."""
    found = []
    for at in range(20_000, 32_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", at))
            found.append(at)
        if len(found) == count:
            return found
    sys.exit("no free ports")


def accepting(at: int) -> int:
    """The pid of whoever accepts there."""
    with socket.create_connection(("127.0.0.1", at), timeout=WAIT_SECONDS) as client:
        return int(client.recv(16))


def recovery_ms(knock: Path, at: int) -> float:
    """Kill whoever accepts there; milliseconds until somebody else does. TimeoutError."""
    done = subprocess.run([knock, str(at), str(int(WAIT_SECONDS))], capture_output=True, text=True)
    if done.returncode:
        raise TimeoutError(f"nobody accepts on {at}")
    return int(done.stdout) / 1e6


@contextlib.contextmanager
def floor(folder: Path, program: Path, ports: Sequence[int]) -> Iterator[None]:
    at = ports[0]
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", FLOOR, str(program), str(at)]) as process:
        try:
            yield
        finally:
            pid = accepting(at)
            process.kill()
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def supervisord(folder: Path, program: Path, ports: Sequence[int]) -> Iterator[None]:
    at = ports[0]
    config = folder / "supervisord.conf"
    config.write_text(
        f"[supervisord]\nnodaemon=true\nlogfile=/dev/null\nlogfile_maxbytes=0\npidfile={folder}/supervisord.pid\n"
        f"[program:listener]\ncommand={program} {at}\nautorestart=true\nstartsecs=0\nstartretries=1000000\n"
        "stdout_logfile=NONE\nstderr_logfile=NONE\n"
    )
    command = [sys.executable, "-W", "ignore", "-m", "supervisor.supervisord", "-c", str(config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


@contextlib.contextmanager
def systemd(folder: Path, program: Path, ports: Sequence[int]) -> Iterator[None]:
    at = ports[0]
    with Manager(folder / "systemd") as manager:
        unit = manager.units / "listener.service"
        unit.write_text(SYSTEMD_UNIT.format(program=program, at=at))
        manager.start("listener.service")
        yield


@contextlib.contextmanager
def pointcall(
    folder: Path,
    program: Path,
    ports: Sequence[int],
    memory_bytes: int | None,
    on_receipt: Callable[[Run], None] = lambda _run: None,
) -> Iterator[None]:
    """One service for each round: the guard holds off a second recreate of the same one, as it should."""
    group = f"pointcall-bench-{os.getpid()}-{memory_bytes or 0}"
    settings: dict[str, Any] = {
        "node": "lab",
        "tee": "emulated",
        "cgroup": f"{group}/services",
        "gate": f"{group}/gate",
    }
    with PrivateSigstore.start(folder / "sigstore", clock=now) as sigstore:
        lab = Lab(folder, sigstore, folder / "tee")
        lab.runbook("again", RUNBOOK)
        names = {f"svc-{at}": at for at in ports}
        for name, at in names.items():
            process = {
                "argv": [str(program), str(at)],
                "files": [{"path": str(program), "sha256": hashlib.sha256(program.read_bytes()).hexdigest()}],
                "ready": {"tcp": f"127.0.0.1:{at}"},
                "limits": {"memory_bytes": memory_bytes},
            }
            lab.declare(name, process)
        grants = {"actions": ["recreate"], "services": list(names)}
        body = {
            "runbooks": [
                {"name": "again", "source": "again", "grants": grants, "limits": {"perMinute": 600, "burst": 100}}
            ],
            "sensors": [{"name": "breaker", "params": {"threshold": 3}}, {"name": "lifecycle"}],
            "services": [
                {"name": name, "declaration": f"{name}.json", "listen": [{"address": "127.0.0.1", "port": at}]}
                for name, at in names.items()
            ],
            "guard": {"maxActionsPerMinute": 6000, "stormEventsPerMinute": 1_000_000},
        }
        node = KernelNode(Config(**settings), lab.state)
        executor = Executor(lab.state, Config(**settings), lab.platform, node)
        executor.on_receipt = on_receipt
        try:
            executor.arm(lab.sign(lab.assemble(body, 1, blobs=BLOBS)))
            yield
        finally:
            executor.close(stop_services=True)


def _serve(channel: Connection, folder: Path, program: Path, ports: Sequence[int], memory_bytes: int | None) -> None:
    with pointcall(folder, program, ports, memory_bytes):
        channel.send("ready")
        channel.recv()


@contextlib.contextmanager
def apart(folder: Path, program: Path, ports: Sequence[int], memory_bytes: int | None) -> Iterator[None]:
    """The same in a process of its own, as every other one here is."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, folder, program, ports, memory_bytes))
    process.start()
    try:
        if not ours.poll(WAIT_SECONDS * 3):
            raise TimeoutError("the executor does not start")
        ours.recv()
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            ours.send("end")
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    if os.geteuid():
        sys.exit("tests.bench.services needs root")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        program, knock = built(folder), built(folder, "knock")
        limit = 64 << 20
        makers: dict[str, Callable[[Path, Path, Sequence[int]], contextlib.AbstractContextManager[None]]] = {
            "floor": floor,
            "pointcall": functools.partial(apart, memory_bytes=None),
            "pointcall_memory_limit": functools.partial(apart, memory_bytes=limit),
        }
        if importlib.util.find_spec("supervisor"):
            makers["supervisord"] = supervisord
        if Manager.missing() == "":
            makers["systemd"] = systemd
        found = iter(free_ports(rounds * len(makers)))
        ports = {who: [next(found) for _ in range(rounds)] for who in makers}
        for who, make in makers.items():
            (folder / who).mkdir()
            stack.enter_context(make(folder / who, program, ports[who]))
        time.sleep(2)
        took: dict[str, list[float]] = {who: [] for who in makers}
        for turn in range(rounds):
            for who in makers:
                time.sleep(PAUSE_SECONDS / len(makers))
                try:
                    took[who].append(recovery_ms(knock, ports[who][turn if who.startswith("pointcall") else 0]))
                except TimeoutError as error:
                    sys.exit(f"{who}: {error}")
        report(took)
    shutil.rmtree(name, ignore_errors=True)


def report(took: dict[str, list[float]]) -> None:
    base = took["floor"]
    for who, values in took.items():
        for share, label in ((0.5, "p50"), (0.99, "p99")):
            ratio = percentile(values, share) / percentile(base, share)
            peer = None if who.startswith("pointcall") or who == "floor" else who
            figure(
                "services", f"{who}_kill_to_accept_ms_{label}", percentile(values, share), "ms", len(values),
                baseline="waitpid and posix_spawn alone", ratio=ratio, peer=peer,
            )  # fmt: skip


if __name__ == "__main__":
    main()
