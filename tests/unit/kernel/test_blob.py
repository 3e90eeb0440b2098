"""The blob format: one form in, one form out, and nothing but BlobError for anything else."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointcall_executor.kernel.blob import MAX_BLOB_BYTES, Blob, Constant, Program
from pointcall_executor.kernel.errors import BlobError

GOOD = Blob(
    name="sample",
    maps=("events", "counters", "rodata"),
    programs=(Program("pc_gate", "cgroup/connect4"), Program("pc_see", "tp_btf/inet_sock_set_state")),
    initial=bytes([5, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]),
    constants=(Constant("threshold", 0, 4), Constant("window_us", 8, 8)),
    data=b"data" * 3,
    insns=bytes(16),
)
RAW = GOOD.encode()
PREFIX = 32


def with_header(change: dict[str, object]) -> bytes:
    """The good file with parts of its JSON header replaced, lengths right."""
    length = int.from_bytes(RAW[16:20], "little")
    value = json.loads(RAW[PREFIX : PREFIX + length]) | change
    header = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return RAW[:16] + len(header).to_bytes(4, "little") + RAW[20:PREFIX] + header + RAW[PREFIX + length :]


def test_what_is_encoded_is_parsed() -> None:
    assert Blob.parse(RAW) == GOOD
    assert GOOD.defaults == {"threshold": 5, "window_us": 9}


names = st.from_regex(r"[a-z_][a-z0-9_]{0,10}", fullmatch=True)


@given(
    name=names,
    maps=st.lists(names.filter(lambda n: n != "rodata"), max_size=5, unique=True),
    programs=st.lists(
        st.tuples(names, st.sampled_from(["syscall", "cgroup/connect6"])),
        min_size=1,
        unique_by=lambda p: p[0],
        max_size=5,
    ),
    data=st.binary(max_size=200),
    insns=st.integers(1, 9),
)
@settings(max_examples=50, deadline=None)
def test_any_blob_survives_the_round_trip(
    name: str, maps: list[str], programs: list[tuple[str, str]], data: bytes, insns: int
) -> None:
    blob = Blob(name, tuple(maps), tuple(Program(*p) for p in programs), b"", (), data, bytes(8 * insns))
    assert Blob.parse(blob.encode()) == blob


@pytest.mark.parametrize("cut", range(len(RAW)))
def test_every_truncation_is_refused(cut: int) -> None:
    with pytest.raises(BlobError):
        Blob.parse(RAW[:cut])


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Upper"},
        {"name": 1},
        {"extra": 1},
        {"maps": ["events", "events", "rodata"]},
        {"maps": ["events", "counters"]},
        {"maps": "events"},
        {"maps": [f"m{i}" for i in range(65)]},
        {"programs": []},
        {"programs": [["pc_gate", "cgroup/connect4 "]]},
        {"programs": [["pc_gate", 4]]},
        {"programs": [["a_name_of_fifteen", "syscall"], ["a_name_of_fifteen_more", "syscall"]]},
        {"constants": {"fields": [], "initial": "0g"}},
        {"constants": {"fields": [["threshold", 2, 4]], "initial": "00" * 16}},
        {"constants": {"fields": [["threshold", 16, 4]], "initial": "00" * 16}},
        {"constants": {"fields": [["threshold", -4, 4]], "initial": "00" * 16}},
        {"constants": {"fields": [["threshold", 0, 3]], "initial": "00" * 16}},
        {"constants": {"fields": [["threshold", True, 4]], "initial": "00" * 16}},
        {"constants": {"fields": [["t", 0, 4], ["t", 4, 4]], "initial": "00" * 16}},
    ],
)
def test_one_wrong_field_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BlobError) as refused:
        Blob.parse(with_header(change))
    assert refused.value.id == "kernel.blob.malformed"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 64,
        RAW + b"\0",
        RAW[:28] + b"\1\0\0\0" + RAW[32:],
        RAW.replace(b'"maps":', b'"maps": '),
        RAW.replace(b'"name"', b'"nnme"'),
        bytes(MAX_BLOB_BYTES + 1),
    ],
)
def test_other_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(BlobError):
        Blob.parse(raw)


def test_a_second_spelling_of_the_same_header_is_refused() -> None:
    length = int.from_bytes(RAW[16:20], "little")
    header = RAW[PREFIX : PREFIX + length].replace(b"sample", b"\\u0073ample")
    raw = RAW[:16] + len(header).to_bytes(4, "little") + RAW[20:PREFIX] + header + RAW[PREFIX + length :]
    with pytest.raises(BlobError, match="canonical"):
        Blob.parse(raw)


@given(at=st.integers(0, len(RAW) - 1), bit=st.integers(0, 7))
@settings(max_examples=300, deadline=None)
def test_a_flipped_bit_changes_the_digest_or_is_refused(at: int, bit: int) -> None:
    raw = bytearray(RAW)
    raw[at] ^= 1 << bit
    try:
        blob = Blob.parse(bytes(raw))
    except BlobError:
        return
    assert blob.sha256 != GOOD.sha256
    assert blob.encode() == bytes(raw)


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_noise_raises_nothing_but_a_blob_error(noise: bytes) -> None:
    for raw in (noise, RAW[:PREFIX] + noise, RAW[:16] + noise):
        try:
            Blob.parse(raw)
        except BlobError:
            continue


def test_constants_are_patched_in_place() -> None:
    image = GOOD.with_constants({"threshold": 0x01020304, "window_us": 2**64 - 1})
    assert image == bytes([4, 3, 2, 1, 0, 0, 0, 0]) + b"\xff" * 8


@pytest.mark.parametrize("values", [{"nope": 1}, {"threshold": 2**32}, {"threshold": -1}])
def test_a_constant_that_does_not_fit_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(BlobError) as refused:
        GOOD.with_constants(values)
    assert refused.value.id == "kernel.blob.constant"


def test_a_blob_is_a_value() -> None:
    assert dataclasses.replace(GOOD, data=b"x").sha256 != GOOD.sha256
