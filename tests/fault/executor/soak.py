"""A long life of the real executor, watched: `make soak` (one hour), or `--seconds N`; `--idle` only measures rest.

`pointcall run` on this kernel, in a private network and mount namespace. A service is killed every `--kill-every`
seconds while a client connects; now and then the disk is full (a small tmpfs), the central store is dead (a mirror that
nobody answers), the executor's wall clock jumps by hours (in its own modules: libfaketime 0.9 breaks Python's sleep). A
supervisor starts the executor again when it stops for its journal. Watched each second: resident memory, descriptors,
threads, CPU time. It fails where a long life grows, a service is not back in time, the kernel's counters of opened
circuits are not the receipts and the counted loss, or the log does not verify. The disk fills up in the first half.
Root. One JSON line at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta, tzinfo
from importlib import resources
from pathlib import Path
from typing import Any

import psycopg

from pointcall_executor import daemon, recorder, running_epoch, runs, serving, watch
from pointcall_executor.beginning import begin
from pointcall_executor.daemon import Executor
from pointcall_executor.journal import JournalReader
from pointcall_executor.journal_check import check_journal
from pointcall_executor.kernel.cgroup import Cgroup, find_root
from pointcall_executor.kernel.probe import BLOBS
from pointcall_executor.services.groups import remove_empty
from pointcall_keys.private_sigstore import PrivateSigstore
from tests.fault.executor import setting, story
from tests.kernel.lab import connect, private_network
from tests.lab import Lab, now

ROOT = Path(__file__).parents[3]
DISK_BYTES = 96 << 20
MS_REC_PRIVATE = 1 << 14 | 1 << 18
CLONE_NEWNS, MNT_DETACH = 0x20000, 2
HEALTHY_S = 5
RECOVERED_S = 10
LONG_LIFE = 120  # samples, one a second
FLAT = {"rss_mib": 4.0, "fds": 2.0, "threads": 2.0}  # what may come and go
FULL_EVERY_S, JUMP_EVERY_S, MIRROR_EVERY_S = 90, 45, 60


# ---- the child: `pointcall run` that also writes down what its kernel counts -----------------------------------------


def child(state: Path, config: Path, counters: Path) -> int:
    """Serving as it is, with a thread that looks at the circuits twice a second."""

    class Counted(Executor):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            threading.Thread(target=self._count, daemon=True).start()

        def _count(self) -> None:
            while True:
                time.sleep(0.5)
                try:
                    circuits = self.circuits()
                except Exception as error:  # the session may just be changing
                    serving.say("counters", error=repr(error))
                    continue
                if circuits:
                    opened = sum(c.opened for c in circuits)
                    counters.write_text(json.dumps({"opened": opened, "lost": self.lost_events}))

    serving.Executor = Counted  # type: ignore[misc]
    clock = Clock(counters.with_name("clock"))
    daemon.datetime = recorder.datetime = running_epoch.datetime = runs.datetime = watch.datetime = clock  # type: ignore[assignment,misc]
    begun = begin(state, config)
    with begun.ending:
        return serving.Serving(begun, state, config, state / "manifest-1").run()


class Clock:
    """`datetime` as far as the daemon and the recorder use it, shifted by the seconds that a file says."""

    def __init__(self, shift: Path) -> None:
        self._shift = shift

    def now(self, zone: tzinfo) -> datetime:
        with contextlib.suppress(OSError, ValueError):  # it may just be written
            return datetime.now(zone) + timedelta(seconds=int(self._shift.read_text()))
        return datetime.now(zone)


# ---- the supervisor --------------------------------------------------------------------------------------------------


class Running:
    """One executor process."""

    def __init__(self, soak: Soak) -> None:
        self.soak = soak
        self.begin = time.monotonic()
        self.armed_s: float | None = None
        soak.counters.write_text(json.dumps({"opened": 0, "lost": 0}))
        words = ["--child", str(soak.state), str(soak.config), str(soak.counters)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fault.executor.soak", *words],
            cwd=ROOT, env=soak.environment, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.said: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "pointcall: armed" in line and self.armed_s is None:
                self.armed_s = time.monotonic() - self.begin
            if os.environ.get("SOAK_VERBOSE"):
                sys.stderr.write(line)
            if not line.startswith("pointcall: notify"):
                self.said = [*self.said[-50:], line.strip()]

    def figures(self) -> dict[str, float]:
        return figures_of(self.process.pid)


def figures_of(pid: int) -> dict[str, float]:
    """What /proc says of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    rss = int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]
    threads = int(re.search(r"Threads:\s+(\d+)", status)[1])  # type: ignore[index]
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    cpu = (int(fields[11]) + int(fields[12])) / ticks
    return {
        "rss_mib": rss / 1024,
        "fds": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": threads,
        "cpu_s": cpu,
    }


class Soak:
    """The installation and the troubles."""

    def __init__(self, folder: Path, group: str, state: Path) -> None:
        self.folder, self.group, self.state = folder, group, state
        self.counters = folder / "counters.json"
        self.config = state / "pointcall.toml"
        values = {"node": "lab", "tee": "emulated", "cgroup": f"{group}/services", "gate": f"{group}/clients"}
        self.config.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()))
        self.clock = folder / "clock"
        self.clock.write_text("0")
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.counts = dict.fromkeys(
            ("kills", "starts", "stops", "went_on", "full", "jumps", "dead_store", "held_off", "not_recovered"), 0
        )
        self.recovered_s: list[float] = []
        self.late: list[dict[str, Any]] = []
        self.grown: list[str] = []
        self.compared: list[dict[str, int]] = []
        self.samples: list[dict[str, float]] = []
        self.restarts: list[float] = []
        self.running: Running | None = None
        self._ended = threading.Event()

    def start(self) -> Running:
        self.counts["starts"] += 1
        self.running = Running(self)
        return self.running

    def client(self) -> None:
        """Connects all the time, from where the gate sees it."""
        Cgroup(find_root() / self.group / "clients").add(0)
        while True:
            connect(story.PORT)
            time.sleep(0.004)

    def service_pid(self) -> int:
        procs = list((find_root() / self.group / "services").glob("*/cgroup.procs"))
        found = [int(line) for path in procs for line in path.read_text().split()]
        return found[0] if found else 0

    def kill_service(self) -> None:
        """kill -9, and see that another one runs within ten seconds; or a hold-off later, where the log says that the
        guard held it back because it was recreated a moment ago."""
        pid = self.service_pid()
        if not pid:
            return
        with contextlib.closing(JournalReader.open(self.state / "journal.db")) as journal:
            before = journal.size
        begin = time.monotonic()
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # the executor was quicker: it is being recreated
            return
        self.counts["kills"] += 1
        while (took_s := time.monotonic() - begin) < RECOVERED_S + HEALTHY_S:
            time.sleep(0.02)
            if self.service_pid() not in (0, pid) and connect(story.PORT) == "OK":
                break
        self.recovered_s.append(took_s)
        if took_s >= RECOVERED_S:
            self._late(took_s, before)

    def _late(self, took_s: float, before: int) -> None:
        """Say what the log knows of it. Nothing but a hold-off, and no longer than that, excuses it."""
        with contextlib.closing(JournalReader.open(self.state / "journal.db")) as journal:
            refusals = Counter(e.body["check"] for e in journal.entries("refusal", start=before))
        self.late.append({"after_s": round(took_s, 1), "refusals": dict(refusals)})
        excused = refusals["guard.flapping"] and took_s < RECOVERED_S + HEALTHY_S
        self.counts["held_off" if excused else "not_recovered"] += 1

    def fill(self) -> Path:
        """The disk is full."""
        filler = self.state / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(b"\0" * 65536)
        self.counts["full"] += 1
        return filler

    def jump(self, by_s: int) -> None:
        self.clock.write_text(str(by_s))
        self.counts["jumps"] += 1

    def mirror(self) -> None:
        """The central store does not answer: who ships the log is told so, and the executor does not notice."""
        try:
            psycopg.connect("host=127.0.0.1 port=1 connect_timeout=2").close()
        except psycopg.OperationalError:
            self.counts["dead_store"] += 1

    def run(self, seconds: float, kill_every: float) -> None:
        running, end = self.start(), time.monotonic() + seconds
        self._armed(running)
        due = {name: time.monotonic() + every for name, every in self._plan(kill_every).items()}
        while (now_s := time.monotonic()) < end:
            if running.process.poll() is not None:
                running = self._again(running)
            for name, every in self._plan(kill_every).items():
                if name == "full" and end - now_s < seconds / 2:
                    continue  # it often ends the executor, and a life that says whether memory is flat is a long one
                if now_s >= due[name]:
                    due[name] = now_s + every
                    getattr(self, f"_{name}")(running)
            with contextlib.suppress(OSError, TypeError):
                self.samples.append(
                    {"at_s": seconds - (end - now_s), "life": self.counts["starts"]} | running.figures()
                )
            time.sleep(1)
        self.jump(0)
        self._stop(running)

    def _plan(self, kill_every: float) -> dict[str, float]:
        return {"kill": kill_every, "full": FULL_EVERY_S, "jump": JUMP_EVERY_S, "store": MIRROR_EVERY_S}

    def _kill(self, _: Running) -> None:
        self.kill_service()

    def _jump(self, _: Running) -> None:
        self.jump((0, 3600, -7200, 36_000)[self.counts["jumps"] % 4])

    def _store(self, _: Running) -> None:
        self.mirror()

    def _full(self, running: Running) -> None:
        """Full for a while: the executor stops, or what it does still finds room in the write-ahead log it has."""
        self._compare()
        filler = self.fill()
        self.kill_service_quietly()
        try:
            running.process.wait(timeout=15)
            self.counts["stops"] += 1
        except subprocess.TimeoutExpired:
            self.counts["went_on"] += 1
        filler.unlink()

    def kill_service_quietly(self) -> None:
        pid = self.service_pid()
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _again(self, running: Running) -> Running:
        if not any("journal" in line or "storage" in line for line in running.said):
            raise AssertionError(f"the executor ended by itself: {running.said[-8:]}")
        self.jump(0)
        again = self.start()
        self._armed(again)
        return again

    def _armed(self, running: Running) -> None:
        deadline = time.monotonic() + 60
        while running.armed_s is None:
            if time.monotonic() > deadline or running.process.poll() is not None:
                raise AssertionError(f"not armed: {running.said[-8:]}")
            time.sleep(0.01)
        self.restarts.append(running.armed_s)

    def _stop(self, running: Running) -> None:
        time.sleep(2)
        self._compare()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=60) == 0, running.said[-8:]

    def _compare(self) -> None:
        """Circuits that opened by the kernel's counters, against receipts of such runs in this life."""
        time.sleep(1.5)
        with contextlib.closing(JournalReader.open(self.state / "journal.db")) as journal:
            entries = [
                e for start in range(0, journal.size, 10_000) for e in journal.entries(start=start, limit=10_000)
            ]
        begin = max(e.index for e in entries if e.kind == "config" and e.body["what"] == "kernel programs")
        receipts = sum(
            1 for e in entries[begin:] if e.kind == "receipt" and e.body["trigger"]["event"] == "CircuitOpened"
        )
        counted = json.loads(self.counters.read_text())
        self.compared.append({"kernel": counted["opened"], "receipts": receipts, "lost": counted["lost"]})

    def result(self) -> dict[str, Any]:
        lives = sorted({int(s["life"]) for s in self.samples})
        flat = {}
        for life in lives:
            rows = [s for s in self.samples if s["life"] == life]
            half = rows[len(rows) // 2 :]
            flat[life] = {
                name: [round(rows[min(5, len(rows) - 1)][name], 1), round(half[0][name], 1), round(rows[-1][name], 1)]
                for name in ("rss_mib", "fds", "threads")
            }
            self.grown += [f"life {life}: {what}" for what in growth(rows)]
        with contextlib.closing(JournalReader.open(self.state / "journal.db")) as journal:
            verdict, size = check_journal(journal), journal.size
        recovered = sorted(self.recovered_s) or [0.0]
        return self.counts | {
            "recovered_s": {"p50": round(recovered[len(recovered) // 2], 2), "max": round(recovered[-1], 2)},
            "late": self.late,
            "grown": self.grown,
            "start_middle_end_of_each_life": flat,
            "restart_to_armed_s": [round(s, 2) for s in self.restarts],
            "counters": self.compared,
            "entries": size,
            "log_check": "passed" if verdict.passed else [c.id for c in verdict.failed],
        }


def idle(soak: Soak, seconds: float) -> dict[str, Any]:
    """Armed and at rest: nobody connects."""
    running = soak.start()
    soak._armed(running)
    time.sleep(5)
    before = running.figures()
    time.sleep(seconds)
    after = running.figures()
    running.process.send_signal(signal.SIGTERM)
    running.process.wait(timeout=60)
    share = (after["cpu_s"] - before["cpu_s"]) / seconds * 100
    return {"rss_mib": round(after["rss_mib"], 1), "cpu_percent": round(share, 2), "fds": after["fds"],
            "threads": after["threads"], "restart_to_armed_s": round(running.armed_s or 0, 2)}  # fmt: skip


@contextlib.contextmanager
def installation(folder: Path) -> Iterator[Soak]:
    """Signed outside, then in a private network with a small disk and cgroups of our own."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "a private mount namespace")
    disk = folder / "disk"
    disk.mkdir()
    if libc.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 0, f"size={DISK_BYTES}".encode()):
        raise OSError(ctypes.get_errno(), "a small disk")
    group = f"pointcall-soak-{os.getpid()}"
    with PrivateSigstore.start(folder / "sigstore", clock=now) as sigstore:
        (folder / "tee").mkdir()
        script = Path(str(resources.files("pointcall_executor.demo"))) / "service.py"
        program = [str(Path(sys.executable).resolve()), "-I", "-S", str(script), str(story.PORT)]
        ready = {"tcp": f"127.0.0.1:{story.PORT}", "timeout_ms": 10_000}
        lab = Lab(disk / "state", sigstore, folder / "tee")
        guard = {"healthyDelaySeconds": HEALTHY_S, "maxActionsPerMinute": 6000}  # else killing it is flapping
        state = setting.prepare(
            lab,
            program=program,
            blobs=BLOBS,
            guard=guard,
            ready=ready,
            stop={"signal": "TERM", "grace_ms": 200},
        )
    Cgroup.create(f"{group}/clients/keep")
    with private_network():
        soak = Soak(folder, group, state)
        try:
            yield soak
        finally:
            if soak.running is not None:
                soak.running.process.kill()
                soak.running.process.wait()
            for path in (find_root() / group).rglob("cgroup.procs"):
                for line in path.read_text().split():
                    with contextlib.suppress(OSError):
                        os.kill(int(line), signal.SIGKILL)
            time.sleep(0.3)
            place = find_root() / group
            for below in sorted((p for p in place.rglob("*") if p.is_dir()), reverse=True):  # the spawner's as well
                remove_empty(str(below.relative_to(find_root())))
            libc.umount2(str(disk).encode(), MNT_DETACH)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--kill-every", type=float, default=30)
    parser.add_argument("--idle", action="store_true")
    parser.add_argument("--child", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is taken away again
    with tempfile.TemporaryDirectory(prefix="pointcall-soak-") as folder, installation(Path(folder)) as soak:
        if args.idle:
            print(json.dumps(idle(soak, min(args.seconds, 60))))
            return 0
        client = os.fork()
        if not client:
            soak.client()
        try:
            soak.run(args.seconds, args.kill_every)
        finally:
            os.kill(client, signal.SIGKILL)
            os.waitpid(client, 0)
        result = soak.result()
        print(json.dumps(result))
        bad = result["log_check"] != "passed" or result["not_recovered"] or result["grown"]
        wrong = bad or unequal(soak.compared)
        return 1 if wrong else 0


def growth(rows: list[dict[str, float]]) -> list[str]:
    """What the last quarter of a life needs more of than its second quarter did; its first one warms up. Only of lives
    that are long enough to say."""
    if len(rows) < LONG_LIFE:
        return []
    quarter = len(rows) // 4
    early, late = rows[quarter : 2 * quarter], rows[-quarter:]
    found = []
    for name, allowed in FLAT.items():
        was, now_is = (statistics.median(row[name] for row in part) for part in (early, late))
        if now_is > was + allowed:
            found.append(f"{name} {was:.1f} -> {now_is:.1f}, at most {allowed} more")
    return found


def unequal(compared: list[dict[str, int]]) -> bool:
    return any(row["kernel"] != row["receipts"] + row["lost"] for row in compared)


if __name__ == "__main__":
    sys.exit(main())
