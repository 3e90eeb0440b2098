"""An armed executor at rest: resident memory, CPU and wake-ups, each beside its target.

`pointcall run` with default settings, armed on this kernel with a manifest of one service, one runbook and two sensors;
nobody connects and nothing fails. Memory is VmRSS; its private and file-backed parts are printed too. The baseline of
the memory is this interpreter with nothing imported. Needs root and the blobs.

usage: python -m tests.bench.idle [--seconds N] [--maps]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pointcall_executor.kernel.cgroup import find_root
from tests.bench.figures import figure
from tests.fault.executor.soak import Soak, figures_of, installation

SETTLE_SECONDS = 5.0
ARM_SECONDS = 60.0
TARGET_RSS_MIB, TARGET_CPU_PERCENT = 80.0, 0.5


def rollup(pid: int | str) -> dict[str, float]:
    """MiB by the kinds of /proc/PID/smaps_rollup."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return {name: int(kib) / 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


def by_mapping(pid: int) -> Counter[str]:
    """Resident KiB by mapped file."""
    found: Counter[str] = Counter()
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            words = line.split(maxsplit=5)
            name = words[5] if len(words) == 6 else "anonymous"
        elif line.startswith("Rss:"):
            found[name] += int(line.split()[1])
    return found


def wakeups(pid: int) -> dict[str, int]:
    """Voluntary context switches of each thread: how often it slept, so how often it woke."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            status = (task / "status").read_text()
            name = re.search(r"^Name:\s+(.+)", status, re.MULTILINE)
            count = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.MULTILINE)
            if name and count:
                found[f"{name[1]}-{task.name}"] = int(count[1])
    return found


def cpu_ns(pid: int) -> int:
    """CPU time of all threads, finer than /proc/PID/stat's ticks."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


@contextlib.contextmanager
def armed(soak: Soak) -> Iterator[int]:
    """The process id of a `pointcall run` that has armed its manifest."""
    words = ["run", "--config", str(soak.config), "--state-dir", str(soak.state)]
    process = subprocess.Popen(
        [sys.executable, "-m", "pointcall_executor.cli", *words, "--manifest", str(soak.state / "manifest-1")],
        env=soak.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    ready, said = threading.Event(), list[str]()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if line.startswith("pointcall: armed"):
                ready.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        if not ready.wait(ARM_SECONDS):
            raise SystemExit(f"not armed: {''.join(said)}")
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        finally:
            process.kill()


def empty_interpreter() -> float:
    code = "import pathlib; print(pathlib.Path('/proc/self/smaps_rollup').read_text())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found = re.search(r"^Rss:\s+(\d+)", out, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def measure(soak: Soak, seconds: float, *, maps: bool) -> None:
    floor = empty_interpreter()
    with armed(soak) as pid:
        time.sleep(SETTLE_SECONDS)
        before, woken, begin = cpu_ns(pid), wakeups(pid), time.monotonic()
        time.sleep(seconds)
        after, again, end = cpu_ns(pid), wakeups(pid), time.monotonic()
        now, memory = figures_of(pid), rollup(pid)
        took = end - begin
        rss = now["rss_mib"]
        against = f"empty interpreter {floor:.1f} MiB; target < {TARGET_RSS_MIB:g} MiB"
        figure("idle", "resident", rss, "MiB", 1, baseline=against, ratio=rss / floor)
        private = memory["Private_Clean"] + memory["Private_Dirty"]
        figure("idle", "resident, private", private, "MiB", 1, baseline="resident", ratio=private / rss)
        figure("idle", "resident, anonymous", memory["Anonymous"], "MiB", 1, baseline="resident")
        percent = (after - before) / 1e9 / took * 100
        against = f"target < {TARGET_CPU_PERCENT:g} % of a core"
        figure("idle", "cpu", percent, "%", int(took), baseline=against, ratio=percent / TARGET_CPU_PERCENT)
        rates = {name: (again[name] - woken.get(name, 0)) / took for name in again}
        figure("idle", "wake-ups", sum(rates.values()), "1/s", int(took))
        figure("idle", "threads", now["threads"], "threads", 1)
        figure("idle", "descriptors", now["fds"], "descriptors", 1)
        if maps:
            for name, rate in sorted(rates.items(), key=lambda row: -row[1]):
                figure("idle", f"wake-ups of {name}", rate, "1/s", int(took))
            for name, kib in by_mapping(pid).most_common(25):
                figure("idle", f"resident of {Path(name).name}", kib / 1024, "MiB", 1)


def remove(group: Path) -> None:
    """What is left of the lab's cgroups: the spawner ends after its last service."""
    deadline = time.monotonic() + 5
    while group.exists() and time.monotonic() < deadline:
        for folder in (*group.glob("*-spawner.*"), group):
            with contextlib.suppress(OSError):
                folder.rmdir()
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--maps", action="store_true", help="also by mapped file and by thread")
    args = parser.parse_args()
    if os.getuid() != 0:
        raise SystemExit("the idle figures need root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    group = find_root() / f"pointcall-soak-{os.getpid()}"
    try:
        with tempfile.TemporaryDirectory(prefix="pointcall-idle-") as folder, installation(Path(folder)) as soak:
            measure(soak, args.seconds, maps=args.maps)
    finally:
        remove(group)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
