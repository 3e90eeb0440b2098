"""Surroundings of the kernel tests: a private network namespace, a throw-away cgroup, and clients that name errnos."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pointcall_executor.core.event import Destination, KernelEvent, decode
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.breaker import netns_cookie
from pointcall_executor.kernel.cgroup import Cgroup, own
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.loader import load
from pointcall_executor.kernel.probe import BLOBS
from pointcall_executor.kernel.sensor import Sensor
from pointcall_runbook.vocabulary import Address

CLONE_NEWNET = 0x40000000
CLONE_NEWNS = 0x20000
SIOCSIFFLAGS, SIOCSIFADDR, IFF_UP = 0x8914, 0x8916, 1
SO_ATTACH_FILTER = 26
LOOPBACK = Address.parse("127.0.0.1")
V4, V6, STREAM, DGRAM = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM
REFUSED, BLOCKED, OK = "ECONNREFUSED", "EPERM", "OK"

_libc = ctypes.CDLL(None, use_errno=True)


def read_blob(name: str) -> Blob:
    """The built blob, or a skip that says how to build it."""
    path = BLOBS / f"{name}.blob"
    if not path.exists():
        pytest.skip(f"blob {name} is not built: make -C bpf")
    return Blob.parse(path.read_bytes())


def need_blob(name: str) -> Blob:
    """A blob that this kernel loads, or a skip that names what it lacks.

    POINTCALL_REQUIRE_BLOBS names blobs for which that is a failure: the jobs that run on other kernels set it.
    """
    if os.geteuid():
        pytest.skip("needs root")
    blob = read_blob(name)
    try:
        load(blob).close()
    except KernelError as error:
        if name in os.environ.get("POINTCALL_REQUIRE_BLOBS", "").split():
            pytest.fail(f"{name} must load here: {error}")
        pytest.skip(f"this kernel does not load {name}: {error.got}")
    return blob


def unshare(flags: int) -> None:
    if _libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


def lo_up() -> None:
    with socket.socket(V4, DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


def lo_address(ip: str) -> None:
    """One more address of this network namespace itself, with the /24 around it."""
    address = struct.pack("=HH4s8x", V4, 0, socket.inet_aton(ip))
    with socket.socket(V4, DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFADDR, struct.pack("16s16s", b"lo:1", address))


@contextlib.contextmanager
def private_network() -> Iterator[None]:
    """This thread in a new network namespace with only loopback; back again afterwards."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        unshare(CLONE_NEWNET)
        lo_up()
        yield
    finally:
        if _libc.setns(home, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(home)


@contextlib.contextmanager
def in_namespace(network: int) -> Iterator[None]:
    """This thread in that network namespace; back again afterwards."""
    here_ = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if _libc.setns(network, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        yield
    finally:
        if _libc.setns(here_, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(here_)


@contextlib.contextmanager
def member(name: str, parent: Path | None = None) -> Iterator[Cgroup]:
    """This process in a new cgroup; the cgroup is gone afterwards."""
    home, group = own(), Cgroup.create(f"pctest-{name}-{os.getpid()}", parent)
    group.add(0)
    try:
        yield group
    finally:
        home.add(0)
        group.remove()


def here(port: int, address: Address = LOOPBACK, protocol: int = 6) -> Destination:
    """A destination in this network namespace."""
    return Destination(address, port, netns_cookie(), protocol)


def outcome(call: Callable[[], object]) -> str:
    """OK or the name of the errno that an application sees."""
    try:
        call()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return OK


def connect(port: int, ip: str = "127.0.0.1", family: int = V4, protocol: int = 0) -> str:
    with socket.socket(family, STREAM, protocol) as sock:
        return outcome(lambda: sock.connect((ip, port)))


def connects(n: int, port: int, ip: str = "127.0.0.1", family: int = V4, protocol: int = 0) -> list[str]:
    return [connect(port, ip, family, protocol) for _ in range(n)]


def listen(port: int, ip: str = "127.0.0.1", backlog: int = 128) -> socket.socket:
    sock = socket.socket(V6 if ":" in ip else V4, STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((ip, port))
    sock.listen(backlog)
    return sock


@contextlib.contextmanager
def black_hole(port: int) -> Iterator[socket.socket]:
    """A listener that drops every SYN: its backlog is full. What fills it came to another local address."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen(port, "0.0.0.0", 0))
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.2", port))
        time.sleep(0.01)
        yield listener


def deaf(sock: socket.socket) -> None:
    """From now on every segment to this socket is dropped before TCP sees it: nothing is acknowledged."""
    drop = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))  # BPF_RET, 0 bytes
    program = struct.pack("@HP", 1, ctypes.addressof(drop))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def events(sensor: Sensor) -> list[KernelEvent]:
    return [decode(record) for record in sensor.ring.drain()]


def kinds(sensor: Sensor) -> list[str]:
    return [event.kind.name for event in events(sensor)]
