"""CCEL event log of a confidential guest: bytes <-> events, and their replay into RTMR0 to RTMR3. No I/O, no trust.

The log is not signed: it explains the registers, and only a replay that ends in their values makes it believable.
Spec: UEFI 2.10, 38.4 (confidential computing event log); TCG PC Client Platform Firmware Profile, TCG_PCR_EVENT2.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pointcall_attest.errors import MalformedError

MAX_LOG_BYTES: Final = 1024 * 1024  # firmware reserves 64 to 256 KiB
MAX_EVENTS: Final = 4096  # the longest real one has 40
NO_ACTION: Final = 3
SHA384: Final = 0x0C
_FIRST: Final = struct.Struct("<II20sI")  # TCG_PCClientPCREvent: register, type, SHA-1, size
_SPEC_ID: Final = b"Spec ID Event03\0"
_SPEC: Final = struct.Struct("<16sIBBBBI")  # signature, platform class, version, errata, uintn, number of algorithms
_ALGORITHM: Final = struct.Struct("<HH")
_EVENT: Final = struct.Struct("<III")  # register, type, number of digests
_END: Final = b"\xff\xff\xff\xff"
_TYPE_NAMES: Final[Mapping[int, str]] = {
    0x00000001: "EV_POST_CODE",
    0x00000003: "EV_NO_ACTION",
    0x00000004: "EV_SEPARATOR",
    0x00000005: "EV_ACTION",
    0x00000006: "EV_EVENT_TAG",
    0x0000000D: "EV_IPL",
    0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    0x80000002: "EV_EFI_VARIABLE_BOOT",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x80000006: "EV_EFI_GPT_EVENT",
    0x80000007: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EV_EFI_HANDOFF_TABLES",
    0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EV_EFI_HANDOFF_TABLES2",
    0x800000E0: "EV_EFI_VARIABLE_AUTHORITY",
}


@dataclass(frozen=True, slots=True)
class Event:
    """One measurement: which register (0 to 3 for RTMR0 to 3), what kind, its SHA-384 and the data it describes."""

    register: int
    type: int
    digest: bytes
    data: bytes

    @property
    def type_name(self) -> str:
        return _TYPE_NAMES.get(self.type, f"{self.type:#010x}")

    def extended(self, register: bytes) -> bytes:
        """The register after this event: SHA-384(register || digest); EV_NO_ACTION leaves it as it is."""
        return register if self.type == NO_ACTION else hashlib.sha384(register + self.digest).digest()


@dataclass(frozen=True, slots=True)
class EventLog:
    """The events in order. `end` is where the log stops inside its area."""

    events: tuple[Event, ...]
    end: int

    def replay(self) -> tuple[bytes, bytes, bytes, bytes]:
        """RTMR0 to RTMR3 after all events: RTMR = SHA-384(RTMR || digest), from zero."""
        registers = [bytes(48)] * 4
        for event in self.events:
            registers[event.register] = event.extended(registers[event.register])
        first, second, third, fourth = registers
        return first, second, third, fourth


def parse(raw: bytes) -> EventLog:
    """The log in an area that FF or zero bytes may fill up; MalformedError `eventlog.malformed` for anything else."""
    if len(raw) > MAX_LOG_BYTES:
        raise _refused(f"longer than {MAX_LOG_BYTES} bytes")
    at, sizes = _header(raw)
    events: list[Event] = []
    while raw[at : at + 4] not in (_END, b"", bytes(4)):
        if len(events) == MAX_EVENTS:
            raise _refused(f"more than {MAX_EVENTS} events")
        event, at = _event(raw, at, sizes)
        events.append(event)
    if raw[at:].strip(b"\xff") and raw[at:].strip(b"\0"):
        raise _refused(f"something follows the last event at byte {at}")
    return EventLog(tuple(events), at)


def _header(raw: bytes) -> tuple[int, dict[int, int]]:
    """(where the events start, size of a digest by algorithm) from the specification id event."""
    register, kind, _, size = _unpack(_FIRST, raw, 0)
    body = _cut(raw, _FIRST.size, size)
    signature, _, _, _, _, _, count = _unpack(_SPEC, body, 0)
    if signature != _SPEC_ID or kind != NO_ACTION or register not in (0, 1):
        raise _refused("it does not start with the specification id event")
    if not 1 <= count <= 8:
        raise _refused(f"{count} digest algorithms")
    rows = [_unpack(_ALGORITHM, body, _SPEC.size + i * _ALGORITHM.size) for i in range(count)]
    end = _SPEC.size + count * _ALGORITHM.size
    vendor = _cut(body, end, 1)[0]
    if end + 1 + vendor != len(body) or dict(rows).get(SHA384) != 48 or len(dict(rows)) != count:
        raise _refused("the specification id event is not whole, or has no SHA-384")
    return _FIRST.size + size, {int(algorithm): int(width) for algorithm, width in rows}


def _event(raw: bytes, at: int, sizes: Mapping[int, int]) -> tuple[Event, int]:
    register, kind, count = _unpack(_EVENT, raw, at)
    if not 1 <= register <= 4 or count != len(sizes):
        raise _refused(f"register {register} with {count} digests at byte {at}")
    at += _EVENT.size
    digests: dict[int, bytes] = {}
    for _ in range(count):
        algorithm = int.from_bytes(_cut(raw, at, 2), "little")
        if algorithm not in sizes or algorithm in digests:
            raise _refused(f"digest algorithm {algorithm:#x} at byte {at}")
        digests[algorithm] = _cut(raw, at + 2, sizes[algorithm])
        at += 2 + sizes[algorithm]
    size = int.from_bytes(_cut(raw, at, 4), "little")
    return Event(register - 1, kind, digests[SHA384], _cut(raw, at + 4, size)), at + 4 + size


def _unpack(form: struct.Struct, raw: bytes, at: int) -> tuple[Any, ...]:
    return form.unpack(_cut(raw, at, form.size))


def _cut(raw: bytes, at: int, size: int) -> bytes:
    if size > len(raw) - at:
        raise _refused(f"{size} bytes at {at} run past the end")
    return raw[at : at + size]


def _refused(why: str) -> MalformedError:
    return MalformedError("not a CCEL event log", id="eventlog.malformed", got=why)
