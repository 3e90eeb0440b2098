"""Isolation: nothing of the cgroup gets through, nobody else notices, and it ends by itself."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointcall_executor.kernel import bpf, isolation
from pointcall_executor.kernel.bpf import prog_exists
from pointcall_executor.kernel.cgroup import Cgroup, by_id, find_root
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.isolation import PREFIX, Isolator, end_pinned, pinned_isolations
from tests.kernel.lab import BLOCKED, DGRAM, OK, V4, V6, connect, listen, member, need_blob, outcome, private_network

pytestmark = pytest.mark.kernel
PORT = 30801
HOUR_NS = 3_600_000_000_000


def soon(ms: float) -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) + int(ms * 1e6)


@pytest.fixture
def isolator() -> Iterator[Isolator]:
    blob = need_blob("isolate")
    with private_network(), Isolator(blob) as loaded:
        yield loaded


@pytest.fixture
def group() -> Iterator[Cgroup]:
    with member("isolated") as cgroup:
        yield cgroup


@pytest.mark.parametrize(("family", "ip"), [(V4, "127.0.0.1"), (V6, "::1"), (V6, "::ffff:127.0.0.1")])
def test_connects_and_sends_are_refused_loopback_included(
    isolator: Isolator, group: Cgroup, family: int, ip: str
) -> None:
    bind = ip.removeprefix("::ffff:")
    with listen(PORT, bind), socket.socket(family, DGRAM) as udp:
        assert connect(PORT, ip, family) == OK
        isolator.isolate(group.id, soon(60_000))
        assert connect(PORT, ip, family) == BLOCKED
        assert outcome(lambda: udp.sendto(b"x", (ip, PORT))) == BLOCKED
        isolator.end(group.id)
        isolator.end(group.id)
        assert connect(PORT, ip, family) == OK
        assert outcome(lambda: udp.sendto(b"x", (ip, PORT))) == OK


def test_established_connections_and_connected_udp_fall_silent(isolator: Isolator, group: Cgroup) -> None:
    with listen(PORT) as server, socket.create_connection(("127.0.0.1", PORT)) as client:
        peer, _ = server.accept()
        with peer, socket.socket(V4, DGRAM) as sender, socket.socket(V4, DGRAM) as receiver:
            receiver.bind(("127.0.0.1", PORT))
            sender.connect(("127.0.0.1", PORT))
            for sock in (peer, receiver):
                sock.settimeout(0.15)
            isolator.isolate(group.id, soon(60_000))
            client.send(b"tcp")
            assert outcome(lambda: sender.send(b"udp")) == BLOCKED
            for sock in (peer, receiver):
                with pytest.raises(TimeoutError):
                    sock.recv(8)
            found = isolator.end(group.id)
            assert found is not None
            assert found.packets_out >= 2
            peer.settimeout(5)
            assert peer.recv(8) == b"tcp"  # TCP sends it again


def test_what_arrives_from_outside_the_cgroup_is_dropped_too(isolator: Isolator, group: Cgroup) -> None:
    with listen(PORT) as server:
        isolator.isolate(group.id, soon(60_000))
        command = f"import socket; s=socket.socket(); s.settimeout(0.3); print(s.connect_ex(('127.0.0.1', {PORT})))"
        with subprocess.Popen([sys.executable, "-c", f"input(); {command}"], stdin=-1, stdout=-1, text=True) as child:
            Cgroup(group.path.parent).add(child.pid)  # a client that is not isolated
            said, _ = child.communicate("\n")
        assert int(said) != 0
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()
        found = isolator.end(group.id)
    assert found is not None
    assert found.packets_in >= 1


def test_a_cgroup_below_is_isolated_and_one_beside_is_not(isolator: Isolator, group: Cgroup) -> None:
    below = Cgroup.create("below", group.path)
    with listen(PORT):
        isolator.isolate(group.id, soon(60_000))
        below.add(0)
        try:
            assert connect(PORT) == BLOCKED
        finally:
            group.add(0)
    with member("beside"), listen(PORT + 1):
        assert connect(PORT + 1) == OK
    group.add(0)


def test_the_lease_ends_in_the_kernel(isolator: Isolator, group: Cgroup) -> None:
    with listen(PORT):
        isolator.isolate(group.id, until_ns := soon(800))
        assert [i.cgroup for i in isolator.isolations()] == [group.id]
        assert connect(PORT) == BLOCKED
        time.sleep(max(0, until_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC)) / 1e9 + 0.005)
        assert connect(PORT) == OK  # nobody did anything
        assert isolator.isolations() == []
        isolator.sweep()
        isolator.isolate(group.id, soon(60_000))
        assert connect(PORT) == BLOCKED


def test_a_shorter_lease_does_not_shorten_a_longer_one(isolator: Isolator, group: Cgroup) -> None:
    isolator.isolate(group.id, longer := soon(60_000))
    isolator.isolate(group.id, soon(10))
    assert [i.until_ns for i in isolator.isolations()] == [longer]


@pytest.mark.parametrize("left_ms", [-1, 0, HOUR_NS / 1e6 + 1000])
def test_an_isolation_without_an_end_is_refused(isolator: Isolator, group: Cgroup, left_ms: float) -> None:
    with pytest.raises(KernelError) as refused:
        isolator.isolate(group.id, soon(left_ms))
    assert refused.value.id == "kernel.isolation.lease"
    with listen(PORT):
        assert connect(PORT) == OK


def test_a_cgroup_that_is_gone_is_named(isolator: Isolator, group: Cgroup) -> None:
    doomed = Cgroup.create("doomed", group.path)
    number = doomed.id
    assert by_id(number) == doomed
    isolator.isolate(number, soon(60_000))
    doomed.remove()
    isolator.end(number)
    with pytest.raises(KernelError) as refused:
        isolator.isolate(number, soon(60_000))
    assert refused.value.id == "kernel.cgroup.gone"
    assert by_id(find_root().stat().st_ino).path == find_root()


def test_closing_ends_it_and_leaves_nothing(isolator: Isolator, group: Cgroup) -> None:
    numbers = [number for _, number, _ in isolator.programs()]
    with listen(PORT):
        isolator.isolate(group.id, soon(60_000))
        isolator.close()
        isolator.close()
        assert connect(PORT) == OK
    deadline = time.monotonic() + 5
    while any(map(prog_exists, numbers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(prog_exists, numbers))


CHILD = """
import sys, time
from pathlib import Path
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.isolation import Isolator
isolator = Isolator(Blob.parse(Path(sys.argv[1]).read_bytes()), Path(sys.argv[4]) if sys.argv[4] else None)
until_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + int(sys.argv[3])
isolator.isolate(int(sys.argv[2]), until_ns)
print(until_ns, *[number for _, number, _ in isolator.programs()], flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("pinned", [False, True])
def test_a_killed_executor(isolator: Isolator, group: Cgroup, tmp_path: Path, pinned: bool) -> None:
    """Not pinned: it ends with its process. Pinned: it lasts until its deadline, which the kernel keeps."""
    folder = Path(f"/sys/fs/bpf/pctest-iso-{os.getpid()}")
    if pinned and not os.path.ismount("/sys/fs/bpf"):
        pytest.skip("no bpf file system at /sys/fs/bpf")
    path = tmp_path / "isolate.blob"
    path.write_bytes(isolator.blob.encode())
    lease_ns = 4 * 10**9
    words = [sys.executable, "-c", CHILD, str(path), str(group.id), str(lease_ns), str(folder) if pinned else ""]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        with listen(PORT):
            with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as child:
                assert child.stdout is not None
                until_ns, *numbers = map(int, child.stdout.readline().split())
                assert connect(PORT) == BLOCKED
                child.send_signal(signal.SIGKILL)
            if pinned:
                assert connect(PORT) == BLOCKED
                assert end_pinned(folder, only_expired=True) == [group.id]
                time.sleep(max(0, until_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC)) / 1e9 + 0.01)
                assert connect(PORT) == OK  # over, and still nobody did anything
                assert (folder / f"{PREFIX}{group.id}").exists()
                assert end_pinned(folder, only_expired=True) == []
            deadline = time.monotonic() + 5
            while any(map(prog_exists, numbers)) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not any(map(prog_exists, numbers))
            assert connect(PORT) == OK
    finally:
        end_pinned(folder, only_expired=False)
        if folder.exists():
            folder.rmdir()


@pytest.fixture
def pins() -> Iterator[Path]:
    if not os.path.ismount("/sys/fs/bpf"):
        pytest.skip("no bpf file system at /sys/fs/bpf")
    folder = Path(f"/sys/fs/bpf/pctest-iso-{os.getpid()}")
    yield folder
    end_pinned(folder, only_expired=False)
    if folder.exists():
        folder.rmdir()


def test_who_cannot_take_over_leaves_it_where_it_is(
    isolator: Isolator, group: Cgroup, pins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Isolator(isolator.blob, pins) as first, Isolator(isolator.blob, pins) as second, listen(PORT):
        first.isolate(group.id, until_ns := soon(60_000))
        real = bpf.pin

        def refuse(fd: int, path: str) -> None:
            if path.endswith("/isolations"):  # the last one
                raise OSError(errno.ENOSPC, "No space left on device")
            real(fd, path)

        with monkeypatch.context() as patch:
            patch.setattr(bpf, "pin", refuse)
            for take in (
                lambda: second.isolate(group.id, soon(30_000)),
                lambda: second.take_over({group.id: until_ns}),
            ):
                with pytest.raises(KernelError) as refused:
                    take()
                assert refused.value.id == "kernel.pin"
        assert second.isolations() == []
        first.sweep()
        assert pinned_isolations(pins) == {group.id: until_ns}
        second.close()
        assert connect(PORT) == BLOCKED
        first.close()
        assert connect(PORT) == BLOCKED
        assert [place.name for place in pins.iterdir()] == [f"{PREFIX}{group.id}"]


def test_what_is_over_or_gone_is_not_taken_over(isolator: Isolator, group: Cgroup) -> None:
    doomed = Cgroup.create("doomed", group.path)
    number = doomed.id
    doomed.remove()
    isolator.take_over({number: soon(60_000), group.id: soon(-1)})
    assert isolator.isolations() == []
    isolator.take_over({number: soon(60_000), group.id: (until_ns := soon(60_000))})
    assert [(i.cgroup, i.until_ns) for i in isolator.isolations()] == [(group.id, until_ns)]


@pytest.mark.parametrize("ended", [False, True])
def test_an_executor_that_was_killed_while_it_took_over(
    isolator: Isolator, group: Cgroup, pins: Path, ended: bool
) -> None:
    """Before or after it had ended the earlier one: the isolation goes on, is known, and can end."""
    with Isolator(isolator.blob, pins) as first, Isolator(isolator.blob, pins) as killed, listen(PORT):
        first.isolate(group.id, soon(50_000))
        killed._held[group.id] = killed._begun(group.id, until_ns := soon(60_000))
        if ended:
            isolation._end(pins / f"{PREFIX}{group.id}", group.id)
        first.close()
        killed.close()
        assert connect(PORT) == BLOCKED
        assert pinned_isolations(pins) == {group.id: until_ns}
        assert end_pinned(pins, only_expired=True) == [group.id]
        with Isolator(isolator.blob, pins) as later:
            later.isolate(group.id, soon(10_000))
            assert pinned_isolations(pins) == {group.id: until_ns}
            later.end(group.id)
            assert connect(PORT) == OK
            assert list(pins.iterdir()) == []
