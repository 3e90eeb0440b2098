"""A kernel record: 56 bytes -> a typed event. No I/O, no decision, no service names: core/trigger.py adds those.

The layout is bpf/event.h; a test compares the two. Spec: docs/spec/kernel-abi.md section 3.
"""

from __future__ import annotations

import enum
import functools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, assert_never

from pointcall_runbook.errors import PointcallError
from pointcall_runbook.vocabulary import Address, Operation, Resource

RECORD: Final = struct.Struct("<QHHIQ32s")
CIRCUIT: Final = struct.Struct("<16sQHBBHH")
PROCESS: Final = struct.Struct("<IIQ16s")
TRANSPORT: Final = struct.Struct("<16sQHBBHH")
STORAGE: Final = struct.Struct("<6IQ")
SYSCALL: Final = struct.Struct("<IiQQQ")
STUCK: Final = struct.Struct("<16sQHBBI")
PRESSURE: Final = struct.Struct("<IIQQQ")


class EventError(PointcallError):
    """A record that no program of ours writes."""

    id = "kernel.event.malformed"


class Kind(enum.IntEnum):
    """enum pointcall_event_kind."""

    CIRCUIT_OPENED = 1
    CIRCUIT_HALF_OPEN = 2
    CIRCUIT_CLOSED = 3
    CIRCUIT_REOPENED = 4
    CIRCUIT_EXPIRED = 5
    CIRCUIT_STUCK = 6
    OOM_VICTIM = 16
    PROCESS_EXIT = 17
    RESETS = 24
    RETRANSMITS = 25
    CONNECT_SLOW = 26
    STORAGE_SLOW = 32
    DISK_ERROR = 33
    SYSCALL_NOVEL = 40
    SYSCALL_ERRORS = 41
    PRESSURE = 48


class Source(enum.IntEnum):
    """enum pointcall_storage_source: which object measured it; the names are those of the sensors."""

    STORAGE = 0
    FUSE = 1
    FSYNC = 2
    VFS = 3


@dataclass(frozen=True, slots=True, order=True)
class Destination:
    """What a circuit is about. `netns` is the cookie of a network namespace; 0 is the node-wide circuit."""

    address: Address
    port: int
    netns: int = 0
    protocol: int = 6  # IPPROTO_TCP; 17 is UDP

    def __post_init__(self) -> None:
        if not (0 <= self.port < 2**16 and 0 <= self.netns < 2**64 and self.protocol in (6, 17)):
            raise ValueError("a destination has a 16-bit port, a 64-bit namespace cookie and protocol 6 or 17")

    def __str__(self) -> str:
        host = str(self.address)
        return f"{'tcp' if self.protocol == 6 else 'udp'}://{f'[{host}]' if ':' in host else host}:{self.port}"


@dataclass(frozen=True, slots=True)
class CircuitEvent:
    """A circuit changed its state. `at_ns`: CLOCK_MONOTONIC; `cgroup`: of the socket concerned, 0 if none."""

    kind: Kind
    at_ns: int
    destination: Destination
    failures: int  # that were counted
    error: int  # errno of the deciding failure, 0: given up by the application
    pid: int
    cgroup: int


@dataclass(frozen=True, slots=True)
class ProcessEvent:
    """A process of a watched cgroup was chosen by the OOM killer or ended badly."""

    kind: Kind
    at_ns: int
    pid: int
    cgroup: int
    code: int  # as wait(2) has it
    life_ns: int  # 0 for an OOM victim
    memory_cgroup: int  # of an OOM victim; 0 otherwise
    comm: str  # not trusted: text chosen by the process, ASCII with the rest escaped

    @property
    def signal(self) -> int:
        return self.code & 0x7F

    @property
    def status(self) -> int:
        return self.code >> 8 & 0xFF


@dataclass(frozen=True, slots=True)
class TransportEvent:
    """Trouble on the way to a watched destination, in one window."""

    kind: Kind
    at_ns: int
    destination: Destination
    count: int  # resets, segments or SYNs sent again; 65535: that many or more
    attempts: int  # connects that began


@dataclass(frozen=True, slots=True)
class StorageEvent:
    """Slow or failing operations of one cgroup on one device, in one window."""

    kind: Kind
    at_ns: int
    cgroup: int  # 0 where the kernel does not say who asked
    device: int  # major << 20 | minor
    operation: Operation
    operations: int
    slow: int
    errors: int
    source: Source
    longest_ns: int


@dataclass(frozen=True, slots=True)
class SyscallEvent:
    """A novel system call, or a window with too many errors, in a watched cgroup."""

    kind: Kind
    at_ns: int
    pid: int
    cgroup: int
    number: int
    result: int
    errors: int
    calls: int


@dataclass(frozen=True, slots=True)
class StuckEvent:
    """A circuit that stays open; not from a ring: user space looks at the circuits."""

    kind: Kind
    at_ns: int
    destination: Destination  # of any namespace
    open_for_ns: int
    probes: int  # that left meanwhile


@dataclass(frozen=True, slots=True)
class PressureEvent:
    """Tasks of a cgroup stalled; not from a ring: the kernel's PSI trigger woke user space."""

    kind: Kind
    at_ns: int
    cgroup: int
    resource: Resource
    stalled_ns: int
    window_ns: int


KernelEvent = CircuitEvent | ProcessEvent | TransportEvent | StorageEvent | SyscallEvent | StuckEvent | PressureEvent


def decode(raw: bytes) -> KernelEvent:
    """The event in one 56-byte record. EventError where its kind, a flag or a reserved byte is unknown."""
    if len(raw) != RECORD.size:
        raise EventError("a record has another length", want=str(RECORD.size), got=str(len(raw)))
    at_ns, number, flags, pid, cgroup, body = RECORD.unpack(raw)
    kind = _KINDS.get(number)
    if kind is None:
        raise EventError("a record of an unknown kind", want="a kind of bpf/event.h", got=str(number))
    if flags:
        raise EventError("a record with unknown flags", want="0", got=hex(flags))
    return _READERS[kind](kind, at_ns, pid, cgroup, body)


def encode(event: KernelEvent) -> bytes:
    """The inverse: for what user space notices itself, for recorded events and tests."""
    match event:
        case CircuitEvent():
            body = CIRCUIT.pack(*_to(event.destination), event.failures, event.error)
            return RECORD.pack(event.at_ns, event.kind, 0, event.pid, event.cgroup, body)
        case ProcessEvent():
            comm = event.comm.encode("ascii").decode("unicode_escape").encode("latin-1")
            body = PROCESS.pack(event.code, 0, event.life_ns or event.memory_cgroup, comm)
            return RECORD.pack(event.at_ns, event.kind, 0, event.pid, event.cgroup, body)
        case TransportEvent():
            body = TRANSPORT.pack(*_to(event.destination), event.count, event.attempts)
            return RECORD.pack(event.at_ns, event.kind, 0, 0, 0, body)
        case StorageEvent():
            e = event
            body = STORAGE.pack(e.device, e.operation, e.operations, e.slow, e.errors, e.source, e.longest_ns)
            return RECORD.pack(e.at_ns, e.kind, 0, 0, e.cgroup, body)
        case SyscallEvent():
            body = SYSCALL.pack(event.number, event.result, event.errors, event.calls, 0)
            return RECORD.pack(event.at_ns, event.kind, 0, event.pid, event.cgroup, body)
        case StuckEvent():
            address, _, port, protocol, _ = _to(event.destination)
            body = STUCK.pack(address, event.open_for_ns, port, protocol, 0, event.probes)
            return RECORD.pack(event.at_ns, event.kind, 0, 0, 0, body)
        case PressureEvent():
            body = PRESSURE.pack(event.resource, 0, event.stalled_ns, event.window_ns, 0)
            return RECORD.pack(event.at_ns, event.kind, 0, 0, event.cgroup, body)
        case _:
            assert_never(event)


def _to(d: Destination) -> tuple[bytes, int, int, int, int]:
    return d.address.packed, d.netns, d.port, d.protocol, 0


def _circuit(kind: Kind, at_ns: int, pid: int, cgroup: int, body: bytes) -> CircuitEvent:
    *to, failures, error = CIRCUIT.unpack(body)
    return CircuitEvent(kind, at_ns, _destination(*to), failures, error, pid, cgroup)


@functools.lru_cache(maxsize=4096)  # as many as can be armed; the executor hears of the same few over and over
def _destination(address: bytes, netns: int, port: int, protocol: int, pad: int) -> Destination:
    if pad or protocol not in (6, 17):
        raise EventError("a record with an unknown protocol", want="6 or 17", got=f"{protocol}, pad {pad}")
    return Destination(Address.from_bytes(address), port, netns, protocol)


def _process(kind: Kind, at_ns: int, pid: int, cgroup: int, body: bytes) -> ProcessEvent:
    code, pad, number, comm = PROCESS.unpack(body)
    if pad:
        raise EventError("a process record with a reserved byte set", want="0", got=hex(pad))
    text = comm.split(b"\0")[0].decode("latin-1").encode("unicode_escape").decode("ascii")
    victim = kind is Kind.OOM_VICTIM
    return ProcessEvent(kind, at_ns, pid, cgroup, code, 0 if victim else number, number if victim else 0, text)


def _transport(kind: Kind, at_ns: int, _pid: int, _cgroup: int, body: bytes) -> TransportEvent:
    *to, count, attempts = TRANSPORT.unpack(body)
    return TransportEvent(kind, at_ns, _destination(*to), count, attempts)


def _storage(kind: Kind, at_ns: int, _pid: int, cgroup: int, body: bytes) -> StorageEvent:
    device, number, operations, slow, errors, source, longest = STORAGE.unpack(body)
    if number not in Operation.__members__.values() or source not in Source.__members__.values():
        raise EventError(
            "a storage record of an unknown operation or source", want="0..3, 0..3", got=f"{number}, {source}"
        )
    return StorageEvent(
        kind, at_ns, cgroup, device, Operation(number), operations, slow, errors, Source(source), longest
    )


def _syscall(kind: Kind, at_ns: int, pid: int, cgroup: int, body: bytes) -> SyscallEvent:
    number, result, errors, calls, pad = SYSCALL.unpack(body)
    if pad:
        raise EventError("a system-call record with a reserved byte set", want="0", got=hex(pad))
    return SyscallEvent(kind, at_ns, pid, cgroup, number, result, errors, calls)


def _stuck(kind: Kind, at_ns: int, _pid: int, _cgroup: int, body: bytes) -> StuckEvent:
    address, open_for, port, protocol, pad, probes = STUCK.unpack(body)
    return StuckEvent(kind, at_ns, _destination(address, 0, port, protocol, pad), open_for, probes)


def _pressure(kind: Kind, at_ns: int, _pid: int, cgroup: int, body: bytes) -> PressureEvent:
    resource, pad, stalled, window, pad2 = PRESSURE.unpack(body)
    if pad or pad2 or resource not in Resource.__members__.values():
        raise EventError("a pressure record of an unknown resource", want="0..2", got=f"{resource}, pad {pad} {pad2}")
    return PressureEvent(kind, at_ns, cgroup, Resource(resource), stalled, window)


_KINDS: Final[Mapping[int, Kind]] = {kind.value: kind for kind in Kind}
_READERS: Final[Mapping[Kind, Callable[[Kind, int, int, int, bytes], KernelEvent]]] = {
    Kind.CIRCUIT_OPENED: _circuit,
    Kind.CIRCUIT_HALF_OPEN: _circuit,
    Kind.CIRCUIT_CLOSED: _circuit,
    Kind.CIRCUIT_REOPENED: _circuit,
    Kind.CIRCUIT_EXPIRED: _circuit,
    Kind.CIRCUIT_STUCK: _stuck,
    Kind.OOM_VICTIM: _process,
    Kind.PROCESS_EXIT: _process,
    Kind.RESETS: _transport,
    Kind.RETRANSMITS: _transport,
    Kind.CONNECT_SLOW: _transport,
    Kind.STORAGE_SLOW: _storage,
    Kind.DISK_ERROR: _storage,
    Kind.SYSCALL_NOVEL: _syscall,
    Kind.SYSCALL_ERRORS: _syscall,
    Kind.PRESSURE: _pressure,
}
assert _READERS.keys() == set(Kind)
