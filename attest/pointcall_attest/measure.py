"""Expected measurements, and why a real one differs. The launch digest comes from the `sev-snp-measure` package.

A digest alone says only "different". Here a mismatch is told: which single change of the launch would give the value
that was seen, or at which event a boot took another turn. Reads the files it is given; no network, no trust.
Spec: docs/spec/evidence.md, section Measurements.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from pointcall_attest.errors import AttestError, MalformedError
from pointcall_attest.eventlog import EventLog

MAX_VCPUS: Final = 512
# What the package raises for images that it does not like; it asserts on its input.
_LIBRARY_ERRORS: Final = (ValueError, LookupError, TypeError, RuntimeError, AssertionError, struct.error)
_TRIED_VCPUS: Final = (*range(1, 65), 96, 128, 192, 256)
_TRIED_FEATURES: Final = (0x1, 0x5, 0x15, 0x21, 0x25)  # SNP, with restricted or alternate injection, with debug swap


class MeasureError(AttestError):
    """A measurement cannot be computed here."""

    id = "measure.unavailable"


@dataclass(frozen=True, slots=True)
class Launch:
    """What determines an SNP launch digest under QEMU. `kernel` and so on only for a measured direct boot."""

    ovmf: Path
    vcpus: int = 1
    vcpu_type: str = "EPYC-v4"
    guest_features: int = 1
    kernel: Path | None = None
    initrd: Path | None = None
    append: str | None = None
    vmm: str = "QEMU"


@dataclass(frozen=True, slots=True)
class Explanation:
    """`matches`, or the single changes that would give the value that was seen; none found is an answer too."""

    expected: str
    observed: str
    matches: bool
    reasons: tuple[str, ...]


def launch_digest(launch: Launch) -> bytes:
    """48 bytes; MeasureError without the package, MalformedError `measure.malformed` for files it cannot read."""
    try:
        guest, vcpu_types, vmm_types = (
            importlib.import_module(f"sevsnpmeasure.{name}") for name in ("guest", "vcpu_types", "vmm_types")
        )
    except ImportError:
        raise MeasureError(
            "launch digests need the package sev-snp-measure", hint="pip install 'pointcall[measure]'"
        ) from None
    signatures: dict[str, int] = vcpu_types.CPU_SIGS
    if launch.vcpu_type not in signatures or not 1 <= launch.vcpus <= MAX_VCPUS:
        raise _refused(f"{launch.vcpus} vCPUs of type {launch.vcpu_type}; types: {', '.join(signatures)}")
    if launch.vmm not in vmm_types.VMMType.__members__:
        raise _refused(f"VMM {launch.vmm}; known: {', '.join(vmm_types.VMMType.__members__)}")
    try:
        digest: bytes = guest.snp_calc_launch_digest(
            launch.vcpus,
            signatures[launch.vcpu_type],
            str(launch.ovmf),
            str(launch.kernel) if launch.kernel else None,
            str(launch.initrd) if launch.initrd else None,
            launch.append,
            launch.guest_features,
            "",
            vmm_types.VMMType[launch.vmm],
        )
    except _LIBRARY_ERRORS as error:
        raise _refused(f"{type(error).__name__}: {error}") from None
    return digest


def explain_launch(launch: Launch, observed: bytes) -> Explanation:
    """Whether a launch gives the observed digest, and if not, which one change of it would."""
    expected = launch_digest(launch)
    if expected == observed:
        return Explanation(expected.hex(), observed.hex(), True, ())
    reasons = tuple(why for why, other in _one_change(launch) if launch_digest(other) == observed)
    none = "no single change of vCPUs, vCPU type, guest features or command line gives it: other firmware or kernel"
    return Explanation(expected.hex(), observed.hex(), False, reasons or (none,))


def _one_change(launch: Launch) -> Iterator[tuple[str, Launch]]:
    for count in _TRIED_VCPUS:
        yield f"vcpus is {count}, not {launch.vcpus}", replace(launch, vcpus=count)
    for kind in ("EPYC-v4", "EPYC-Rome", "EPYC-Milan", "EPYC-Genoa", "EPYC-Turin"):
        yield f"vcpu_type is {kind}, not {launch.vcpu_type}", replace(launch, vcpu_type=kind)
    for features in _TRIED_FEATURES:
        yield (
            f"guest_features is {features:#x}, not {launch.guest_features:#x}",
            replace(launch, guest_features=features),
        )
    if launch.kernel is not None:
        yield "the kernel was not measured", replace(launch, kernel=None, initrd=None, append=None)
        yield "the initrd was not there", replace(launch, initrd=None)
        if launch.append:
            yield "the command line was empty", replace(launch, append=None)
            stripped = launch.append.strip()
            yield "the command line had no space around it", replace(launch, append=stripped)
            yield "the command line ended with a newline", replace(launch, append=stripped + "\n")


def explain_registers(log: EventLog, registers: tuple[bytes, bytes, bytes, bytes]) -> tuple[Explanation, ...]:
    """For each RTMR whether the log explains it, and if not, after how many of its events it would."""
    return tuple(
        _explain_register(log, index, want, observed)
        for index, (want, observed) in enumerate(zip(log.replay(), registers, strict=True))
    )


def _explain_register(log: EventLog, index: int, want: bytes, observed: bytes) -> Explanation:
    if want == observed:
        return Explanation(want.hex(), observed.hex(), True, ())
    events, value = [event for event in log.events if event.register == index], bytes(48)
    for count, event in enumerate(events):
        if value == observed:
            why = f"the register stops after {count} of {len(events)} events; the next is {event.type_name}"
            return Explanation(want.hex(), observed.hex(), False, (why,))
        value = event.extended(value)
    why = f"none of the {len(events)} events of the log leads there: another boot, or events that are not in the log"
    return Explanation(want.hex(), observed.hex(), False, (why,))


def explain_logs(reference: EventLog, seen: EventLog) -> tuple[str, ...]:
    """Where two boots part, register by register: the first event that differs."""
    found = []
    for index in range(4):
        ours, theirs = ([e for e in log.events if e.register == index] for log in (reference, seen))
        for at, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            if (a.type, a.digest) != (b.type, b.digest):
                found.append(
                    f"RTMR{index} event {at}: {a.type_name} {a.digest.hex()} became {b.type_name} {b.digest.hex()}"
                )
                break
        else:
            if len(ours) != len(theirs):
                found.append(f"RTMR{index}: {len(ours)} events became {len(theirs)}")
    return tuple(found)


def described(log: EventLog) -> list[dict[str, Any]]:
    """Every event, readable."""
    return [
        {"rtmr": event.register, "type": event.type_name, "digest": event.digest.hex(), "bytes": len(event.data)}
        for event in log.events
    ]


def _refused(why: str) -> MalformedError:
    return MalformedError("the launch cannot be measured", id="measure.malformed", got=why)
