"""The 56-byte record: the Python layout is the C header's, and every field survives."""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointcall_executor.core import breaker as model
from pointcall_executor.core.event import (
    CIRCUIT,
    PRESSURE,
    PROCESS,
    RECORD,
    STORAGE,
    STUCK,
    SYSCALL,
    TRANSPORT,
    CircuitEvent,
    Destination,
    EventError,
    KernelEvent,
    Kind,
    PressureEvent,
    ProcessEvent,
    Source,
    StorageEvent,
    StuckEvent,
    SyscallEvent,
    TransportEvent,
    decode,
    encode,
)
from pointcall_executor.kernel import bpf, storage
from pointcall_executor.kernel import breaker as sensor
from pointcall_executor.kernel.sensor import COUNTERS
from pointcall_runbook.vocabulary import Address, Operation, Resource

BPF = Path(__file__).resolve().parents[3] / "bpf"
U16, U32, U64 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)

FIELDS = {  # C expression -> (struct of ours, index of the field)
    "pointcall_event": (RECORD, ["at_ns", "kind", "flags", "pid", "cgroup", "circuit"]),
    "pointcall_circuit_event": (
        CIRCUIT,
        ["address", "netns", "port", "protocol", "pad", "failures", "error"],
    ),
    "pointcall_process_event": (PROCESS, ["code", "pad", "life_ns", "comm"]),
    "pointcall_transport_event": (
        TRANSPORT,
        ["address", "netns", "port", "protocol", "pad", "count", "attempts"],
    ),
    "pointcall_storage_event": (
        STORAGE,
        ["device", "operation", "operations", "slow", "errors", "source", "longest_ns"],
    ),
    "pointcall_syscall_event": (SYSCALL, ["number", "result", "errors", "calls", "pad"]),
    "pointcall_stuck_event": (STUCK, ["address", "open_for_ns", "port", "protocol", "pad", "probes"]),
    "pointcall_pressure_event": (PRESSURE, ["resource", "pad", "stalled_ns", "window_ns", "pad2"]),
    "pointcall_destination": (sensor.KEY, ["address", "netns", "port", "protocol"]),
    "pointcall_command": (sensor.COMMAND, ["destination", "until_us", "before", "after", "op"]),
    "pointcall_counters": (COUNTERS, ["events", "lost"]),
    "pc_latency_key": (storage.KEY, ["cgroup", "device", "operation"]),
    "pc_latency": (
        storage.VALUE,
        ["since", "count", "slow", "longest", "errors", "fired", "total",
         *[f"bucket[{i}]" for i in range(storage.BUCKETS)]],
    ),
    "pc_started": (storage.STARTED, ["at_ns", "key.cgroup", "key.device", "key.operation"]),
    "pc_question": (storage.QUESTION, ["id", "at_ns"]),
    "pointcall_circuit": (
        sensor.VALUE,
        ["word", *[f"probe[{i}]" for i in range(8)], "attempts", "t_seen_ns", "t_open_ns", "t_refused_ns", "failures",
         "successes", "opened", "refused", "probes", "closed", "ignored", "threshold", "percent", "refuse_errno",
         "flags", "window_ms", "cooldown_ms", "min_attempts", "pad"],
    ),
}  # fmt: skip
ENUMS = {
    **{f"POINTCALL_{kind.name}": kind.value for kind in Kind},
    **{f"POINTCALL_{flag.name}": flag.value for flag in sensor.Flag},
    **{f"POINTCALL_{command.name}": command.value for command in sensor.Command},
    **{f"POINTCALL_{operation.name}": operation.value for operation in Operation},
    **{f"POINTCALL_SOURCE_{source.name}": source.value for source in Source},
    **{f"PC_{answer.name}": answer.value for answer in storage.Answer},
    **{f"PC_{state.name}": state.value for state in model.State},
    "offsetof(struct bpf_prog_info,recursion_misses)": bpf.MISSED_AT,
    "PC_TIME_MASK": model.TIME_MASK,
    "PC_COUNT_MAX": model.COUNT_MAX,
    "PC_STREAK_MAX": model.STREAK_MAX,
    "PC_PROBES_MAX": model.PROBES_MAX,
}


@pytest.fixture(scope="module")
def c_says(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Sizes, offsets and enumerators, from a C compiler over the real headers."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: cc")
    questions = [f"sizeof(struct {name})" for name in FIELDS]
    questions += [f"offsetof(struct {name},{field})" for name, (_, fields) in FIELDS.items() for field in fields]
    questions += list(ENUMS)
    folder = tmp_path_factory.mktemp("layout")
    lines = "\n".join(f'printf("%s=%llu\\n", "{q}", (unsigned long long)({q}));' for q in questions)
    (folder / "ask.c").write_text(
        "#include <linux/bpf.h>\n#include <linux/types.h>\n#include <stddef.h>\n#include <stdio.h>\n"
        f'#include "event.h"\n#include "circuit.h"\n#include "operation.h"\nint main(void) {{\n{lines}\nreturn 0; }}\n'
    )
    subprocess.run(["cc", f"-I{BPF}", "-o", folder / "ask", folder / "ask.c"], check=True)
    answer = subprocess.run([folder / "ask"], check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, _, value in (line.partition("=") for line in answer.splitlines())}


def offsets(layout: struct.Struct) -> list[int]:
    """Where each field of a struct format begins; pad bytes belong to the field before."""
    found, at, digits = [], 0, ""
    for code in layout.format.lstrip("<"):
        if code.isdigit():
            digits += code
            continue
        count, digits = int(digits or 1), ""
        size = struct.calcsize(f"<{code}")
        if code == "x":
            at += count
        elif code == "s":
            found.append(at)
            at += count
        else:
            found += [at + i * size for i in range(count)]
            at += count * size
    return found


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_layouts_are_those_of_the_c_headers(c_says: dict[str, int], name: str) -> None:
    layout, fields = FIELDS[name]
    assert layout.size == c_says[f"sizeof(struct {name})"]
    assert offsets(layout) == [c_says[f"offsetof(struct {name},{field})"] for field in fields]


def test_enumerators_are_those_of_the_c_headers(c_says: dict[str, int]) -> None:
    assert {name: c_says[name] for name in ENUMS} == ENUMS


def test_no_kind_of_the_header_is_unknown_here() -> None:
    header = (BPF / "event.h").read_text()
    body = header[header.index("enum pointcall_event_kind") :].split("}")[0]
    names = {word.strip().split(" ")[0].removeprefix("POINTCALL_") for word in body.splitlines() if "=" in word}
    assert names == {kind.name for kind in Kind}


destinations = st.builds(
    Destination, st.builds(Address, U64, U64), port=U16, netns=U64, protocol=st.sampled_from([6, 17])
)
circuits = st.builds(
    CircuitEvent,
    kind=st.sampled_from([k for k in Kind if k < Kind.CIRCUIT_STUCK]),
    at_ns=U64, destination=destinations, failures=U16, error=U16, pid=U32, cgroup=U64,
)  # fmt: skip


@given(circuits)
@settings(deadline=None)
def test_circuit_events_survive(event: CircuitEvent) -> None:
    assert decode(encode(event)) == event


detections = st.one_of(
    st.builds(
        TransportEvent, st.sampled_from([Kind.RESETS, Kind.RETRANSMITS, Kind.CONNECT_SLOW]), U64, destinations, U16, U16
    ),
    st.builds(
        StorageEvent,
        st.sampled_from([Kind.STORAGE_SLOW, Kind.DISK_ERROR]),
        U64,
        U64,
        U32,
        st.sampled_from(Operation),
        U32,
        U32,
        U32,
        st.sampled_from(Source),
        U64,
    ),
    st.builds(
        SyscallEvent,
        st.sampled_from([Kind.SYSCALL_NOVEL, Kind.SYSCALL_ERRORS]),
        U64,
        U32,
        U64,
        U32,
        st.integers(-(2**31), 2**31 - 1),
        U64,
        U64,
    ),
    st.builds(
        StuckEvent,
        st.just(Kind.CIRCUIT_STUCK),
        U64,
        st.builds(Destination, st.builds(Address, U64, U64), port=U16, protocol=st.sampled_from([6, 17])),
        U64,
        U32,
    ),
    st.builds(PressureEvent, st.just(Kind.PRESSURE), U64, U64, st.sampled_from(Resource), U64, U64),
)


@given(detections)
@settings(deadline=None)
def test_detections_survive(event: KernelEvent) -> None:
    assert decode(encode(event)) == event


@given(comm=st.binary(max_size=15).filter(lambda b: 0 not in b), code=U32, life=U64, victim=st.booleans())
@settings(deadline=None)
def test_process_records_are_read_and_written_back(comm: bytes, code: int, life: int, victim: bool) -> None:
    kind = Kind.OOM_VICTIM if victim else Kind.PROCESS_EXIT
    raw = RECORD.pack(1, kind, 0, 7, 9, PROCESS.pack(code, 0, life, comm))
    event = decode(raw)
    assert isinstance(event, ProcessEvent)
    assert event.comm.isascii()
    assert event.comm.isprintable()
    assert (event.memory_cgroup, event.life_ns) == ((life, 0) if victim else (0, life))
    assert encode(event) == raw


def test_exit_codes_are_split_as_wait_does() -> None:
    event = decode(RECORD.pack(1, Kind.PROCESS_EXIT, 0, 7, 9, PROCESS.pack(3 << 8, 0, 1, b"sh")))
    assert isinstance(event, ProcessEvent)
    assert (event.signal, event.status) == (0, 3)
    event = decode(RECORD.pack(1, Kind.PROCESS_EXIT, 0, 7, 9, PROCESS.pack(9, 0, 1, b"sh")))
    assert isinstance(event, ProcessEvent)
    assert (event.signal, event.status) == (9, 0)


BAD_DETECTIONS = {
    "operation": RECORD.pack(1, 32, 0, 0, 0, STORAGE.pack(0, 4, 0, 0, 0, 0, 0)),
    "storage source": RECORD.pack(1, 32, 0, 0, 0, STORAGE.pack(0, 0, 0, 0, 0, 4, 0)),
    "stuck pad": RECORD.pack(1, 6, 0, 0, 0, STUCK.pack(bytes(16), 0, 0, 6, 1, 0)),
    "resource": RECORD.pack(1, 48, 0, 0, 0, PRESSURE.pack(3, 0, 0, 0, 0)),
    "pressure pad": RECORD.pack(1, 48, 0, 0, 0, PRESSURE.pack(0, 1, 0, 0, 0)),
    "pressure pad2": RECORD.pack(1, 48, 0, 0, 0, PRESSURE.pack(0, 0, 0, 0, 1)),
    "syscall pad": RECORD.pack(1, 40, 0, 0, 0, SYSCALL.pack(0, 0, 0, 0, 1)),
    "transport pad": RECORD.pack(1, 24, 0, 0, 0, TRANSPORT.pack(bytes(16), 0, 0, 6, 1, 0, 0)),
    "short": bytes(55),
}


@pytest.mark.parametrize("name", sorted(BAD_DETECTIONS))
def test_a_detectors_record_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(EventError):
        decode(BAD_DETECTIONS[name])


BAD = {
    "short": bytes(55),
    "long": bytes(57),
    "kind": RECORD.pack(1, 99, 0, 0, 0, bytes(32)),
    "flags": RECORD.pack(1, 1, 1, 0, 0, bytes(32)),
    "protocol": RECORD.pack(1, 1, 0, 0, 0, CIRCUIT.pack(bytes(16), 0, 0, 7, 0, 0, 0)),
    "circuit pad": RECORD.pack(1, 1, 0, 0, 0, CIRCUIT.pack(bytes(16), 0, 0, 6, 1, 0, 0)),
    "process pad": RECORD.pack(1, 17, 0, 0, 0, PROCESS.pack(0, 1, 0, b"")),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_record_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(EventError) as refused:
        decode(BAD[name])
    assert refused.value.id == "kernel.event.malformed"


@given(st.binary(min_size=56, max_size=56))
@settings(max_examples=300, deadline=None)
def test_noise_raises_nothing_but_an_event_error(noise: bytes) -> None:
    for head in (noise[8:12], *(struct.pack("<HH", kind, 0) for kind in Kind)):
        with contextlib.suppress(EventError):
            decode(noise[:8] + head + noise[12:])
