"""From exec to armed: a killed executor is started again on the state folder that it left.

`pointcall run` with default settings, armed on this kernel with a manifest of one service, one runbook and two sensors,
killed with SIGKILL and started again. Armed is what it tells the service manager, over a socket that the bench reads.
The service outlives the kill and is adopted. The baseline is this interpreter importing the library that verifies
signatures, which nothing armed from disk can do without. Needs root and the blobs.

usage: python -m tests.bench.start [--rounds N] [--entries N]
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pointcall_executor.kernel.cgroup import find_root
from tests.bench.figures import figure, percentile
from tests.bench.idle import remove
from tests.fault.executor.soak import Soak, installation

TARGET_SECONDS = 2.0
ARM_SECONDS = 60.0
BASELINE = "import sigstore.verify"


def environment(soak: Soak) -> dict[str, str]:
    """With bytecode on disk, as every installation has it."""
    return {name: value for name, value in soak.environment.items() if name != "PYTHONDONTWRITEBYTECODE"}


def baseline_s() -> float:
    begin = time.monotonic()
    subprocess.run([sys.executable, "-I", "-B", "-c", BASELINE], check=True, env={})
    return time.monotonic() - begin


class Life:
    """One life of the executor, from exec to SIGKILL."""

    def __init__(self, soak: Soak, notify: socket.socket) -> None:
        words = ["run", "--config", str(soak.config), "--state-dir", str(soak.state)]
        self._notify = notify
        self._begin = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pointcall_executor.cli", *words, "--manifest", str(soak.state / "manifest-1")],
            env=environment(soak) | {"NOTIFY_SOCKET": str(notify.getsockname())},
            stderr=subprocess.DEVNULL,
        )

    def armed_s(self) -> tuple[float, float]:
        """Seconds until it said that it is armed, and until it said that it is ready."""
        armed_s: float | None = None
        while True:
            try:
                lines = self._notify.recv(4096).decode().splitlines()
            except TimeoutError:
                raise SystemExit(f"not armed within {ARM_SECONDS:g} s") from None
            took = time.monotonic() - self._begin
            armed = any(line.startswith("STATUS=armed") for line in lines)
            if armed_s is None and armed:
                armed_s = took
            if "READY=1" in lines:
                if armed_s is None:
                    raise SystemExit(f"ready and not armed: {lines}")
                return armed_s, took

    def kill(self) -> float:
        """CPU seconds that it took, with those of the child that verified."""
        self._process.kill()
        if self._process.returncode is not None:
            return 0.0
        _, status, used = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        return used.ru_utime + used.ru_stime

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=30)


def one_life(soak: Soak, notify: socket.socket) -> tuple[float, float, float]:
    """Seconds until armed, until ready, and of CPU until both."""
    life, armed = Life(soak, notify), (0.0, 0.0)
    try:
        armed = life.armed_s()
    finally:
        used = life.kill()
    return *armed, used


def measure(soak: Soak, rounds: int) -> None:
    path = soak.folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(path))
        notify.settimeout(ARM_SECONDS)
        one_life(soak, notify)  # the first has to start the service, and reads everything from disk
        pairs = [(one_life(soak, notify), baseline_s()) for _ in range(rounds)]
        last = Life(soak, notify)
        try:
            last.armed_s()
            last.stop()  # in order, so that nothing stays
        finally:
            last.kill()
    base = percentile([pair[1] for pair in pairs], 0.5)
    against = f"{BASELINE}: {base:.2f} s; target < {TARGET_SECONDS:g} s"
    for metric, index in (("restart to armed", 0), ("restart to ready", 1), ("cpu until ready", 2)):
        took = [pair[0][index] for pair in pairs]
        for share, label in ((0.5, "p50"), (1.0, "worst")):
            value = percentile(took, share)
            figure("start", f"{metric}, {label}", value, "s", rounds, baseline=against, ratio=value / base)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if os.getuid() != 0:
        raise SystemExit("the start figures need root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    group = find_root() / f"pointcall-soak-{os.getpid()}"
    try:
        with tempfile.TemporaryDirectory(prefix="pointcall-start-") as folder, installation(Path(folder)) as soak:
            measure(soak, args.rounds)
    finally:
        remove(group)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
