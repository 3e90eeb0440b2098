"""Every detector on this very kernel: armed from a signed manifest, the real trouble made, the receipt there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import select
import socket
import struct
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pointcall_attest.receipt import Receipt
from pointcall_attest.replay import replay_all
from pointcall_executor import watch
from pointcall_executor.arming import ArmingError
from pointcall_executor.backend import ExecutorBackend
from pointcall_executor.config import Config
from pointcall_executor.daemon import Executor
from pointcall_executor.kernel import bpf, btf
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.cgroup import find_root
from pointcall_executor.kernel.errors import CircuitError, KernelError
from pointcall_executor.kernel.probe import BLOBS
from pointcall_executor.learning import Kept, Learned
from pointcall_executor.node import KernelNode
from pointcall_executor.run import Run
from pointcall_executor.services.groups import remove_empty
from pointcall_executor.session import Bundle
from pointcall_executor.telemetry.latencies import FRESH_SECONDS
from pointcall_executor.telemetry.station import Station
from tests.kernel.lab import BLOCKED, LOOPBACK, black_hole, connects, in_namespace, member, need_blob, private_network
from tests.kernel.slowfs import Op, SlowFs, loop_ext4, mounted, private_mounts
from tests.kernel.test_pins_kernel import LINK_UPDATE, raw_bpf
from tests.lab import Lab

pytestmark = pytest.mark.kernel
PORT, DEAD_PORT = 30911, 30912
EVENTS = (
    "CircuitStuck", "ConnectSlow", "DiskError", "FilesystemSlow", "PressureHigh", "SyscallUnusual", "CircuitOpened",
    "RetransmitStorm",
)  # fmt: skip

RUNBOOK = '''"""Tell a channel about each event, with a number for each."""
from pointcall_runbook import (
    CircuitOpened, CircuitStuck, ConnectSlow, Decision, DiskError, FilesystemSlow, Level, Notify, PressureHigh,
    RetransmitStorm, SyscallUnusual, channel, runbook
)

''' + "\n".join(
    f"""@runbook
def on_{number}(e: {event}) -> Decision:
    return [Notify(channel=channel("ops"), level=Level.WARNING, code={number})]
"""
    for number, event in enumerate(EVENTS)
)

# Does what a line says, in its own cgroup: `eval` of Python from the test that declared it.
WORKER = """
import contextlib, ctypes, os, socket, sys, threading, time
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    connection, _ = server.accept()
    with contextlib.suppress(OSError), connection, connection.makefile("rw") as lines:
        for line in lines:
            lines.write(repr(eval(line)) + "\\n")
            lines.flush()
"""


class Worker:
    """The declared service: a line in, what it evaluated to out."""

    def __init__(self) -> None:
        self._socket = socket.create_connection(("127.0.0.1", PORT), timeout=30)
        self._lines = self._socket.makefile("rw")

    def do(self, line: str) -> str:
        self._lines.write(line + "\n")
        self._lines.flush()
        return self._lines.readline().strip()

    def line(self) -> str:
        return self._lines.readline().strip()

    def silent(self, line: str, *, seconds: float) -> None:
        """Ask, and see that no answer comes."""
        self._socket.sendall(line.encode() + b"\n")
        self.still_silent(seconds)

    def still_silent(self, seconds: float = 0) -> None:
        assert select.select([self._socket], [], [], seconds)[0] == []

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it was cut off
            self._lines.close()
        self._socket.close()


def declare(lab: Lab, folder: Path) -> str:
    script, python = folder / "worker.py", os.path.realpath(sys.executable)
    script.write_text(WORKER)
    files = [{"path": p, "sha256": hashlib.sha256(Path(p).read_bytes()).hexdigest()} for p in (python, str(script))]
    argv = [python, "-I", "-S", str(script), str(PORT)]
    return lab.declare("worker", {"argv": argv, "files": files, "ready": {"tcp": f"127.0.0.1:{PORT}"}})


def spec(
    lab: Lab, folder: Path, sensors: list[dict[str, Any]], listen: Sequence[dict[str, Any]] = (), **over: Any
) -> dict[str, Any]:
    lab.runbook("tell", RUNBOOK)
    places = [{"address": "127.0.0.1", "port": port} for port in (PORT, DEAD_PORT)] + list(listen)
    return {
        "runbooks": [{"name": "tell", "source": "tell", "grants": {"actions": ["notify"], "channels": ["ops"]}}],
        "sensors": sensors,
        "services": [{"name": "worker", "declaration": declare(lab, folder), "listen": places}],
        "channels": [{"name": "ops", "kind": "log"}],
    } | over


class Story:
    """An executor on this kernel, armed; what it was told and the receipts of its runs."""

    def __init__(self, lab: Lab, folder: Path, executor: Executor, said: list[str], home: int) -> None:
        self.lab, self.folder, self.executor, self.said, self.home = lab, folder, executor, said, home
        self._runs: queue.SimpleQueue[Run] = queue.SimpleQueue()
        executor.on_receipt = self._runs.put

    @contextlib.contextmanager
    def again(self, bundle: Bundle) -> Iterator[Story]:
        """The next executor of this installation, armed with the same; this one has ended."""
        config = self.executor.config
        node, settings = KernelNode(config, self.lab.state, self.said.append), config.model_dump(exclude={"node"})
        with self.lab.executor(node, **settings) as executor:
            after = Story(self.lab, self.folder, executor, self.said, self.home)
            executor.arm(bundle)
            yield after

    def arm(self, *sensors: dict[str, Any], sequence: int, **over: Any) -> None:
        """Take over from what is armed; signed before, because here is no way to Sigstore."""
        with in_namespace(self.home):
            made = spec(self.lab, self.folder, list(sensors), **over)
            bundle = self.lab.sign(self.lab.assemble(made, sequence, blobs=BLOBS))
        self.executor.arm(bundle)

    def receipt(self, event: str, seconds: float = 15) -> Receipt:
        """The next receipt of a run about such an event; it replays to the same decision."""
        deadline = time.monotonic() + seconds
        while True:
            run = self._runs.get(timeout=max(0.01, deadline - time.monotonic()))
            if type(run.event).__name__ == event:
                entry = self.executor.journal.receipt(run.id)
                (replayed,) = replay_all([entry], self.executor.journal.blob)
                assert replayed.differences == ()
                return entry.receipt()


@pytest.fixture
def tell(lab: Lab, tmp_path: Path) -> Callable[..., contextlib.AbstractContextManager[Story]]:
    """tell(sensors) -> a story with these sensors armed, alone in its network, mounts and cgroups.

    `listen`: more places that the service declares; `node`: settings; all other words replace parts of the spec.
    """

    @contextlib.contextmanager
    def begin(*sensors: dict[str, Any], node: Mapping[str, Any] | None = None, **over: Any) -> Iterator[Story]:
        for sensor in sensors:
            if sensor["name"] != "pressure":
                need_blob(sensor["name"])
        bundle = lab.sign(lab.assemble(spec(lab, tmp_path, list(sensors), **over), blobs=BLOBS))
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        with private_network(), member("gate") as gate:
            said: list[str] = []
            parent = f"pointcall-detectors-{os.getpid()}"
            settings: dict[str, Any] = {"cgroup": parent, "gate": str(gate.path.relative_to(find_root())), "api": False}
            settings |= node or {}
            config = Config(**({"node": "lab", "tee": "emulated"} | settings))
            machine = KernelNode(config, lab.state, said.append)
            try:
                with lab.executor(machine, **settings) as executor:
                    story = Story(lab, tmp_path, executor, said, home)
                    executor.arm(bundle)
                    yield story
            finally:
                remove_empty(parent)
                os.close(home)

    return begin


@pytest.fixture
def slow_fs(tmp_path: Path) -> Iterator[SlowFs]:
    folder = tmp_path / "slow"
    folder.mkdir()
    with private_mounts(), mounted(folder) as fs:
        yield fs


Tell = Callable[..., contextlib.AbstractContextManager[Story]]


def proven(story: Story, receipt: Receipt, sensor: str) -> None:
    """The receipt names the sensor and the digest of its blob, and the action was done."""
    blob = hashlib.sha256((BLOBS / f"{sensor}.blob").read_bytes()).hexdigest() if sensor != "pressure" else "0" * 64
    assert (receipt.trigger.sensor, receipt.trigger.blob) == (sensor, blob)
    assert [a.outcome for a in receipt.actions] == ["applied"]
    number = EVENTS.index(receipt.trigger.event)
    assert f"notify channel=ops level=warning code={number}" in story.said


def test_a_slow_connect(tell: Tell) -> None:
    with (
        tell({"name": "transport", "params": {"timeouts_min": 2, "window_ns": 10**10}}) as story,
        black_hole(DEAD_PORT),
    ):
        clients = [socket.socket() for _ in range(2)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", DEAD_PORT))
        proven(story, story.receipt("ConnectSlow"), "transport")
        for client in clients:
            client.close()


def test_a_stuck_circuit(tell: Tell) -> None:
    params = {"threshold": 2, "stuck_ms": 600, "cooldown_us": 10**8, "window_us": 10**8}
    with tell({"name": "breaker", "params": params}) as story:
        assert connects(3, DEAD_PORT) == ["ECONNREFUSED", "ECONNREFUSED", BLOCKED]
        proven(story, story.receipt("CircuitStuck"), "breaker")


def test_a_slow_file_system(tell: Tell, slow_fs: SlowFs) -> None:
    params = {"slow_ns": 10**7, "stall_ns": 10**8, "window_ns": 10**9}
    with tell({"name": "fuse", "params": params}) as story, contextlib.closing(Worker()) as worker:
        slow_fs.delay(Op.WRITE, 0.15)
        assert worker.do(f"os.pwrite(os.open({str(slow_fs.path)!r}, os.O_RDWR), b'x' * 512, 0)") == "512"
        slow_fs.delay(Op.WRITE, 0)
        proven(story, story.receipt("FilesystemSlow"), "fuse")


def test_a_file_system_that_hangs_is_acted_upon_while_it_hangs(tell: Tell, slow_fs: SlowFs) -> None:
    """The end would be no event: only its hanging is."""
    params = {"slow_ns": 10**15, "stall_ns": 10**15, "hung_ms": 1000}
    with tell({"name": "fuse", "params": params}) as story, contextlib.closing(Worker()) as worker:
        slow_fs.delay(Op.WRITE, 3600)
        try:
            worker.silent(f"os.pwrite(os.open({str(slow_fs.path)!r}, os.O_RDWR), b'x' * 512, 0)", seconds=0.3)
            first, second = story.receipt("FilesystemSlow"), story.receipt("FilesystemSlow")
            worker.still_silent()
        finally:
            slow_fs.delay(Op.WRITE, 0)
        assert worker.line() == "512"
        proven(story, first, "fuse")
        longest = [int(receipt.inputs.fields["longest"]) for receipt in (first, second)]
        assert 10**9 <= longest[0] <= longest[1] - 10**9
        assert first.inputs.fields["service"] == "worker"


def test_the_operator_sees_how_long_storage_took_by_service(tell: Tell, slow_fs: SlowFs) -> None:
    """From a signed manifest to the page over HTTP; also when the service is recreated and another manifest follows."""
    fuse = {"name": "fuse"}
    line = f"os.pwrite(os.open({str(slow_fs.path)!r}, os.O_RDWR), b'x' * 512, 0)"
    with tell(fuse) as story, contextlib.ExitStack() as ending:
        executor = story.executor
        station = Station(executor, ExecutorBackend(executor), Config(http="127.0.0.1:0"))
        ending.callback(station.stop)
        assert station.listener is not None

        def writes() -> float:
            time.sleep(FRESH_SECONDS + 0.1)
            assert station.listener is not None
            with urllib.request.urlopen(f"http://127.0.0.1:{station.listener.port}/metrics", timeout=20) as answer:
                families = text_string_to_metric_families(answer.read().decode())
            wanted = {"sensor": "fuse", "service": "worker", "operation": "write", "le": "+Inf"}
            (storage,) = [f for f in families if f.name == "pointcall_storage_seconds"]
            return sum(s.value for s in storage.samples if wanted.items() <= s.labels.items())

        with contextlib.closing(Worker()) as worker:
            assert [worker.do(line) for _ in range(3)] == ["512"] * 3
        assert writes() == 3
        assert executor.session is not None
        services, (number,) = executor.session.services, executor.session.topology.names
        services.destroy(number, 0)
        services.start(number)
        with contextlib.closing(Worker()) as worker:
            assert worker.do(line) == "512"
            assert writes() == 4
            story.arm(fuse, sequence=3)
            assert writes() == 4
            assert worker.do(line) == "512"
            assert writes() == 5
        executor.disarm("enough")
        assert writes() == 5


def test_a_disk_error_and_a_slow_disk(tell: Tell, slow_fs: SlowFs, tmp_path: Path) -> None:
    folder = tmp_path / "ext4"
    folder.mkdir()
    params = {"slow_ns": 10**7, "stall_ns": 10**8, "window_ns": 10**9}
    with loop_ext4(slow_fs, folder) as loop, tell({"name": "storage", "params": params}) as story:
        slow_fs.delay(Op.READ, 0.15)
        with loop.open("rb", buffering=0) as raw:
            os.pread(raw.fileno(), 4096, 40 << 20)
            slow_fs.fail(Op.READ)
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(raw.fileno(), 4096, 60 << 20)
        slow_fs.delay(Op.READ, 0)
        proven(story, story.receipt("FilesystemSlow"), "storage")
        proven(story, story.receipt("DiskError"), "storage")


def test_a_novel_system_call_and_failing_ones(tell: Tell) -> None:
    params = {"learn_ms": 1500, "error_min": 50, "error_percent": 30}
    with tell({"name": "syscalls", "params": params}) as story, contextlib.closing(Worker()) as worker:
        failing = "sum(1 for i in range(300) if not os.path.exists('/nope%d' % i))"
        assert worker.do(failing) == "300"
        proven(story, story.receipt("SyscallUnusual"), "syscalls")  # errors are reported while learning, too
        time.sleep(1.6)
        assert worker.do("ctypes.CDLL(None).ptrace(0, 0, 0, 0)") == "0"
        proven(story, story.receipt("SyscallUnusual"), "syscalls")


def test_a_restart_learns_nothing_again(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, not stopped: nothing is written at the end. A known call stays known, a novel one is reported at once."""
    monkeypatch.setattr(watch, "RECHECK_NS", 100_000_000)
    params = {"learn_ms": 2000, "error_min": 1000}
    with tell({"name": "syscalls", "params": params}) as story:
        session = story.executor.session
        assert session is not None
        with contextlib.closing(Worker()) as worker:
            assert worker.do("ctypes.CDLL(None).getpgid(0) > 0") == "True"
            deadline = time.monotonic() + 10
            while list(Learned.load(story.lab.state / "learned.json", 0).until_ns.values()) != [0]:
                assert time.monotonic() < deadline, "what was learned is not on disk"
                time.sleep(0.05)
        with monkeypatch.context() as patch:
            patch.setattr(Kept, "save", lambda *_: None)
            story.executor.close()
        with story.again(session.bundle) as after, contextlib.closing(Worker()) as worker:
            assert worker.do("ctypes.CDLL(None).getpgid(0) > 0") == "True"
            assert worker.do("ctypes.CDLL(None).ptrace(0, 0, 0, 0)") == "0"
            novel = after.receipt("SyscallUnusual")
            assert novel.inputs.fields["number"] == "101"
            assert [e.receipt().run.id for e in after.executor.journal.entries(kind="receipt")] == [novel.run.id]


def test_pressure(tell: Tell) -> None:
    with (
        tell({"name": "pressure", "params": {"cpu_ms": 100, "window_ms": 2000}}) as story,
        contextlib.closing(Worker()) as worker,
    ):
        spin = f"os.fork() or os.execv({sys.executable!r}, ['spin', '-c', 'while True: pass'])"
        busy = f"[{spin} for _ in range({2 * (os.cpu_count() or 1)})]"
        assert worker.do(busy)
        proven(story, story.receipt("PressureHigh"), "pressure")


def test_a_sensor_that_this_kernel_lacks_is_refused_and_named(
    lab: Lab, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blob whose tracepoint is in no kernel: the refusal names it, and nothing stays loaded."""
    blob = need_blob("transport")
    find = btf.find
    monkeypatch.setattr(btf, "find", lambda *asked: {k: n for k, n in find(*asked).items() if "reset" not in k[1]})
    broken = Blob(blob.name, blob.maps, blob.programs, blob.initial, blob.constants, bytes(len(blob.data)), blob.insns)
    folder = lab.state / "broken"
    folder.mkdir()
    (folder / "transport.blob").write_bytes(broken.encode())
    monkeypatch.setattr(sys.modules[__name__], "BLOBS", folder)
    with pytest.raises(KernelError) as refused, tell({"name": "transport"}):
        pass
    assert refused.value.id == "kernel.hook"
    assert "tp_btf/tcp_receive_reset" in refused.value.got


@pytest.mark.parametrize(
    ("sensor", "check"),
    [
        ({"name": "breaker", "params": {"thresold": 3}}, "kernel.blob.constant"),
        ({"name": "breaker", "params": {"stuck_ms": -1}}, "arm.sensor-param"),
        ({"name": "pressure", "params": {"cpu_ms": 3000}}, "arm.sensor-param"),
        ({"name": "pressure", "params": {"disk_ms": 3}}, "arm.sensor-param"),
        ({"name": "storage", "blob": "breaker"}, "arm.sensor"),
    ],
)
def test_a_sensor_that_makes_no_sense_is_refused(tell: Tell, sensor: dict[str, Any], check: str) -> None:
    with pytest.raises((ArmingError, KernelError)) as refused, tell(sensor):
        pass
    assert refused.value.id == check


def test_a_program_swapped_behind_our_back_disarms(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody with the rights replaces a gate by one that lets everything pass: the next look notices."""
    monkeypatch.setattr(watch, "RECHECK_NS", 200_000_000)
    with tell({"name": "breaker", "params": {"threshold": 2, "cooldown_us": 10**8}}) as story:
        assert story.executor.session is not None
        breaker = story.executor.session.sensors.breaker  # type: ignore[attr-defined]
        impostor = bpf.prog_load(
            bpf.ProgramType.CGROUP_SOCK_ADDR,
            struct.pack("<BBhiBBhi", 0xB7, 0, 0, 1, 0x95, 0, 0, 0),
            name="pc_connect4",
            attach_type=bpf.AttachType.CGROUP_INET4_CONNECT,
        )
        raw_bpf(LINK_UPDATE, struct.pack("<IIII", breaker._links["pc_connect4"], impostor, 0, 0))
        os.close(impostor)
        deadline = time.monotonic() + 10
        while story.executor.admitted is not None:
            assert time.monotonic() < deadline, "it was not noticed"
            time.sleep(0.02)
        refusals = [e.body for e in story.executor.journal.entries(kind="refusal")]
        assert [(r["check"], r["got"].split(":")[0]) for r in refusals] == [("kernel.changed", "link pc_connect4")]


def test_connections_and_isolation_by_the_names_of_the_manifest(tell: Tell) -> None:
    names = [{"name": "connections"}, {"name": "isolate"}]
    with tell(*names, guard={"neverTouch": [f"127.0.0.1:{DEAD_PORT}"]}) as story:
        worker, session = Worker(), story.executor.session
        assert session is not None
        sensors, (cgroup_id,) = session.sensors, session.topology.cgroups
        assert sensors.kill_connections(LOOPBACK, PORT) == 1
        with pytest.raises(OSError, match="abort"):
            worker.do("1")
        worker.close()
        with pytest.raises(CircuitError) as refused:
            sensors.kill_connections(LOOPBACK, DEAD_PORT)
        assert refused.value.id == "kernel.circuit.never_touch"
        with contextlib.closing(Worker()) as again:
            assert again.do("1 + 1") == "2"
            sensors.isolate(cgroup_id, time.clock_gettime_ns(time.CLOCK_MONOTONIC) + 30 * 10**9)
            # Another manifest takes over: the isolation goes on.
            story.arm(*names, sequence=3)
            assert story.executor.session is not session
            again.silent("2 + 2", seconds=0.3)
            assert story.executor.session is not None
            story.executor.session.sensors.end_isolation(cgroup_id)
            assert again.line() == "4"


def test_without_their_sensors_they_are_refused(tell: Tell) -> None:
    with tell({"name": "transport"}) as story:
        assert story.executor.session is not None
        sensors = story.executor.session.sensors
        for call in (
            lambda: sensors.kill_connections(LOOPBACK, PORT),
            lambda: sensors.isolate(1, 1),
            lambda: sensors.end_isolation(1),
        ):
            with pytest.raises(KernelError) as refused:
                call()
            assert refused.value.id == "kernel.undeclared"
