"""bytes <-> Report: exact length, known values only, every reserved byte zero, and the same bytes back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointcall_attest import snp
from pointcall_attest.errors import MalformedError
from pointcall_attest.layout import Field, Layout

GOOD = {"version": 3, "policy": 0x3_0000, "signature_algo": 1, "cpuid_family": 0x19, "cpuid_model": 1}
RESERVED = [row.offset + i for row in snp.LAYOUT.rows if not row.name for i in range(row.size)]


def test_layout_refuses_a_gap() -> None:
    with pytest.raises(AssertionError, match="gap or overlap"):
        Layout("x", 8, (Field(0, 4, "a"), Field(5, 3, "b")), length_id="", reserved_id="")
    with pytest.raises(AssertionError, match="rows end"):
        Layout("x", 9, (Field(0, 4, "a"), Field(4, 4, "b")), length_id="", reserved_id="")


def test_reserved_rows_are_those_of_the_specification() -> None:
    assert len(RESERVED) == 4 + 21 + 1 + 1 + 152 + 24 + 24 + 368


@pytest.mark.parametrize("at", RESERVED)
def test_every_reserved_byte_is_refused(at: int) -> None:
    raw = bytearray(snp.encode(GOOD))
    raw[at] = 1
    with pytest.raises(MalformedError) as refusal:
        snp.parse(bytes(raw))
    assert refusal.value.id == "snp.reserved.malformed"


@pytest.mark.parametrize("size", [0, 1, 1183, 1185, 2368])
def test_every_other_length_is_refused(size: int) -> None:
    raw = snp.encode(GOOD).ljust(size, b"\0")[:size]
    with pytest.raises(MalformedError) as refusal:
        snp.parse(raw)
    assert refusal.value.id == "snp.length.malformed"


@pytest.mark.parametrize(
    ("change", "id"),
    [
        *(({"version": v}, "snp.version.malformed") for v in (0, 1, 4, 6, 0xFFFFFFFF)),
        ({"signature_algo": 0}, "snp.algorithm.malformed"),
        ({"signature_algo": 2}, "snp.algorithm.malformed"),
        ({"vmpl": 4}, "snp.vmpl.malformed"),
        ({"vmpl": 0xFFFFFFFE}, "snp.vmpl.malformed"),
        ({"policy": 0x1_0000}, "snp.policy.malformed"),
        ({"policy": 0x3_0000 | 1 << 26}, "snp.policy.malformed"),
        ({"policy": 0x3_0000 | 1 << 63}, "snp.policy.malformed"),
        *(({"key_info": k << 2}, "snp.key_info.malformed") for k in (2, 3, 4, 5, 6)),
        ({"key_info": 1 << 5}, "snp.key_info.malformed"),
        ({"version": 2}, "snp.reserved.malformed"),
        ({"launch_mit_vector": 1}, "snp.reserved.malformed"),
        ({"current_mit_vector": 1}, "snp.reserved.malformed"),
        *(
            ({name: bytes((0, 0, 1, 0, 0, 0, 0, 0))}, "snp.tcb.malformed")
            for name in ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb")
        ),
    ],
)
def test_one_unknown_value_is_refused_for_its_reason(change: dict[str, int | bytes], id: str) -> None:
    snp.parse(snp.encode(GOOD))
    with pytest.raises(MalformedError) as refusal:
        snp.parse(snp.encode(GOOD | change))
    assert refusal.value.id == id


@pytest.mark.parametrize("version", [2, 3, 5])
def test_every_known_version_parses(version: int) -> None:
    cpuid = {} if version == 2 else {"cpuid_family": 0x1A, "cpuid_model": 2}
    mitigations = {"launch_mit_vector": 3, "current_mit_vector": 7} if version == 5 else {}
    report = snp.parse(
        snp.encode({"version": version, "policy": 0x2_0000, "signature_algo": 1, **cpuid, **mitigations})
    )
    assert (report.version, report.line) == (version, None if version == 2 else "Turin")


@pytest.mark.parametrize(
    ("family", "model", "line"),
    [
        (0x19, 0x00, "Milan"),
        (0x19, 0x0F, "Milan"),
        (0x19, 0x10, "Genoa"),
        (0x19, 0x1F, "Genoa"),
        (0x19, 0x20, None),
        (0x19, 0x9F, None),
        (0x19, 0xA0, "Genoa"),
        (0x19, 0xAF, "Genoa"),
        (0x19, 0xB0, None),
        (0x1A, 0x00, "Turin"),
        (0x1A, 0x11, "Turin"),
        (0x1A, 0x12, None),
        (0x1A, 0x4F, None),
        (0x1A, 0x50, "Venice"),
        (0x1A, 0x57, "Venice"),
        (0x1A, 0x58, None),
        (0x1A, 0x90, "Venice"),
        (0x1A, 0xAF, "Venice"),
        (0x1A, 0xB0, None),
        (0x1A, 0xC7, "Venice"),
        (0x1A, 0xC8, None),
        (0x18, 0x01, None),
        (0x1B, 0x01, None),
    ],
)
def test_product_line_by_cpuid(family: int, model: int, line: str | None) -> None:
    assert snp.line_of(family, model) == line


parts = st.integers(0, 255)


@given(st.sampled_from(["Milan", "Genoa", "Turin", "Venice"]), parts, parts, parts, parts, parts)
def test_tcb_survives_the_round_trip(line: str, fmc: int, bl: int, tee: int, svn: int, ucode: int) -> None:
    tcb = snp.Tcb(fmc if line in ("Turin", "Venice") else 0, bl, tee, svn, ucode)
    assert snp.tcb_of(line, snp.tcb_bytes(line, tcb)) == tcb  # type: ignore[arg-type]


@pytest.mark.parametrize(("line", "reserved"), [("Milan", (2, 3, 4, 5)), ("Turin", (4, 5, 6))])
def test_reserved_bytes_of_a_tcb_are_refused(line: str, reserved: tuple[int, ...]) -> None:
    for at in range(8):
        raw = bytes(int(i == at) for i in range(8))
        if at in reserved:
            with pytest.raises(MalformedError):
                snp.tcb_of(line, raw)  # type: ignore[arg-type]
        else:
            snp.tcb_of(line, raw)  # type: ignore[arg-type]


def test_tcb_is_compared_part_by_part() -> None:
    assert snp.Tcb(0, 4, 0, 24, 219).at_least(snp.Tcb(0, 4, 0, 24, 219))
    assert not snp.Tcb(0, 3, 9, 99, 255).at_least(snp.Tcb(0, 4, 0, 24, 219))


@given(st.binary(max_size=1400))
def test_any_bytes_parse_or_are_refused(raw: bytes) -> None:
    try:
        snp.parse(raw)
    except MalformedError:
        return


values = {
    row.name: st.integers(0, (1 << 8 * row.size) - 1)
    if row.integer
    else st.binary(min_size=row.size, max_size=row.size)
    for row in snp.LAYOUT.rows
    if row.name
}


@given(st.fixed_dictionaries(values))
def test_reading_what_was_written_gives_the_same_values(fields: dict[str, int | bytes]) -> None:
    assert dict(zip(snp.LAYOUT.names, snp.LAYOUT.read(snp.encode(fields)), strict=True)) == fields
