"""A real bad link for tests: two network namespaces, and between them IP packets that come late or not at all.

Each namespace, `node` and `centre`, has a TUN device; a thread carries packets from one to the other. Latency is
counted one way, the harder reading: "a link of 2 s latency and 30 % loss" is `latency_s=2.0, loss=0.3`, a round trip
of 4 s in which both ways lose a packet in 0.51 of all tries. What is lost is drawn by a seed, for each way on its own,
so the n-th packet of a way has the same fate every time. IPv4 only. Root and /dev/net/tun; no queue discipline of the
kernel, which not every kernel has.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, TypeVar

from tests.kernel.lab import CLONE_NEWNET, IFF_UP, SIOCSIFADDR, SIOCSIFFLAGS, in_namespace, lo_up, unshare

TUN: Final = Path("/dev/net/tun")
NODE, CENTRE = "10.77.0.1", "10.77.0.2"
DEVICE: Final = b"bad0"
MTU: Final = 1500
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000
_SIOCSIFNETMASK = 0x891C
_QUEUED: Final = 10_000  # packets on their way; a link with more of them loses those that come last
_T = TypeVar("_T")


def missing() -> str | None:
    """What this machine lacks, by name."""
    if os.geteuid():
        return "root"
    return None if TUN.exists() else str(TUN)


@dataclass(slots=True)
class Way:
    """One direction. What was sent into it, what was lost of that, what arrived."""

    chance: random.Random
    sent: int = 0
    lost: int = 0
    arrived: int = 0


@dataclass(slots=True)
class End:
    """One namespace: its network namespace and its TUN device, as descriptors."""

    network: int
    tun: int
    way: Way = field(repr=False)  # what it sends


class BadLink:
    """The two namespaces and what is between them, until `close`. Latency and loss may change at any time."""

    def __init__(self, *, latency_s: float = 0.0, loss: float = 0.0, seed: int = 1) -> None:
        self.latency_s, self.loss = latency_s, loss
        self._on_the_way: list[tuple[float, int, int, bytes]] = []  # due, number, where to, packet
        self._number = 0
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self.node = _apart(lambda: _end(NODE, random.Random(seed)))
        self.centre = _apart(lambda: _end(CENTRE, random.Random(seed + 1)))
        self._thread = threading.Thread(target=self._carry, name="bad link", daemon=True)
        self._thread.start()

    def __enter__(self) -> BadLink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def become(self, *, latency_s: float, loss: float) -> None:
        """From now on. What is on its way arrives when it would have."""
        self.latency_s, self.loss = latency_s, loss

    def heal(self) -> None:
        """No loss, no delay, the interface up."""
        self.up()
        self.become(latency_s=0.0, loss=0.0)

    def down(self) -> None:
        """Take the node's interface down: it has no route any more."""
        with in_namespace(self.node.network):
            _flags(0)

    def up(self) -> None:
        """Take the node's interface up again."""
        with in_namespace(self.node.network):
            _flags(IFF_UP)

    @contextlib.contextmanager
    def at_node(self) -> Iterator[None]:
        """This thread, and the processes that it starts, in the node's network."""
        with in_namespace(self.node.network):
            yield

    @contextlib.contextmanager
    def at_centre(self) -> Iterator[None]:
        """This thread, and the processes that it starts, in the centre's network."""
        with in_namespace(self.centre.network):
            yield

    def close(self) -> None:
        """End the thread, the devices and the namespaces. May be called twice."""
        if self._stop < 0:
            return
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        for number in (self._stop, self.node.tun, self.node.network, self.centre.tun, self.centre.network):
            os.close(number)
        self._stop = -1

    def _carry(self) -> None:
        ends = {self.node.tun: (self.node, self.centre), self.centre.tun: (self.centre, self.node)}
        waiting = select.poll()
        for number in (*ends, self._stop):
            waiting.register(number, select.POLLIN)
        while True:
            due = self._deliver(ends)
            for number, _ in waiting.poll(due):
                if number == self._stop:
                    return
                here, there = ends[number]
                with contextlib.suppress(BlockingIOError):
                    while True:
                        self._accept(here.way, there, os.read(number, 65536))

    def _accept(self, way: Way, there: End, packet: bytes) -> None:
        if packet[0] >> 4 != 4:
            return
        way.sent += 1
        if way.chance.random() < self.loss or len(self._on_the_way) >= _QUEUED:
            way.lost += 1
            return
        self._number += 1
        heapq.heappush(self._on_the_way, (time.monotonic() + self.latency_s, self._number, there.tun, packet))

    def _deliver(self, ends: dict[int, tuple[End, End]]) -> float | None:
        """Hand over what has arrived; milliseconds until the next, None if there is none."""
        while self._on_the_way:
            left_s = self._on_the_way[0][0] - time.monotonic()
            if left_s > 0:
                return left_s * 1000
            _, _, tun, packet = heapq.heappop(self._on_the_way)
            _, sender = ends[tun]
            try:
                os.write(tun, packet)
            except OSError:  # its interface is down
                sender.way.lost += 1
            else:
                sender.way.arrived += 1
        return None


def _apart(make: Callable[[], _T]) -> _T:
    """What `make` gives in a thread of its own, whose namespaces end with it."""
    made: list[_T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            made.append(make())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def _end(address: str, chance: random.Random) -> End:
    """This thread in a new network namespace with loopback and a TUN device."""
    unshare(CLONE_NEWNET)
    lo_up()
    network = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    tun = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", DEVICE, _IFF_TUN | _IFF_NO_PI))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for request, ip in ((SIOCSIFADDR, address), (_SIOCSIFNETMASK, "255.255.255.0")):
            words = struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(ip))
            fcntl.ioctl(sock, request, struct.pack("16s16s", DEVICE, words))
    _flags(IFF_UP)
    return End(network, tun, Way(chance))


def _flags(flags: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", DEVICE, flags))
