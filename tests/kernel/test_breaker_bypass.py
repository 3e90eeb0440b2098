"""Ways round the breaker, each closed; and what it must leave alone."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pointcall_executor.core.breaker import State
from pointcall_executor.core.event import Destination, Kind
from pointcall_executor.kernel.breaker import BreakerSensor, CircuitPolicy
from pointcall_executor.kernel.cgroup import Cgroup, own
from pointcall_runbook.vocabulary import Address
from tests.kernel import uring
from tests.kernel.conftest import Make
from tests.kernel.lab import (
    BLOCKED,
    DGRAM,
    OK,
    REFUSED,
    STREAM,
    V4,
    V6,
    black_hole,
    connect,
    connects,
    here,
    kinds,
    listen,
    outcome,
    private_network,
    unshare,
)

pytestmark = pytest.mark.kernel
PORT = 30101
MPTCP = 262
TCP_SYNCNT, TCP_FASTOPEN_CONNECT = 7, 30
PR_SET_NAME = 15


@pytest.fixture
def breaker(make: Make) -> BreakerSensor:
    sensor = make()
    sensor.arm(here(PORT))
    return sensor


@pytest.fixture
def open_circuit(breaker: BreakerSensor) -> BreakerSensor:
    assert connects(4, PORT) == [REFUSED] * 3 + [BLOCKED]
    return breaker


@pytest.mark.parametrize(
    ("ip", "family"),
    [("127.0.0.1", V4), ("0.0.0.0", V4), ("::ffff:127.0.0.1", V6), ("::ffff:0.0.0.0", V6)],
)
def test_every_spelling_of_loopback_meets_the_same_circuit(breaker: BreakerSensor, ip: str, family: int) -> None:
    assert connects(4, PORT, ip, family) == [REFUSED] * 3 + [BLOCKED]
    assert connect(PORT) == BLOCKED


@pytest.mark.parametrize("ip", ["::1", "::"])
def test_the_unspecified_address_of_ipv6_is_loopback(make: Make, ip: str) -> None:
    breaker = make()
    breaker.arm(here(PORT, Address.parse("::")))
    assert connects(4, PORT, ip, V6) == [REFUSED] * 3 + [BLOCKED]
    assert breaker.circuit(here(PORT, Address.parse("::1"))).state is State.OPEN


@pytest.mark.parametrize("ip", ["::", "::ffff:0.0.0.0"])
def test_unspecified_from_a_socket_bound_to_v4_mapped(open_circuit: BreakerSensor, ip: str) -> None:
    with socket.socket(V6, STREAM) as sock:
        sock.bind(("::ffff:127.0.0.1", 0))
        assert outcome(lambda: sock.connect((ip, PORT))) == BLOCKED


@pytest.mark.parametrize("kind", [STREAM, DGRAM])
def test_the_unspecified_address_of_ipv6_is_loopback_wherever_a_v4_mapped_socket_is_bound(
    make: Make, kind: int
) -> None:
    """:: reaches 127.0.0.1 from such a socket, ::ffff:0.0.0.0 the address that it is bound to."""
    breaker, until_ns = make(), time.clock_gettime_ns(time.CLOCK_MONOTONIC) + 60_000_000_000
    shut = here(PORT, protocol=6 if kind == STREAM else 17)
    breaker.arm(shut)
    breaker.force(shut, until_ns)
    with listen(PORT, "0.0.0.0"):
        for ip, expected in (("::", BLOCKED), ("::ffff:0.0.0.0", OK)):
            with socket.socket(V6, kind) as sock:
                sock.bind(("::ffff:127.0.0.7", 0))
                assert outcome(lambda sock=sock, ip=ip: sock.connect((ip, PORT))) == expected
    breaker.close_circuit(shut)
    other = here(PORT, Address.parse("127.0.0.7"), shut.protocol)
    breaker.arm(other)
    breaker.force(other, until_ns)
    with listen(PORT, "0.0.0.0"), socket.socket(V6, kind) as sock:
        sock.bind(("::ffff:127.0.0.7", 0))
        sock.connect(("::", PORT))
        assert sock.getpeername()[0] == "::ffff:127.0.0.1"  # the open circuit is another's


@pytest.mark.parametrize("kind", [STREAM, DGRAM])
@pytest.mark.parametrize("bound", ["224.0.0.1", "239.9.9.9", "127.255.255.255", "255.255.255.255"])
def test_unspecified_from_an_address_that_is_no_source_is_loopback(make: Make, kind: int, bound: str) -> None:
    breaker, until_ns = make(), time.clock_gettime_ns(time.CLOCK_MONOTONIC) + 60_000_000_000
    shut = here(PORT, protocol=6 if kind == STREAM else 17)
    breaker.arm(shut)
    breaker.force(shut, until_ns)
    with listen(PORT), socket.socket(V4, kind) as sock:
        sock.bind((bound, 0))
        assert outcome(lambda: sock.connect(("0.0.0.0", PORT))) == BLOCKED
        breaker.close_circuit(shut)
        sock.connect(("0.0.0.0", PORT))
        assert sock.getpeername()[0] == "127.0.0.1"


def test_unspecified_from_a_socket_bound_elsewhere(make: Make) -> None:
    """0.0.0.0 reaches the address that the socket is bound to."""
    breaker = make()
    breaker.arm(here(PORT, Address.parse("127.0.0.7")))
    for n in range(4):
        with socket.socket() as sock:
            sock.bind(("127.0.0.7", 0))
            assert outcome(lambda sock=sock: sock.connect(("0.0.0.0", PORT))) == (BLOCKED if n == 3 else REFUSED)
    assert connect(PORT) == REFUSED


def test_nonblocking_connects_count_and_are_refused(breaker: BreakerSensor) -> None:
    def attempt() -> str:
        with socket.socket() as sock:
            sock.setblocking(False)
            return errno.errorcode[sock.connect_ex(("127.0.0.1", PORT))]

    assert [attempt() for _ in range(4)] == ["EINPROGRESS"] * 3 + [BLOCKED]


def test_io_uring(breaker: BreakerSensor) -> None:
    try:
        answers = [uring.connect(PORT) for _ in range(4)]
    except OSError as error:
        pytest.skip(f"io_uring is not available: {error}")
    assert answers == [REFUSED] * 3 + [BLOCKED]


def test_mptcp(breaker: BreakerSensor) -> None:
    try:
        socket.socket(V4, STREAM, MPTCP).close()
    except OSError:
        pytest.skip("this kernel has no MPTCP")
    assert connects(4, PORT, protocol=MPTCP) == [REFUSED] * 3 + [BLOCKED]
    with listen(PORT):
        breaker.make_probe_ready(here(PORT))
        assert connects(2, PORT, protocol=MPTCP) == [OK] * 2
    assert breaker.circuit(here(PORT)).state is State.CLOSED


@pytest.mark.parametrize("how", ["sendto", "option"])
def test_fast_open(breaker: BreakerSensor, how: str) -> None:
    def attempt() -> None:
        with socket.socket() as sock:
            if how == "sendto":
                sock.sendto(b"hi", socket.MSG_FASTOPEN, ("127.0.0.1", PORT))
            else:
                sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
                sock.connect(("127.0.0.1", PORT))
                sock.send(b"hi")

    assert [outcome(attempt) for _ in range(4)] == [REFUSED] * 3 + [BLOCKED]


def test_a_renamed_process_and_its_threads_are_refused(open_circuit: BreakerSensor) -> None:
    code = (
        "import ctypes, socket, sys\n"
        f"ctypes.CDLL(None).prctl({PR_SET_NAME}, b'systemd')\n"
        "s = socket.socket()\n"
        f"sys.exit(s.connect_ex(('127.0.0.1', {PORT})))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == errno.EPERM
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(connect(PORT)))
    thread.start()
    thread.join()
    assert answers == [BLOCKED]


def test_a_cgroup_below_is_refused_too(open_circuit: BreakerSensor, group: Cgroup) -> None:
    below = Cgroup.create("below", group.path)
    below.add(0)
    assert connect(PORT) == BLOCKED
    group.add(0)


def test_moving_out_with_an_old_socket_does_not_help(open_circuit: BreakerSensor, group: Cgroup) -> None:
    """The gate follows the cgroup in which a socket was made."""
    with socket.socket() as sock:
        _outside().add(0)
        answer = outcome(lambda: sock.connect(("127.0.0.1", PORT)))
        group.add(0)
    assert answer == BLOCKED


def _outside() -> Cgroup:
    return Cgroup(own().path.parent)


def test_another_cgroup_is_neither_refused_nor_counted(breaker: BreakerSensor, group: Cgroup) -> None:
    _outside().add(0)
    assert connects(6, PORT) == [REFUSED] * 6
    group.add(0)
    circuit = breaker.circuit(here(PORT))
    assert (circuit.state, circuit.failures, circuit.ignored) == (State.CLOSED, 0, 6)


def test_half_open_an_outsider_is_not_the_probe(make: Make, group: Cgroup) -> None:
    """A success of another cgroup must not close the circuit, nor a failure reopen it."""
    breaker = make()
    breaker.arm(here(PORT))
    connects(3, PORT)
    breaker.make_probe_ready(here(PORT))
    with black_hole(PORT) as filler, socket.socket() as probe:
        probe.setblocking(False)
        assert probe.connect_ex(("127.0.0.1", PORT)) == errno.EINPROGRESS
        filler.close()
        _outside().add(0)
        connects(2, PORT)
        group.add(0)
        assert breaker.circuit(here(PORT)).state is State.HALF


def test_another_network_namespace_is_another_destination(open_circuit: BreakerSensor, group: Cgroup) -> None:
    with private_network(), listen(PORT):
        assert connects(3, PORT) == [OK] * 3
    assert connect(PORT) == BLOCKED


def test_a_process_with_its_own_namespaces_meets_its_own_circuit(breaker: BreakerSensor) -> None:
    with private_network():
        breaker.arm(here(PORT))
        assert connects(4, PORT) == [REFUSED] * 3 + [BLOCKED]
    assert connect(PORT) == REFUSED


def test_an_abandoned_connect_counts_where_the_policy_says_so(make: Make) -> None:
    breaker = make(threshold=1, count_abandoned=0)
    breaker.arm(here(PORT), CircuitPolicy(abandoned=True))
    with black_hole(PORT), socket.socket() as sock:
        sock.settimeout(0.02)
        with pytest.raises(TimeoutError):
            sock.connect(("127.0.0.1", PORT))
        sock.close()
    assert kinds(breaker) == ["CIRCUIT_OPENED"]


def test_an_abandoned_connect_may_be_ignored(make: Make) -> None:
    breaker = make(threshold=1)
    breaker.arm(here(PORT), CircuitPolicy(abandoned=False))
    with black_hole(PORT), socket.socket() as sock:
        sock.settimeout(0.02)
        with pytest.raises(TimeoutError):
            sock.connect(("127.0.0.1", PORT))
        sock.close()
    circuit = breaker.circuit(here(PORT))
    assert (circuit.state, circuit.ignored) == (State.CLOSED, 1)


def test_a_black_hole_opens_when_the_kernel_gives_up(make: Make) -> None:
    breaker = make(threshold=1, count_abandoned=0)
    breaker.arm(here(PORT))
    with black_hole(PORT), socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 200)
        assert outcome(lambda: sock.connect(("127.0.0.1", PORT))) in ("ETIMEDOUT", "TimeoutError")
    assert kinds(breaker) == ["CIRCUIT_OPENED"]


def test_connected_udp_errors_open_and_the_gate_refuses(make: Make) -> None:
    breaker = make()
    udp = here(PORT, protocol=17)
    breaker.arm(udp)
    with socket.socket(V4, DGRAM) as sock:
        sock.connect(("127.0.0.1", PORT))
        for _ in range(3):
            assert outcome(lambda: (sock.send(b"x"), time.sleep(0.002), sock.recv(1))) == REFUSED
    assert breaker.circuit(udp).state is State.OPEN
    with socket.socket(V4, DGRAM) as sock:
        assert outcome(lambda: sock.connect(("127.0.0.1", PORT))) == BLOCKED
        assert outcome(lambda: sock.sendto(b"x", ("127.0.0.1", PORT))) == BLOCKED
    with socket.socket(V6, DGRAM) as sock:
        assert outcome(lambda: sock.sendto(b"x", ("::ffff:127.0.0.1", PORT))) == BLOCKED
        assert outcome(lambda: sock.connect(("::ffff:127.0.0.1", PORT))) == BLOCKED
    assert connect(PORT) == REFUSED  # TCP on the same port is another destination


@pytest.mark.parametrize(("ip", "armed"), [("::1", "::1"), ("::ffff:127.0.0.1", "127.0.0.1")])
def test_connected_udp_errors_open_over_ipv6_sockets(make: Make, ip: str, armed: str) -> None:
    breaker = make()
    udp = here(PORT, Address.parse(armed), protocol=17)
    breaker.arm(udp)
    with socket.socket(V6, DGRAM) as sock:
        sock.connect((ip, PORT))
        for _ in range(3):
            assert outcome(lambda: (sock.send(b"x"), time.sleep(0.002), sock.recv(1))) == REFUSED
    assert breaker.circuit(udp).state is State.OPEN
    with socket.socket(V6, DGRAM) as sock:
        assert outcome(lambda: sock.connect((ip, PORT))) == BLOCKED
        assert outcome(lambda: sock.sendto(b"x", (ip, PORT))) == BLOCKED


def test_a_udp_probe_that_stays_silent_closes(make: Make) -> None:
    breaker = make(probe_us=20_000)
    udp = here(PORT, protocol=17)
    breaker.arm(udp)
    with socket.socket(V4, DGRAM) as sock:
        sock.connect(("127.0.0.1", PORT))
        for _ in range(3):
            assert outcome(lambda: (sock.send(b"x"), time.sleep(0.002), sock.recv(1))) == REFUSED
    assert kinds(breaker) == ["CIRCUIT_OPENED"]
    with socket.socket(V4, DGRAM) as server, socket.socket(V4, DGRAM) as client:
        server.bind(("127.0.0.1", PORT))
        send = lambda: client.sendto(b"x", ("127.0.0.1", PORT))  # noqa: E731
        assert outcome(send) == BLOCKED
        breaker.make_probe_ready(udp)
        assert [outcome(send) for _ in range(2)] == [OK, BLOCKED]
        time.sleep(0.025)
        assert outcome(send) == OK
    assert kinds(breaker) == ["CIRCUIT_HALF_OPEN", "CIRCUIT_CLOSED"]


@pytest.mark.parametrize(("family", "far"), [(V4, "10.9.0.5"), (V6, "fd09::5"), (V6, "::ffff:10.9.0.5")])
def test_icmp_unreachable_over_a_router_opens(make: Make, family: int, far: str) -> None:
    """A tunnel whose other end answers each SYN with ICMP host unreachable.

    The connect blocks: kernel 6.1 may hand who polls an error of 0 in its place.
    """
    if not Path("/dev/net/tun").exists():
        pytest.skip("no /dev/net/tun")
    breaker = make(threshold=1)
    remote = Destination(Address.parse(far), PORT, here(0).netns)
    breaker.arm(remote)
    with _Tunnel() as tunnel, socket.socket(family) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_SYNCNT, 1)
        answerer = threading.Thread(target=tunnel.answer_unreachable)
        answerer.start()
        assert outcome(lambda: sock.connect((far, PORT))) == "EHOSTUNREACH"
        answerer.join()
    (event,) = [e for e in (breaker.circuit(remote),) if e.state is State.OPEN]
    assert event.failures == 1


class _Tunnel:
    """A tun device 10.9.0.1/24, fd09::1/64; packets into it wait to be read here."""

    def __enter__(self) -> _Tunnel:
        self.fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(self.fd, 0x400454CA, struct.pack("16sH22x", b"pctun", 0x1001))
        addresses = ("addr add 10.9.0.1/24 dev pctun", "addr add fd09::1/64 dev pctun nodad")
        for words in (*addresses, "link set pctun up"):
            subprocess.run(["ip", *words.split()], check=True)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def answer_unreachable(self) -> None:
        """The first segment of TCP, whatever else is sent before."""
        while True:
            packet = os.read(self.fd, 2048)
            if packet[0] >> 4 == 4 and packet[9] == 6:
                os.write(self.fd, _unreachable4(packet))
                return
            if packet[0] >> 4 == 6 and packet[6] == 6:
                os.write(self.fd, _unreachable6(packet))
                return


def _unreachable4(packet: bytes) -> bytes:
    icmp = _with_checksum(struct.pack(">BBHI", 3, 1, 0, 0) + packet[:28], 2)
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(icmp), 0, 0, 64, 1, 0, packet[16:20], packet[12:16])
    return _with_checksum(head, 10) + icmp


def _unreachable6(packet: bytes) -> bytes:
    icmp = struct.pack(">BBHI", 1, 3, 0, 0) + packet[: len(packet) & ~1]
    ends = packet[24:40] + packet[8:24]
    summed = _with_checksum(ends + struct.pack(">II", len(icmp), 58) + icmp, 42)
    return struct.pack(">IHBB", 6 << 28, len(icmp), 58, 64) + ends + summed[40:]


def _with_checksum(data: bytes, at: int) -> bytes:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    total = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return data[:at] + total.to_bytes(2, "big") + data[at + 2 :]


def test_a_connect_to_itself_is_no_success(make: Make) -> None:
    """A closed port inside the ephemeral range: the probe must not close the circuit by meeting itself."""
    breaker = make()
    breaker.arm(here(PORT))
    connects(3, PORT)
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(f"{PORT} {PORT}")
    breaker.make_probe_ready(here(PORT))
    with socket.socket() as sock:
        assert outcome(lambda: sock.connect(("127.0.0.1", PORT))) == OK
        assert sock.getsockname() == sock.getpeername()
    assert breaker.circuit(here(PORT)).state is not State.CLOSED
    assert Kind.CIRCUIT_CLOSED.name not in kinds(breaker)


def test_sctp_is_left_alone(open_circuit: BreakerSensor) -> None:
    try:
        socket.socket(V4, STREAM, 132).close()
    except OSError:
        pytest.skip("this kernel has no SCTP")
    assert connect(PORT, protocol=132) != BLOCKED


NO_USER_NAMESPACE = 98


def test_a_new_user_namespace_does_not_shed_the_gate(open_circuit: BreakerSensor) -> None:
    pid = os.fork()
    if pid == 0:
        code = NO_USER_NAMESPACE
        try:
            unshare(0x10000000)  # CLONE_NEWUSER
            with socket.socket() as sock:
                code = sock.connect_ex(("127.0.0.1", PORT))
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == NO_USER_NAMESPACE:
        pytest.skip("user namespaces are not available here (a chroot, or max_user_namespaces)")
    assert code == errno.EPERM
