"""The vocabulary: every event a runbook can handle and every action it can decide. The one schema.

An event or an action is a frozen dataclass whose fields carry their range. The compiler, the module verifier, the
host's checks, `pointcall explain` and the documentation all read `EVENTS` and `ACTIONS`; nothing is typed twice.
In Wasm each field travels as one signed 64-bit integer, an address as two (`slots`). Spec: docs/spec/rb1.md.

Not here: how a runbook is written (sdk.py), how it is compiled (compiler/), who may do what (the manifest).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import ipaddress
import json
import operator
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NamedTuple, Self, TypeVar

VERSION: Final = 1
U16: Final = 2**16 - 1
U31: Final = 2**31 - 1
U32: Final = 2**32 - 1
U63: Final = 2**63 - 1
HOUR_NS: Final = 3_600_000_000_000

# A call to an action and its arguments, as they leave a module.
MAX_ACTIONS: Final = 8  # per decision: more is an author's mistake; the guard would refuse most of them anyway


@dataclass(frozen=True, slots=True)
class Range:
    """Inclusive bounds of an integer field, and its unit where it has one."""

    lo: int
    hi: int
    unit: str = ""


class Level(enum.IntEnum):
    """How loud a notification is."""

    DEBUG = 0
    INFO = 1
    WARNING = 2
    ERROR = 3
    CRITICAL = 4


class Outcome(enum.IntEnum):
    """What became of an action."""

    APPLIED = 0
    REFUSED = 1  # by the guard
    FAILED = 2  # tried, and the system said no
    UNCONFIRMED = 3  # done, but its post-condition did not hold
    MONITORED = 4  # not done: the runbook is in mode `monitor`


class Operation(enum.IntEnum):
    """A file-system or block operation."""

    READ = 0
    WRITE = 1
    FSYNC = 2
    OTHER = 3


class Resource(enum.IntEnum):
    """What a pressure stall is about."""

    CPU = 0
    MEMORY = 1
    IO = 2


class Unusual(enum.IntEnum):
    """What is unusual about a system call."""

    NOVEL = 0  # never seen while learning
    ERRORS = 1  # the error rate of its window


class ActionKind(enum.IntEnum):
    """The action that an `ActionDone` event speaks of; the order is part of the ABI."""

    RECREATE = 0
    NOTIFY = 1
    OPEN_CIRCUIT = 2
    CLOSE_CIRCUIT = 3
    KILL_CONNECTIONS = 4
    ISOLATE = 5
    FREEZE = 6
    THAW = 7
    KILL = 8
    ESCALATE = 9
    REMEMBER = 10
    AGAIN = 11


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """An IPv4 or IPv6 address as 128 bits; IPv4 is held v4-mapped (::ffff:a.b.c.d), so both are one type.

    `hi` and `lo` are the unsigned 64-bit halves, most significant first. In Wasm they are two raw i64.
    """

    hi: int
    lo: int

    def __post_init__(self) -> None:
        if not (0 <= self.hi < 2**64 and 0 <= self.lo < 2**64):
            raise ValueError("an address half is an unsigned 64-bit integer")

    @classmethod
    def parse(cls, text: str) -> Self:
        return cls.from_bytes(ipaddress.ip_address(text).packed)

    @classmethod
    def from_bytes(cls, packed: bytes) -> Self:
        """4 or 16 bytes in network order."""
        if len(packed) == 4:
            packed = b"\0" * 10 + b"\xff\xff" + packed
        if len(packed) != 16:
            raise ValueError("an address has 4 or 16 bytes")
        return cls(int.from_bytes(packed[:8], "big"), int.from_bytes(packed[8:], "big"))

    @property
    def packed(self) -> bytes:
        """16 bytes in network order."""
        return self.hi.to_bytes(8, "big") + self.lo.to_bytes(8, "big")

    def __str__(self) -> str:
        return _address_text(self.hi, self.lo)


@functools.lru_cache(maxsize=4096)
def _address_text(hi: int, lo: int) -> str:
    """Cached: the executor names the same few destinations over and over."""
    address = ipaddress.IPv6Address((hi << 64) | lo)
    return str(address.ipv4_mapped or address)


@dataclass(frozen=True, slots=True)
class Network:
    """A block of addresses: `Network("10.0.0.0/8")`. `address in network` is a membership test."""

    text: str

    def __post_init__(self) -> None:
        ipaddress.ip_network(self.text)  # ValueError on host bits or nonsense

    @property
    def bits(self) -> tuple[Address, int]:
        """First address and prefix length over 128 bits."""
        return _network_bits(self.text)

    def __contains__(self, address: Address) -> bool:
        first, prefix = self.bits
        shift = 128 - prefix
        return ((address.hi << 64 | address.lo) >> shift) == ((first.hi << 64 | first.lo) >> shift)


@functools.lru_cache(maxsize=4096)
def _network_bits(text: str) -> tuple[Address, int]:
    """Cached: the guard asks for the same few networks on every action."""
    net = ipaddress.ip_network(text)
    return Address.from_bytes(net.network_address.packed), net.prefixlen + (96 if net.version == 4 else 0)


def _number(kind: str, name: str) -> int:
    if not name:
        raise ValueError(f"a {kind} has a name")
    digest = hashlib.sha256(f"pointcall/{kind}/v1\0{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & U31 or 1


@dataclass(frozen=True, slots=True)
class Service:
    """A declared service. Its number comes from its name alone, so a module needs no relocation; 0 is "none".

    The manifest refuses two services with the same number.
    """

    number: int


@dataclass(frozen=True, slots=True)
class Channel:
    """Where a notification goes; numbered like a service."""

    number: int


def service(name: str) -> Service:
    """The service of this name in the manifest."""
    return Service(_number("service", name))


def channel(name: str) -> Channel:
    """The notification channel of this name in the manifest."""
    return Channel(_number("channel", name))


NO_SERVICE: Final = Service(0)

Instant = Annotated[int, Range(0, U63, "ns since boot")]
Duration = Annotated[int, Range(0, U63, "ns")]
Hold = Annotated[int, Range(0, HOUR_NS, "ns")]  # every lease ends within the hour
Count = Annotated[int, Range(0, U32)]
Port = Annotated[int, Range(0, U16)]


class Event:
    """Base of all events. `at` is when the kernel saw it; facts that the host adds are described at the field."""


class Action:
    """Base of all actions. Where a field has a default it may be left out in a runbook."""


@dataclass(frozen=True, slots=True)
class CircuitOpened(Event):
    """The breaker opened the circuit to a destination: enough connects failed within its window."""

    at: Instant
    address: Address
    port: Port
    failures: Count  # that opened it
    reopened: bool  # it was half-open, and the probe failed
    opens: Count  # fact: openings of this circuit in the last hour, this one included
    service: Service  # fact: the declared service that listens there, 0 if none
    restarts: Count  # fact: times that service was recreated in the last hour


@dataclass(frozen=True, slots=True)
class CircuitClosed(Event):
    """A half-open probe succeeded, and the circuit closed."""

    at: Instant
    address: Address
    port: Port
    open_for: Duration
    service: Service
    restarts: Count


@dataclass(frozen=True, slots=True)
class CircuitStuck(Event):
    """A circuit has been open or half-open for longer than its limit without any probe succeeding."""

    at: Instant
    address: Address
    port: Port
    open_for: Duration
    probes: Count
    service: Service
    restarts: Count


@dataclass(frozen=True, slots=True)
class ConnectSlow(Event):
    """Connects to a destination time out or are given up, within one window."""

    at: Instant
    address: Address
    port: Port
    timeouts: Count
    attempts: Count
    service: Service
    restarts: Count


@dataclass(frozen=True, slots=True)
class ConnectionsReset(Event):
    """Established connections to a destination were reset by the other side, within one window."""

    at: Instant
    address: Address
    port: Port
    resets: Count
    service: Service
    restarts: Count


@dataclass(frozen=True, slots=True)
class RetransmitStorm(Event):
    """Segments to a destination had to be sent again, within one window: the path or the peer loses packets."""

    at: Instant
    address: Address
    port: Port
    segments: Count
    service: Service
    restarts: Count


@dataclass(frozen=True, slots=True)
class OomKilled(Event):
    """The kernel's out-of-memory killer chose a process of a declared service."""

    at: Instant
    service: Service
    kills: Count  # fact: OOM kills of this service in the last hour, this one included
    restarts: Count


@dataclass(frozen=True, slots=True)
class ProcessExited(Event):
    """The main process of a declared service ended with a signal or a non-zero status."""

    at: Instant
    service: Service
    signal: Annotated[int, Range(0, 127)]
    status: Annotated[int, Range(0, 255)]
    lifetime: Duration
    exits: Count  # fact: such exits of this service in the last hour, this one included
    restarts: Count


@dataclass(frozen=True, slots=True)
class FilesystemSlow(Event):
    """Operations on a device or file system were slow in one window, or one of them took very long."""

    at: Instant
    device: Count
    operation: Operation
    operations: Count
    slow: Count
    longest: Duration
    service: Service
    restarts: Count


@dataclass(frozen=True, slots=True)
class DiskError(Event):
    """A block device reported errors in one window."""

    at: Instant
    device: Count
    errors: Count
    service: Service


@dataclass(frozen=True, slots=True)
class SyscallUnusual(Event):
    """A watched service made a system call it never made while learning, or too many of its calls fail."""

    at: Instant
    kind: Unusual
    number: Annotated[int, Range(0, 1023)]
    errors: Count
    calls: Count
    service: Service
    restarts: Count


@dataclass(frozen=True, slots=True)
class PressureHigh(Event):
    """Tasks of a service's cgroup stalled on a resource (PSI)."""

    at: Instant
    resource: Resource
    stalled: Duration
    window: Duration
    service: Service
    restarts: Count


@dataclass(frozen=True, slots=True)
class ActionDone(Event):
    """An action that this runbook decided has ended."""

    at: Instant
    action: ActionKind
    outcome: Outcome
    service: Service
    restarts: Count


@dataclass(frozen=True, slots=True)
class Timer(Event):
    """The time that an `Again` asked for has come."""

    at: Instant
    tag: Count
    service: Service
    restarts: Count


@dataclass(frozen=True, slots=True)
class Recreate(Action):
    """Destroy the service and start it from its declared, hashed state."""

    service: Service
    grace: Annotated[int, Range(0, 600_000_000_000, "ns")] = 0  # between the stop signal and SIGKILL


@dataclass(frozen=True, slots=True)
class Notify(Action):
    """Tell a channel. `code` is the author's own number, explained in the runbook's README."""

    channel: Channel
    level: Level
    code: Count


@dataclass(frozen=True, slots=True)
class OpenCircuit(Action):
    """Refuse connects to a destination for `hold`, whatever their result would be."""

    address: Address
    port: Port
    hold: Hold


@dataclass(frozen=True, slots=True)
class CloseCircuit(Action):
    """End a forced or open circuit and count from zero."""

    address: Address
    port: Port


@dataclass(frozen=True, slots=True)
class KillConnections(Action):
    """Reset established connections to a destination."""

    address: Address
    port: Port


@dataclass(frozen=True, slots=True)
class Isolate(Action):
    """Refuse all traffic of a service's cgroup for `hold`."""

    service: Service
    hold: Hold


@dataclass(frozen=True, slots=True)
class Freeze(Action):
    """Freeze a service's cgroup for `hold`."""

    service: Service
    hold: Hold


@dataclass(frozen=True, slots=True)
class Thaw(Action):
    """Thaw a frozen service now."""

    service: Service


@dataclass(frozen=True, slots=True)
class Kill(Action):
    """Send a signal to a service's main process."""

    service: Service
    signal: Annotated[int, Range(1, 64)]


@dataclass(frozen=True, slots=True)
class Escalate(Action):
    """Call a person: a notification that must be acknowledged."""

    channel: Channel
    code: Count


@dataclass(frozen=True, slots=True)
class Remember(Action):
    """Keep a number for the next decision of this runbook about the same target."""

    slot: Annotated[int, Range(0, 7)]
    value: Annotated[int, Range(0, U63)]


@dataclass(frozen=True, slots=True)
class Again(Action):
    """Run the `Timer` handler after `after`."""

    after: Hold
    tag: Count = 0


class Kind(enum.Enum):
    """How a field is typed in the language; `slots` is how many i64 it takes in a module."""

    INT = "int"
    BOOL = "bool"
    ENUM = "enum"
    ADDRESS = "address"
    SERVICE = "service"
    CHANNEL = "channel"

    @property
    def slots(self) -> int:
        return 2 if self is Kind.ADDRESS else 1


@dataclass(frozen=True, slots=True)
class Field:
    """One field of an event or an action. `lo` and `hi` are inclusive; for ADDRESS they are the raw i64 bounds."""

    name: str
    kind: Kind
    lo: int
    hi: int
    unit: str = ""
    enum: type[enum.IntEnum] | None = None
    default: int | None = None


_KINDS: Final = {Address: Kind.ADDRESS, Service: Kind.SERVICE, Channel: Kind.CHANNEL, bool: Kind.BOOL}


def _field(declared: dataclasses.Field[Any], hint: Any) -> Field:
    default = None if declared.default is dataclasses.MISSING else int(declared.default)
    if typing.get_origin(hint) is Annotated:
        (bounds,) = (m for m in hint.__metadata__ if isinstance(m, Range))
        return Field(declared.name, Kind.INT, bounds.lo, bounds.hi, bounds.unit, None, default)
    if isinstance(hint, type) and issubclass(hint, enum.IntEnum):
        return Field(declared.name, Kind.ENUM, min(hint), max(hint), "", hint, default)
    kind = _KINDS[hint]
    lo, hi = {Kind.ADDRESS: (-(2**63), U63), Kind.BOOL: (0, 1)}.get(kind, (0, U31))
    return Field(declared.name, kind, lo, hi, "", None, default)


_FIELDS: Final[dict[str, tuple[Field, ...]]] = {}


def fields(cls: type) -> tuple[Field, ...]:
    """The fields of an event or action type, in the order of the ABI."""
    if cls.__name__ not in _FIELDS:
        hints = typing.get_type_hints(cls, include_extras=True)
        _FIELDS[cls.__name__] = tuple(_field(f, hints[f.name]) for f in dataclasses.fields(cls))
    return _FIELDS[cls.__name__]


class _Slot(NamedTuple):
    """One i64 of a type in a module. `make` is what its value becomes in the language, None: it stays an integer."""

    name: str
    half: bool  # of an address: any bit pattern, held unsigned in the language
    lo: int
    hi: int
    make: Callable[[int], Any] | None


class _Layout(NamedTuple):
    """How a type lies in i64 slots, made once for each: every event and action of every run goes through it."""

    read: Callable[[Any], tuple[int, ...]]  # the value of each slot, in order
    slots: tuple[_Slot, ...]


def _slot(field: Field) -> _Slot:
    made = {Kind.SERVICE: Service, Kind.CHANNEL: Channel, Kind.BOOL: bool, Kind.ENUM: field.enum}
    return _Slot(field.name, field.kind is Kind.ADDRESS, field.lo, field.hi, made.get(field.kind))


_PARTS: Final[Mapping[Kind, tuple[str, ...]]] = {
    Kind.ADDRESS: (".hi", ".lo"),
    Kind.SERVICE: (".number",),
    Kind.CHANNEL: (".number",),
}


_LAYOUTS: Final[dict[type, _Layout]] = {}


def _layout(cls: type) -> _Layout:
    found = _LAYOUTS.get(cls)
    if found is None:
        declared = fields(cls)
        paths = [field.name + part for field in declared for part in _PARTS.get(field.kind, ("",))]
        read: Callable[[Any], Any] = operator.attrgetter(*paths)
        every: Callable[[Any], Any] = read if len(paths) > 1 else lambda value: (read(value),)
        found = _Layout(every, tuple(_slot(field) for field in declared for _ in range(field.kind.slots)))
        _LAYOUTS[cls] = found
    return found


def arity(cls: type) -> int:
    """How many i64 parameters the type takes in a module."""
    return len(_layout(cls).slots)


_EVENTS: Final[tuple[type[Event], ...]] = (
    CircuitOpened,
    CircuitClosed,
    CircuitStuck,
    ConnectSlow,
    ConnectionsReset,
    RetransmitStorm,
    OomKilled,
    ProcessExited,
    FilesystemSlow,
    DiskError,
    SyscallUnusual,
    PressureHigh,
    ActionDone,
    Timer,
)
_ACTIONS: Final[tuple[type[Action], ...]] = (  # in the order of ActionKind
    Recreate,
    Notify,
    OpenCircuit,
    CloseCircuit,
    KillConnections,
    Isolate,
    Freeze,
    Thaw,
    Kill,
    Escalate,
    Remember,
    Again,
)
EVENTS: Final[Mapping[str, type[Event]]] = {cls.__name__: cls for cls in _EVENTS}


def capability(cls: type[Action]) -> str:
    """The import name of an action: `OpenCircuit` is `rb1.open_circuit`."""
    return _CAPABILITIES[cls]


_CAPABILITIES: Final[Mapping[type[Action], str]] = {
    cls: "".join("_" + c.lower() if c.isupper() else c for c in cls.__name__).lstrip("_") for cls in _ACTIONS
}
ACTIONS: Final[Mapping[str, type[Action]]] = {capability(cls): cls for cls in _ACTIONS}


def slots(value: Event | Action) -> tuple[int, ...]:
    """The i64 values of an event or action, in the order of the ABI. ValueError where one is out of range."""
    layout, out = _layout(type(value)), []
    for number, (name, half, lo, hi, _) in zip(layout.read(value), layout.slots, strict=True):
        if half:
            out.append(number - 2**64 if number >= 2**63 else number)
        elif lo <= number <= hi:
            out.append(int(number))
        else:
            raise ValueError(f"{name} is {number}, outside {lo}..{hi}")
    return tuple(out)


_T = TypeVar("_T", bound=Event | Action)


def from_slots(cls: type[_T], raw: tuple[int, ...]) -> _T:
    """The inverse of `slots`. ValueError where the number of values or one of them does not fit."""
    places = _layout(cls).slots
    if len(raw) != len(places):
        raise ValueError(f"{cls.__name__} takes {len(places)} values, not {len(raw)}")
    out: list[Any] = []
    upper: int | None = None  # the half of an address that comes first
    for number, (name, half, lo, hi, make) in zip(raw, places, strict=True):
        if upper is not None:
            out.append(Address(upper % 2**64, number % 2**64))
            upper = None
        elif half:
            upper = number
        elif lo <= number <= hi:
            out.append(number if make is None else make(number))
        else:
            raise ValueError(f"{name} is {number}, outside {lo}..{hi}")
    return cls(*out)


@dataclass(frozen=True, slots=True)
class Call:
    """One call that a decision made: the capability and its raw i64 arguments."""

    action: str
    args: tuple[int, ...]

    def typed(self) -> Action:
        """ValueError if the action is unknown or an argument is out of range: the host's check on every run."""
        cls = ACTIONS.get(self.action)
        if cls is None:
            raise ValueError(f"no action is called {self.action!r}")
        return from_slots(cls, self.args)

    @classmethod
    def of(cls, action: Action) -> Self:
        return cls(capability(type(action)), slots(action))


def schema() -> dict[str, Any]:
    """The whole vocabulary as plain data, for documentation, editors and `digest`."""

    def rows(cls: type[Event] | type[Action]) -> list[dict[str, Any]]:
        return [
            {"name": f.name, "kind": f.kind.value, "lo": str(f.lo), "hi": str(f.hi)}
            | ({"unit": f.unit} if f.unit else {})
            | ({"members": [m.name for m in f.enum]} if f.enum else {})
            | ({"default": f.default} if f.default is not None else {})
            for f in fields(cls)
        ]

    return {
        "version": VERSION,
        "events": {name: rows(cls) for name, cls in sorted(EVENTS.items())},
        "actions": {name: rows(cls) for name, cls in sorted(ACTIONS.items())},
    }


@functools.cache
def digest() -> str:
    """SHA-256 (hex) of the canonical JSON of `schema()`; the manifest names it."""
    return hashlib.sha256(json.dumps(schema(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


Mode = Literal["monitor", "enforce"]
