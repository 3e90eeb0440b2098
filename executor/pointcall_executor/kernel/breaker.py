"""The circuit breaker in the kernel, from user space: arm destinations, read circuits, command them.

It decides nothing: bpf/breaker.bpf.c detects, opens, refuses and probes by itself, also when this process hangs. When
the sensor is closed the gates are gone and everything connects again. Spec: docs/spec/kernel-abi.md section 4.
"""

from __future__ import annotations

import enum
import errno
import os
import socket
import struct
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pointcall_executor.core.breaker import COUNT_MAX, PROBES_MAX, TIME_MASK, Params, State, Word, age_us
from pointcall_executor.core.event import Destination
from pointcall_executor.kernel import bpf
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.kernel.errors import CircuitError
from pointcall_executor.kernel.kernel_object import Loader
from pointcall_executor.kernel.loader import load
from pointcall_executor.kernel.maps import Map
from pointcall_executor.kernel.pins import Pinned
from pointcall_executor.kernel.sensor import Sensor
from pointcall_runbook.vocabulary import Address, Network

KEY: Final = struct.Struct("<16sQHB5x")  # struct pointcall_destination
VALUE: Final = struct.Struct("<Q8Q11Q4I4I")  # struct pointcall_circuit
POLICY: Final = struct.Struct("<4I4I")  # its end: the destination's own values
COMMAND: Final = struct.Struct("<32sQQQI4x")  # struct pointcall_command
LEASE_MAX_NS: Final = 3_600_000_000_000  # a forced circuit ends within the hour, also when nobody is left to end it

SO_NETNS_COOKIE: Final = 71
_UNSPECIFIED: Final = {
    Address.from_bytes(bytes(4)): Address.parse("127.0.0.1"),
    Address.from_bytes(bytes(16)): Address.parse("::1"),
}


class Flag(enum.IntFlag):
    """enum pointcall_circuit_flag."""

    ABANDONED_COUNTS = 1
    ABANDONED_IGNORED = 2
    WATCH_ONLY = 4


class Command(enum.IntEnum):
    """enum pointcall_command_op."""

    FORCE = 1
    PROBE_READY = 2
    CLOSE = 3


@dataclass(frozen=True, slots=True)
class CircuitPolicy:
    """One destination's own values; 0 and None mean the constant of the object."""

    threshold: int = 0
    percent: int = 0
    min_attempts: int = 0
    window_ms: int = 0
    cooldown_ms: int = 0
    refuse_errno: int = 0
    abandoned: bool | None = None
    watch_only: bool = False  # mode `monitor`: everything but refusing

    def __post_init__(self) -> None:
        limits = (COUNT_MAX, 100, 2**32 - 1, 2**32 - 1, 2**32 - 1, 4095)
        values = (
            self.threshold, self.percent, self.min_attempts, self.window_ms, self.cooldown_ms, self.refuse_errno,
        )  # fmt: skip
        if not all(0 <= value <= limit for value, limit in zip(values, limits, strict=True)):
            raise ValueError(f"a circuit policy is out of range: {values}, limits {limits}")

    @property
    def flags(self) -> Flag:
        flags = Flag.WATCH_ONLY if self.watch_only else Flag(0)
        if self.abandoned is not None:
            flags |= Flag.ABANDONED_COUNTS if self.abandoned else Flag.ABANDONED_IGNORED
        return flags


@dataclass(frozen=True, slots=True)
class CircuitState:
    """A circuit as the kernel has it now. Times are CLOCK_MONOTONIC ns; counters begin anew only where watching becomes
    refusing or the other way round."""

    destination: Destination
    word: Word
    attempts: int
    t_seen_ns: int  # program entry for the failure that opened it last, 0: never opened
    t_open_ns: int  # after the swap that opened it last
    t_refused_ns: int  # the first refusal after that
    failures: int
    successes: int
    opened: int
    refused: int
    probes: int
    closed: int
    ignored: int
    watch_only: bool = False  # refuses nothing: `refused` counts what would have been

    @property
    def state(self) -> State:
        return self.word.state

    def refuses(self, now_ns: int) -> bool:
        """Whether a connect at this time may be refused. A lease that is over is in the word until the next connect."""
        if self.state is State.FORCED and not age_us(self.word.time_us, now_ns // 1000):
            return False
        return self.state is not State.CLOSED and not self.watch_only


class BreakerSensor(Sensor):
    """The breaker, its gates on one cgroup and all below it.

    `constants` overrides values of bpf/breaker.bpf.c by name. Results of sockets outside `cgroup` decide nothing.
    `never_touch`: networks whose destinations cannot be armed (resolver, API server, audit sink).
    """

    def __init__(
        self,
        blob: Blob,
        *,
        cgroup: Path,
        constants: Mapping[str, int] | None = None,
        never_touch: Collection[Network] = (),
        pinned: Pinned | None = None,
        loader: Loader = load,
    ) -> None:
        scope = Cgroup(cgroup)
        level = scope.level
        values = dict(constants or {}) | {"scope_cgroup": scope.id if level else 0, "scope_level": level}
        _check_constants(blob.defaults | values)
        super().__init__(blob, constants=values, cgroup=cgroup, pinned=pinned, loader=loader)
        self.params = _params(blob.defaults | values)
        self.node_wide = bool((blob.defaults | values)["node_wide"])
        self._never_touch = tuple(never_touch)

    def arm(self, destination: Destination, policy: CircuitPolicy | None = None) -> None:
        """Watch and gate this destination. Arming twice leaves the circuit as it is.

        0.0.0.0 and :: are armed as loopback. Raises CircuitError where the destination may never be touched or the
        table is full.
        """
        target = normalised(destination)
        for network in self._never_touch:
            if target.address in network:
                raise CircuitError(
                    f"{target} is never touched", id="kernel.circuit.never_touch", got=str(network.text),
                    hint="the guard's never_touch list protects it; a runbook cannot arm it",
                )  # fmt: skip
        try:
            self._maps["circuits"].add(_key(target), _fresh(policy or CircuitPolicy()))
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            raise CircuitError(
                "no room for another circuit", id="kernel.circuit.full",
                want=f"at most {self._maps['circuits'].info.max_entries} armed destinations", got=str(target),
            ) from None  # fmt: skip

    def set_policy(self, destination: Destination, policy: CircuitPolicy) -> None:
        """Give an armed destination another policy. CircuitError where it is not armed.

        State and counters go on, but where watching becomes refusing or the other way round: then it is closed and
        counts from zero.

        A result that arrives in the very moment may be lost. Where the policy is the same, nothing is written.
        """
        target = normalised(destination)
        raw = self._maps["circuits"].get(_key(target))
        if raw is None:
            raise _not_armed(target)
        wanted = _under(_fresh(policy), raw)
        if wanted != raw:
            self._maps["circuits"].set(_key(target), wanted)

    def disarm(self, destination: Destination) -> None:
        """Forget the destination: its connects pass, its counters are gone. Twice does no harm."""
        self._maps["circuits"].delete(_key(normalised(destination)))

    def circuit(self, destination: Destination) -> CircuitState:
        """The circuit now. CircuitError where it is not armed."""
        target = normalised(destination)
        raw = self._maps["circuits"].get(_key(target))
        if raw is None:
            raise _not_armed(target)
        return _state(target, raw)

    def circuits(self) -> Iterator[CircuitState]:
        """Every armed circuit."""
        for key, value in self._maps["circuits"].items():
            yield _state(_destination(key), value)

    def take_over(self, other: BreakerSensor) -> None:
        """Go on with the circuits of another breaker that are armed here, too: state and counters, each under the
        policy that it has here. Also where a destination was of one namespace there and is node-wide here, or the
        other way round."""
        circuits, theirs = self._maps["circuits"], other._maps["circuits"]
        if circuits.info.id == theirs.info.id:
            return  # the same one, taken up again
        before = dict(theirs.items())
        narrow = {_node_wide(key): value for key, value in before.items()}
        for key, value in list(circuits.items()):
            found = before.get(key) or before.get(_node_wide(key)) or narrow.get(key)
            if found is not None:
                circuits.set(key, _under(value, found))

    def force(self, destination: Destination, until_ns: int) -> Word:
        """Refuse until `until_ns` (CLOCK_MONOTONIC), whatever happens to this process. Returns the word before.

        The lease is at most an hour from now: CircuitError where it is longer or already over.
        """
        left = until_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        if not 0 < left <= LEASE_MAX_NS:
            raise CircuitError(
                "a forced circuit must end within the hour", id="kernel.circuit.lease",
                want=f"1..{LEASE_MAX_NS} ns from now", got=f"{left} ns",
            )  # fmt: skip
        return self._command(Command.FORCE, destination, until_ns // 1000)

    def make_probe_ready(self, destination: Destination) -> Word:
        """End the cool-down: the next connect is the probe. A closed circuit stays closed, and one that somebody holds
        open stays open. Returns the word before."""
        return self._command(Command.PROBE_READY, destination)

    def close_circuit(self, destination: Destination) -> Word:
        """Close, whatever it was, and count from zero; counters stay. Returns the word before."""
        return self._command(Command.CLOSE, destination)

    def put_back(self, destination: Destination, word: Word) -> None:
        """Make the circuit what it was before a command, as the command returned it; nothing where it is not armed.

        A result that arrives in the very moment may be lost.
        """
        key = _key(normalised(destination))
        raw = self._maps["circuits"].get(key)
        if raw is not None:
            self._maps["circuits"].set(key, word.pack().to_bytes(8, "little") + raw[8:])

    def allow(self, cgroup_id: int) -> None:
        """Never refuse tasks of this cgroup (a health checker, the executor). Their results still count."""
        self._maps["allowed"].set(struct.pack("<Q", cgroup_id), struct.pack("<I", 1))

    def disallow(self, cgroup_id: int) -> None:
        """Refuse tasks of this cgroup like any other."""
        self._maps["allowed"].delete(struct.pack("<Q", cgroup_id))

    def allow_only(self, cgroup_ids: Collection[int]) -> None:
        """These and no others are allowed."""
        for key, _ in list(self._maps["allowed"].items()):
            if struct.unpack("<Q", key)[0] not in cgroup_ids:
                self._maps["allowed"].delete(key)
        for cgroup_id in cgroup_ids:
            self.allow(cgroup_id)

    def _command(self, command: Command, destination: Destination, until_us: int = 0) -> Word:
        target = normalised(destination)
        context = COMMAND.pack(_key(target), until_us & TIME_MASK, 0, 0, command)
        result, out = bpf.prog_run(self._alive.programs["pc_command"], context)
        if result == -errno.ENOENT:
            raise _not_armed(target)
        if result:
            raise CircuitError(
                f"{target} could not be commanded", id="kernel.circuit.busy", want="one exchange to win",
                got=errno.errorcode.get(-result, str(result)), hint="other CPUs changed it each time; try again",
            )  # fmt: skip
        return Word.unpack(COMMAND.unpack(out)[2])


def pinned_refusing(folder: Path) -> list[Destination]:
    """Whose connects the breaker that is pinned below `folder` may refuse now. None where its table is not one of
    ours."""
    try:
        fd = bpf.pinned(str(folder / "map_circuits"))
    except FileNotFoundError:
        return []
    try:
        circuits = Map(fd)
        if (circuits.info.key_size, circuits.info.value_size) != (KEY.size, VALUE.size):
            return []
        states = [_state(_destination(key), raw) for key, raw in circuits.items()]
    finally:
        os.close(fd)
    now_ns = time.monotonic_ns()
    return [s.destination for s in states if s.refuses(now_ns)]


def let_pass(folder: Path) -> bool:
    """Make every circuit of the breaker that is pinned below `folder` refuse nothing from now on, whoever takes it up.

    False where its table is not one of ours. True where nothing is pinned.
    """
    try:
        fd = bpf.pinned(str(folder / "map_circuits"))
    except FileNotFoundError:
        return True
    try:
        circuits = Map(fd)
        if (circuits.info.key_size, circuits.info.value_size) != (KEY.size, VALUE.size):
            return False
        for key, raw in list(circuits.items()):
            if not _state(_destination(key), raw).watch_only:
                circuits.set(key, _fresh(CircuitPolicy(watch_only=True)))
    finally:
        os.close(fd)
    return True


def netns_cookie() -> int:
    """The cookie of this thread's network namespace: part of every circuit's key."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")


def normalised(destination: Destination) -> Destination:
    """The destination that its connects reach: 0.0.0.0 and :: are loopback."""
    address = _UNSPECIFIED.get(destination.address, destination.address)
    return Destination(address, destination.port, destination.netns, destination.protocol)


def _key(destination: Destination) -> bytes:
    return KEY.pack(destination.address.packed, destination.netns, destination.port, destination.protocol)


def _node_wide(key: bytes) -> bytes:
    address, _, port, protocol = KEY.unpack(key)
    return KEY.pack(address, 0, port, protocol)


def _destination(key: bytes) -> Destination:
    address, netns, port, protocol = KEY.unpack(key)
    return Destination(Address.from_bytes(address), port, netns, protocol)


def _fresh(policy: CircuitPolicy) -> bytes:
    own = (policy.threshold, policy.percent, policy.refuse_errno, policy.flags)
    values = POLICY.pack(*own, policy.window_ms, policy.cooldown_ms, policy.min_attempts, 0)
    return bytes(VALUE.size - POLICY.size) + values


def _flags(raw: bytes) -> Flag:
    return Flag(POLICY.unpack(raw[-POLICY.size :])[3])


def _under(mine: bytes, raw: bytes) -> bytes:
    """A circuit `raw` under the policy of `mine`; closed, from zero, where that changes whether it refuses."""
    if (_flags(raw) ^ _flags(mine)) & Flag.WATCH_ONLY:
        return bytes(VALUE.size - POLICY.size) + mine[-POLICY.size :]
    return raw[: -POLICY.size] + mine[-POLICY.size :]


def _state(destination: Destination, raw: bytes) -> CircuitState:
    word, *rest = VALUE.unpack(raw)
    counters = (*rest[PROBES_MAX : PROBES_MAX + 11], Flag.WATCH_ONLY in _flags(raw))
    return CircuitState(destination, Word.unpack(word), *counters)


def _not_armed(destination: Destination) -> CircuitError:
    return CircuitError(
        f"{destination} is not armed", id="kernel.circuit.absent", want="an armed destination", got=str(destination),
        hint="it carries the network namespace's cookie; was it armed in another one?",
    )  # fmt: skip


def _params(values: Mapping[str, int]) -> Params:
    return Params(**{name: values[name] for name in Params.__dataclass_fields__})


def _check_constants(values: Mapping[str, int]) -> None:
    limits = {"threshold": (1, COUNT_MAX), "probe_budget": (1, PROBES_MAX), "percent": (0, 100)}
    limits |= dict.fromkeys(("window_us", "cooldown_us", "probe_us"), (1, TIME_MASK // 4))
    limits |= {"cooldown_max_us": (0, TIME_MASK // 4), "refuse_errno": (0, 4095)}
    for name, (lo, hi) in limits.items():
        if not lo <= values[name] <= hi:
            raise CircuitError(
                f"{name} is out of range", id="kernel.circuit.constant", want=f"{lo}..{hi}", got=str(values[name])
            )
