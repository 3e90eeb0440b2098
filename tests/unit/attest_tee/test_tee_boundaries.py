"""Every number of the formats from both sides: the last that is taken and the first that is not."""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from pointcall_attest import (
    cert_table,
    certificate_file,
    certs,
    collateral,
    crl,
    der,
    emulated,
    emulated_tdx,
    eventlog,
    evidence,
    hcl,
    pck,
    snp,
    snp_chain,
    snp_rules,
    tdx,
    tdx_rules,
    tee_policy,
    trust,
)
from pointcall_attest.appraise import appraise, appraise_bundle, parse, verify
from pointcall_attest.emulated import EmulatedSnp
from pointcall_attest.emulated_tdx import EmulatedTdx
from pointcall_attest.errors import MalformedError
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.layout import Field, Layout
from pointcall_attest.tee_policy import TeePolicy
from pointcall_attest.trust import Roots

Machine = Callable[..., EmulatedSnp]
TdxMachine = Callable[..., EmulatedTdx]
GOOD = {"version": 3, "policy": 0x2_0000, "signature_algo": 1, "cpuid_family": 0x19, "cpuid_model": 1}


def refused(call: Callable[[], object]) -> MalformedError:
    with pytest.raises(MalformedError) as raised:
        call()
    return raised.value


# ---- DER


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 129, 254, 255, 256, 257, 65_534, 65_535])
def test_lengths_around_each_form(size: int) -> None:
    """Written and read back; the reader takes the shortest form and stops at its end."""
    content = b"x" * size
    short, one, two = bytes((4, size & 0x7F)), bytes((4, 0x81, size & 0xFF)), b"\x04\x82" + size.to_bytes(2, "big")
    right = short if size < 128 else one if size < 256 else two
    raw = right + content
    assert der.write(der.OCTET_STRING, content) == raw
    reader = der.Reader(raw + b"\x05\x00")
    assert (reader.value(der.OCTET_STRING), reader.peek()) == (content, 5)
    for head in {two, b"\x04\x83" + size.to_bytes(3, "big"), *([one] if size < 256 else [])} - {right}:
        refused(lambda head=head: der.Reader(head + content).value(der.OCTET_STRING))  # type: ignore[misc]
    assert "runs past its end" in refused(lambda: der.Reader(raw[:-1]).value(4)).message or size == 0


def test_lengths_of_three_bytes_and_more() -> None:
    size = 65_536
    assert len(der.Reader(b"\x04\x83\x01\x00\x00" + bytes(size)).value(4)) == size
    refused(lambda: der.Reader(b"\x04\x84\x00\x01\x00\x00" + bytes(size)).value(4))
    refused(lambda: der.Reader(b"\x04\x83\x01\x00").value(4))
    refused(lambda: der.Reader(b"\x04\x80\x00\x00").value(4))
    refused(lambda: der.Reader(b"\x04\xff" + bytes(200)).value(4))
    with pytest.raises(AssertionError):
        der.write(4, bytes(size))


def test_a_reader_stops_where_it_was_told_to() -> None:
    raw = b"\x04\x02ab\x04\x01c"
    assert der.Reader(raw, 4).value(4) == b"c"
    assert der.Reader(raw, 0, 4).value(4) == b"ab"
    for start, end in ((0, 3), (0, 1), (0, 0), (4, 6), (4, 5)):
        refused(lambda start=start, end=end: der.Reader(raw, start, end).value(4))  # type: ignore[misc]
    assert "5 at byte 0" in refused(lambda: der.Reader(b"\x05\x00").value(4)).got
    assert "None at byte 0" in refused(lambda: der.Reader(b"").value(4)).got


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("020100", 0),
        ("020101", 1),
        ("02017f", 127),
        ("02020080", 128),
        ("020200ff", 255),
        ("02020100", 256),
        ("0200", None),
        ("020180", None),
        ("0201ff", None),
        ("02028000", None),
        ("02020000", None),
        ("0202007f", None),
    ],
)
def test_integers_around_each_form(raw: str, value: int | None) -> None:
    if value is None:
        assert "shortest form" in refused(lambda: der.Reader(bytes.fromhex(raw)).integer()).message
    else:
        assert (der.Reader(bytes.fromhex(raw)).integer(), der.write_integer(value).hex()) == (value, raw)


@pytest.mark.parametrize(
    ("dotted", "raw"),
    [
        ("1.2.840.113549.1.1.10", "06092a864886f70d01010a"),
        ("2.5.29.19", "0603551d13"),
        ("2.25.1", "06026901"),
        ("1.3.6.1.4.1.3704.1.3.9", "060a2b060104019c78010309"),
        ("1.2.127", "06022a7f"),
        ("1.2.128", "06032a8100"),
    ],
)
def test_object_identifiers_as_the_standard_writes_them(dotted: str, raw: str) -> None:
    assert der.write_oid(dotted).hex() == raw


# ---- SNP


def test_every_cpu_has_its_line_or_none() -> None:
    wanted = {
        "Milan": {(0x19, m) for m in range(0x10)},
        "Genoa": {(0x19, m) for m in (*range(0x10, 0x20), *range(0xA0, 0xB0))},
        "Turin": {(0x1A, m) for m in range(0x12)},
        "Venice": {(0x1A, m) for m in (*range(0x50, 0x58), *range(0x90, 0xB0), *range(0xC0, 0xC8))},
    }
    for family in range(0x20):
        for model in range(256):
            line = next((line for line, cpus in wanted.items() if (family, model) in cpus), None)
            assert snp.line_of(family, model) == line


def test_every_bit_has_its_name() -> None:
    names = {
        16: "smt",
        18: "migrate_ma",
        19: "debug",
        20: "single_socket",
        21: "cxl_allow",
        22: "mem_aes_256_xts",
        23: "rapl_dis",
        24: "ciphertext_hiding",
        25: "page_swap_disable",
    }
    for bit in (16, *range(18, 64)):
        raw = snp.encode(GOOD | {"policy": 1 << 17 | 1 << bit})
        if bit > 25:
            assert refused(lambda raw=raw: snp.parse(raw)).id == "snp.policy.malformed"  # type: ignore[misc]
            continue
        rows = snp_rules.described(snp.parse(raw))["policy"]
        assert [name for name, value in rows.items() if value is True] == [names[bit]]
    assert snp_rules.described(snp.parse(snp.encode(GOOD | {"policy": 0x2_0000 | 0xAB << 8 | 0xCD})))["policy"][
        "abi"
    ] == ("171.205")
    platform = {0: "smt_en", 1: "tsme_en", 2: "ecc_en", 3: "rapl_dis"}
    platform |= {4: "ciphertext_hiding_dram", 5: "alias_check_complete", 7: "sev_tio"}
    for bit in range(64):
        rows = snp_rules.described(snp.parse(snp.encode(GOOD | {"platform_info": 1 << bit})))["platform_info"]
        assert [name for name, value in rows.items() if value] == [platform[n] for n in (bit,) if n in platform]


def test_key_info_is_three_fields() -> None:
    for info, author, masked, key in (
        (0, False, False, "VCEK"),
        (1, True, False, "VCEK"),
        (2, False, True, "VCEK"),
        (4, False, False, "VLEK"),
        (5, True, False, "VLEK"),
        (28, False, False, "none"),
        (31, True, True, "none"),
    ):
        report = snp.parse(snp.encode(GOOD | {"key_info": info}))
        assert (report.author_key_en, report.mask_chip_key) == (author, masked)
        assert snp_rules.described(report)["signing_key"] == key
    for bit in range(5, 32):
        assert refused(lambda bit=bit: snp.parse(snp.encode(GOOD | {"key_info": 1 << bit}))).id == (  # type: ignore[misc]
            "snp.key_info.malformed"
        )


@pytest.mark.parametrize(
    "name", ["cpuid_family", "cpuid_model", "cpuid_stepping", "launch_mit_vector", "current_mit_vector"]
)
def test_fields_that_version_2_does_not_have(name: str) -> None:
    old = {"version": 2, "policy": 0x2_0000, "signature_algo": 1}
    assert snp.parse(snp.encode(old)).line is None
    assert refused(lambda: snp.parse(snp.encode(old | {name: 1}))).id == "snp.reserved.malformed"


def test_vmpls_and_versions_around_the_known_ones() -> None:
    for vmpl in range(6):
        raw = snp.encode(GOOD | {"vmpl": vmpl})
        if vmpl < 4:
            assert snp.parse(raw).vmpl == vmpl
        else:
            assert refused(lambda raw=raw: snp.parse(raw)).id == "snp.vmpl.malformed"  # type: ignore[misc]
    assert snp.parse(snp.encode(GOOD | {"vmpl": 0xFFFF_FFFF})).vmpl == 0xFFFF_FFFF


def test_layouts_refuse_names_they_do_not_have() -> None:
    layout = Layout(
        "x", 4, (Field(0, 2, "a", integer=True), Field(2, 2, "")), length_id="x.length", reserved_id="x.reserved"
    )
    assert layout.write({"a": 0x0201}) == b"\1\2\0\0"
    with pytest.raises(AssertionError, match=r"^\{'b'\}$"):
        layout.write({"a": 1, "b": 2})
    with pytest.raises(AssertionError, match=r"overlap at 0x3 \(reserved\)"):
        Layout("x", 4, (Field(0, 2, "a"), Field(3, 1, "")), length_id="", reserved_id="")
    wrong = refused(lambda: layout.read(b"\0\0\0\5"))
    assert (wrong.id, wrong.want, wrong.got) == ("x.reserved", "zero at 0x003", "0x05")
    short = refused(lambda: layout.read(b"\0\0\0"))
    assert (short.id, short.want, short.got) == ("x.length", "4 bytes", "3 bytes")


# ---- certificates


def leaf(one: EmulatedSnp, **change: bytes | None) -> bytes:
    """A leaf with extensions after AMD's arc replaced (p3_4 is .3.4), added or, with None, left out."""
    rows = {"1": der.write_integer(0), "2": der.write(der.IA5_STRING, b"Genoa")}
    rows |= {key: der.write_integer(0) for key in ("3.1", "3.2", "3.3", "3.8")}
    rows |= {"4": one.chip_id} if one.kind == "VCEK" else {"5": der.write(der.IA5_STRING, b"EMULATED provider")}
    values: dict[str, bytes | None] = {**rows, **{key[1:].replace("_", "."): value for key, value in change.items()}}
    extensions = [emulated._extension(certs.EMULATED_MARK, b"\x05\x00", critical=True)]
    extensions += [
        emulated._extension(f"{certs.AMD}.{key}", value) for key, value in values.items() if value is not None
    ]
    tbs = der.write(
        der.SEQUENCE,
        der.write(der.explicit(0), der.write_integer(2)),
        der.write_integer(0),
        certs.PSS_ALGORITHM,
        emulated._name("ASK" if one.kind == "VCEK" else "ASVK", "Genoa"),
        der.write(der.SEQUENCE, der.write_time(one.not_before), der.write_time(one.not_after)),
        emulated._name(one.kind, "Genoa"),
        emulated._spki(one.keys.leaf),
        der.write(der.explicit(3), der.write(der.SEQUENCE, *extensions)),
    )
    return der.write(der.SEQUENCE, tbs, certs.PSS_ALGORITHM, der.write_bits(bytes(512)))


def test_versions_in_a_leaf_fit_a_byte_and_spares_are_zero(machine: Machine) -> None:
    one = machine("Genoa")
    for key, name in (("p3_1", "bl"), ("p3_2", "tee"), ("p3_3", "snp"), ("p3_8", "ucode")):
        facts = certs.parse(leaf(one, **{key: der.write_integer(255)})).leaf
        assert facts is not None
        assert facts.tcb == snp.Tcb(0, 0, 0, 0, 0)._replace(**{name: 255})
        refused(lambda key=key: certs.parse(leaf(one, **{key: der.write_integer(256)})))  # type: ignore[misc]
        refused(lambda key=key: certs.parse(leaf(one, **{key: None})))  # type: ignore[misc]
    for key in ("p3_4", "p3_5", "p3_6", "p3_7"):
        assert certs.parse(leaf(one, **{key: der.write_integer(0)})).kind == "VCEK"
        assert "spare" in refused(lambda key=key: certs.parse(leaf(one, **{key: der.write_integer(1)}))).message  # type: ignore[misc]


def test_an_owner_is_a_chip_or_a_provider_never_both_or_none(machine: Machine) -> None:
    vcek, vlek = machine("Genoa"), machine("Genoa", "VLEK")
    csp = der.write(der.IA5_STRING, b"EMULATED provider")
    for one, change in (
        (vcek, {"p4": None}),
        (vcek, {"p5": csp}),
        (vcek, {"p4": None, "p5": csp}),
        (vlek, {"p5": None}),
        (vlek, {"p4": vcek.chip_id}),
        (vlek, {"p4": vcek.chip_id, "p5": None}),
    ):
        assert "owner" in refused(lambda one=one, change=change: certs.parse(leaf(one, **change))).message  # type: ignore[misc]
    facts = certs.parse(leaf(vlek)).leaf
    assert facts is not None
    assert (facts.csp_id, facts.hwid) == ("EMULATED provider", None)


def test_both_spellings_of_the_signature_algorithm_but_only_one_at_a_time(machine: Machine) -> None:
    good = leaf(machine("Genoa"))
    bare, written = certs._PSS_ALGORITHMS
    inner = good.index(bare)
    outer = good.rindex(bare)
    assert inner != outer
    body = der.Reader(good).inside(der.SEQUENCE)
    tbs, _, signature = body.whole(der.SEQUENCE), body.whole(der.SEQUENCE), body.bits()
    content = der.Reader(tbs).value(der.SEQUENCE)
    other = der.write(der.SEQUENCE, content.replace(bare, written))
    bits = der.write_bits(signature)
    assert certs.parse(der.write(der.SEQUENCE, other, written, bits)).kind == "VCEK"
    for part, algorithm in ((tbs, written), (other, bare)):
        mixed = der.write(der.SEQUENCE, part, algorithm, bits)
        assert "differ" in refused(lambda mixed=mixed: certs.parse(mixed)).message  # type: ignore[misc]


def unmarked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the emulated platforms write certificates as the vendors do, without any mark."""
    named, extended, intel = emulated._name, emulated._extension, emulated_tdx._name

    def name(kind: certs.Kind, line: tee_policy.Line) -> bytes:
        organization = der.write(der.UTF8_STRING, certs.EMULATED_ORGANIZATION.encode())
        raw = named(kind, line).replace(organization, der.write(der.UTF8_STRING, b"Advanced Micro Dev"))
        common = raw[raw.index(b"EMULATED-") + 9 :]
        rows = (("2.5.4.10", b"Advanced Micro Devices"), ("2.5.4.3", common))
        pairs = (der.write(der.SEQUENCE, der.write_oid(o), der.write(der.UTF8_STRING, text)) for o, text in rows)
        return der.write(der.SEQUENCE, *(der.write(der.SET, pair) for pair in pairs))

    def extension(oid: str, value: bytes, critical: bool = False) -> bytes:
        return b"" if oid == certs.EMULATED_MARK else extended(oid, value, critical)

    def intel_name(role: pck.Role) -> x509.Name:
        common = intel(role).get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
        attributes = (
            (NameOID.COMMON_NAME, str(common).removeprefix("EMULATED ")),
            (NameOID.ORGANIZATION_NAME, "Intel Corporation"),
        )
        return x509.Name([x509.NameAttribute(*pair) for pair in attributes])

    monkeypatch.setattr(emulated, "_name", name)
    monkeypatch.setattr(emulated, "_extension", extension)
    monkeypatch.setattr(emulated_tdx, "_name", intel_name)
    monkeypatch.setattr(emulated_tdx, "EMULATED_MARK", "1.2.3.4.5")
    monkeypatch.setattr(tdx, "EMULATED_QE_VENDOR", tdx.INTEL_QE_VENDOR)


def test_a_root_without_marks_cannot_be_registered_into_the_emulated_tier(
    machine: Machine, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = machine("Genoa", "VLEK")
    unmarked(monkeypatch)
    plain = replace(one)
    assert not any(certs.parse(raw).emulated for raw in plain.certificates)
    bundle = plain.bundle(plain.report(bytes(64), bytes(48), bytes(32)))
    given: dict[str, Any] = {"policy": TeePolicy(allow_emulated=True), "report_data": None, "measurements": None}
    verdict = appraise_bundle(bundle, roots=Roots.of([plain.ark]), at=now, **given)
    assert [check.id for check in verdict.failed] == ["snp.mark"]
    verdict = appraise_bundle(bundle, roots=Roots.of(), at=now, **given)
    assert [check.id for check in verdict.failed] == ["snp.root"]


def test_an_intel_root_without_marks_cannot_either(
    td: TdxMachine, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = td()
    unmarked(monkeypatch)
    monkeypatch.setattr(emulated_tdx, "EMULATED_MARK", "2.5.29.99")
    plain = replace(one)
    kept = x509.CertificateBuilder.add_extension

    def add(self: x509.CertificateBuilder, extension: Any, critical: bool) -> x509.CertificateBuilder:
        return self if extension.oid.dotted_string == "2.5.29.99" else kept(self, extension, critical)

    monkeypatch.setattr(x509.CertificateBuilder, "add_extension", add)
    monkeypatch.setattr(pck, "EMULATED_FMSPC", bytes(6))
    root, chain, quote, texts = plain.root, plain.chain_pem, plain.quote(bytes(64), bytes(48)), plain.collateral()
    monkeypatch.setattr(pck, "EMULATED_FMSPC", b"\xe5" * 6)
    pck.parse.cache_clear()
    assert not any(pck.parse(raw).emulated for raw in tdx.pck_certificates(chain))
    bundle = EvidenceBundle("tdx", quote, collateral=texts)
    given: dict[str, Any] = {"policy": TeePolicy(allow_emulated=True), "report_data": None, "measurements": None}
    verdict = appraise_bundle(bundle, roots=Roots.of([root]), at=now, **given)
    assert [check.id for check in verdict.failed] == ["tdx.mark"]
    verdict = appraise_bundle(bundle, roots=Roots.of(), at=now, **given)
    assert [check.id for check in verdict.failed] == ["tdx.root"]


# ---- TDX


def test_every_td_attribute_has_its_name(td: TdxMachine) -> None:
    names = {0: "debug", 28: "sept_ve_disable", 29: "migratable", 30: "pks", 31: "kl", 63: "perfmon"}
    for bit in range(64):
        quote = tdx.parse(td().quote(bytes(64), bytes(48), td_attributes=1 << bit))
        rows = tdx_rules.described(quote)["td_attributes"]
        assert [name for name, value in rows.items() if value] == [names[n] for n in (bit,) if n in names]


@pytest.mark.parametrize("bit", range(10))
def test_every_bit_of_tud_means_debug(td: TdxMachine, now: datetime, bit: int) -> None:
    one = td()
    bundle = one.bundle(one.quote(bytes(64), bytes(48), td_attributes=1 << 28 | 1 << bit))
    given: dict[str, Any] = {"roots": Roots.of([one.root]), "at": now, "report_data": None, "measurements": None}
    verdict = appraise_bundle(bundle, policy=TeePolicy(allow_emulated=True), **given)
    assert [check.id for check in verdict.failed] == (["tdx.debug"] if bit < 8 else [])
    assert appraise_bundle(bundle, policy=TeePolicy(allow_emulated=True, allow_debug=True), **given).passed


def table(raw: str, *path: Any, value: Any) -> bytes:
    rows = json.loads(raw)
    inner = rows
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return json.dumps(rows).encode()


def test_numbers_of_the_signed_tables(td: TdxMachine) -> None:
    texts = td().collateral()
    info, identity = texts["tcb_info"], texts["qe_identity"]
    level = ("tcbLevels", 0, "tcb")
    for read, raw, path, largest in (
        (collateral.parse_tcb_info, info, (*level, "pcesvn"), 0xFFFF),
        (collateral.parse_tcb_info, info, ("tcbEvaluationDataNumber",), 0xFFFF_FFFF),
        (collateral.parse_tcb_info, info, ("tdxModuleIdentities", 0, *level, "isvsvn"), 0xFFFF),
        (collateral.parse_qe_identity, identity, (*level, "isvsvn"), 0xFFFF),
        (collateral.parse_qe_identity, identity, ("isvprodid",), 0xFFFF),
        (collateral.parse_qe_identity, identity, ("tcbEvaluationDataNumber",), 0xFFFF_FFFF),
    ):
        for value in (0, largest):
            read(table(raw, *path, value=value))
        for value in (-1, largest + 1, True, 1.0, "1", None):
            refused(lambda p=read, r=raw, t=path, v=value: p(table(r, *t, value=v)))  # type: ignore[misc]


@pytest.mark.parametrize("name", ["sgxtcbcomponents", "tdxtcbcomponents"])
def test_components_are_sixteen_bytes(td: TdxMachine, name: str) -> None:
    info = td().collateral()["tcb_info"]

    def parsed(svns: list[Any]) -> collateral.TcbInfo:
        return collateral.parse_tcb_info(table(info, "tcbLevels", 0, "tcb", name, value=[{"svn": svn} for svn in svns]))

    found = parsed([0, 255, *range(14)]).levels[0]
    assert (found.sgx if name.startswith("sgx") else found.tdx) == bytes([0, 255, *range(14)])
    for bad in ([5] * 15, [5] * 17, [], [*[5] * 15, 256], [*[5] * 15, -1], [*[5] * 15, True], [*[5] * 15, "5"]):
        refused(lambda bad=bad: parsed(bad))  # type: ignore[misc]


def test_numbers_of_the_sgx_extension(td: TdxMachine) -> None:
    for changes in ({"sgx": 255}, {"pcesvn": 0xFFFF}, {"sgx": 0, "pcesvn": 0}):
        sgx = pck.parse(tdx.pck_certificates(td(**changes).chain_pem)[0]).sgx
        assert sgx is not None
        assert (sgx.components[15], sgx.pcesvn) == (changes.get("sgx", 5), changes.get("pcesvn", 13))
    for pcesvn in (0x1_0000, 0x1_0001):
        refused(lambda pcesvn=pcesvn: pck.parse(tdx.pck_certificates(td(pcesvn=pcesvn).chain_pem)[0]))  # type: ignore[misc]


# ---- sizes


@pytest.mark.parametrize(
    ("read", "most"),
    [
        (certs.parse, certs.MAX_CERTIFICATE_BYTES),
        (pck.parse, pck.MAX_CERTIFICATE_BYTES),
        (crl.parse, crl.MAX_CRL_BYTES),
        (collateral.parse_json, collateral.MAX_COLLATERAL_BYTES),
        (cert_table.parse, cert_table.MAX_TABLE_BYTES),
        (certificate_file.read, certificate_file.MAX_FILE_BYTES),
        (eventlog.parse, eventlog.MAX_LOG_BYTES),
        (hcl.parse, hcl.MAX_HCL_BYTES),
        (tdx.parse, tdx.MAX_QUOTE_BYTES),
        (TeePolicy.parse, tee_policy.MAX_POLICY_BYTES),
        (EvidenceBundle.parse, evidence.MAX_BUNDLE_BYTES),
    ],
)
def test_the_last_size_that_is_read(read: Callable[[bytes], object], most: int) -> None:
    """One byte more is refused for its size; at the limit the content decides."""
    largest, larger = (refused(lambda n=n: read(b"\x01" * n)) for n in (most, most + 1))  # type: ignore[misc]
    at_limit, beyond = (f"{one.message} {one.want} {one.got}" for one in (largest, larger))
    assert "long" in beyond or "length" in beyond or f"{most + 1} bytes" in beyond
    assert "long" not in at_limit and "wrong length" not in at_limit and f"{most} bytes" not in at_limit


def test_tables_hold_so_many_entries_and_no_more() -> None:
    rows = {uuid.UUID(int=n + 1): b"x" for n in range(cert_table.MAX_ENTRIES + 1)}
    assert "too many" in refused(lambda: cert_table.parse(cert_table.encode(rows))).message
    rows.popitem()
    assert len(cert_table.parse(cert_table.encode(rows))) == cert_table.MAX_ENTRIES


# ---- names and numbers that people write


@pytest.mark.parametrize(
    ("path", "good", "bad"),
    [
        (("snp", "min_guest_svn"), (0, 0xFFFF_FFFF), (-1, 1 << 32, True, "1", 1.0)),
        (("snp", "min_tcb"), ({"Milan": {"bl": 255, "fmc": 0}}, {}), ({"Milan": {"bl": 256}}, {"Milan": {"snp": -1}})),
        (
            ("snp", "guest_policy"),
            ({"required": (1 << 64) - 1}, {"forbidden": 0}),
            ({"required": 1 << 64}, {"bits": 1}),
        ),
        (("snp", "min_abi"), ("0.0", "255.255", "1.55"), ("1", "1.", ".5", "1.5555", "1555.5", "1.5 ", "a.b", 1.5)),
        (("snp", "host_data"), ("ab" * 32, None), ("ab" * 31, "ab" * 33, "AB" * 32, "zz" * 32)),
        (("snp", "family_id"), ("ab" * 16, None), ("ab" * 15, "ab" * 17)),
        (("snp", "image_id"), ("ab" * 16, None), ("ab" * 15, "ab" * 17)),
        (("snp", "id_key_digests"), (["ab" * 48], [], None), (["ab" * 47], ["ab" * 49])),
        (("snp", "chip_ids"), (["ab" * 64, "ab" * 8], None), (["ab" * 63], ["ab" * 65], ["ab" * 9], ["ab" * 7])),
        (("tdx", "out_of_date_grace_days"), (0, 366), (-1, 367)),
        (("tdx", "min_tcb_evaluation_number"), (0, 0xFFFF_FFFF), (-1, 1 << 32)),
        (("tdx", "min_tcb_date"), ("2026-01-01", None), ("2026-02-30", "soon", "01/01/2026")),
        (("tdx", "advisories_denied"), (["INTEL-SA-00837"],), (["INTEL-SA-0083"], ["SA-00837"], ["INTEL-SA-008377"])),
        (("tdx", "mrservicetd"), (["ab" * 48],), (["ab" * 47],)),
        (("vmpl",), ([0, 3], []), ([4], [-1])),
        (("platforms",), (["snp"], []), (["sgx"],)),
    ],
)
def test_values_of_a_policy_from_both_sides(path: tuple[str, ...], good: tuple[Any, ...], bad: tuple[Any, ...]) -> None:
    def parsed(value: Any) -> TeePolicy:
        for step in reversed(path):
            value = {step: value}
        return TeePolicy.parse(json.dumps(value).encode())

    for value in good:
        parsed(value)
    for value in bad:
        assert refused(lambda value=value: parsed(value)).id == "tee.policy.malformed"  # type: ignore[misc]


def test_the_strict_default_value_by_value() -> None:
    """A default that changes is a change of what nodes accept."""
    zero = "00" * 48
    bits = {"required": 0, "forbidden": 0}
    unset = dict.fromkeys(
        ("host_data", "family_id", "image_id", "id_key_digests", "author_key_digests", "chip_ids", "csp_ids")
    )
    assert TeePolicy.parse(b"{}").model_dump(mode="json") == {
        "platforms": ["snp", "tdx"],
        "allow_emulated": False,
        "allow_debug": False,
        "vmpl": [0],
        "snp": {
            "allow_report_v2": False,
            "min_abi": "0.0",
            "min_guest_svn": 0,
            "allow_migration_agent": False,
            "allow_smt": True,
            "require_single_socket": False,
            **dict.fromkeys(("guest_policy", "platform_info", "launch_mitigations", "current_mitigations"), bits),
            **{key: {} for key in ("min_tcb", "min_committed_tcb", "min_launch_tcb")},
            **unset,
            "require_crl": False,
        },
        "tdx": {
            "statuses": ["UpToDate"],
            "advisories_allowed": None,
            "advisories_denied": [],
            "min_tcb_evaluation_number": 0,
            "min_tcb_date": None,
            "out_of_date_grace_days": 0,
            "require_sept_ve_disable": True,
            "mrservicetd": [zero],
            **dict.fromkeys(("mrseam", "mrconfigid", "mrowner", "mrownerconfig")),
            **dict.fromkeys(("rtmr0", "rtmr1", "rtmr2", "rtmr3")),
            "td_attributes": bits,
            "xfam": bits,
            **dict.fromkeys(("allow_dynamic_platform", "allow_cached_keys", "allow_smt")),
        },
    }
    assert tee_policy.TcbMinimum().model_dump() == dict.fromkeys(("fmc", "bl", "tee", "snp", "ucode"), 0)
    with pytest.raises(Exception, match="frozen"):
        TeePolicy().snp.allow_smt = False


def test_every_type_of_event_has_its_name() -> None:
    names = {
        0x1: "EV_POST_CODE",
        0x3: "EV_NO_ACTION",
        0x4: "EV_SEPARATOR",
        0x5: "EV_ACTION",
        0x6: "EV_EVENT_TAG",
        0xD: "EV_IPL",
        0x8000_0001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
        0x8000_0002: "EV_EFI_VARIABLE_BOOT",
        0x8000_0003: "EV_EFI_BOOT_SERVICES_APPLICATION",
        0x8000_0006: "EV_EFI_GPT_EVENT",
        0x8000_0007: "EV_EFI_ACTION",
        0x8000_0008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
        0x8000_0009: "EV_EFI_HANDOFF_TABLES",
        0x8000_000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
        0x8000_000B: "EV_EFI_HANDOFF_TABLES2",
        0x8000_00E0: "EV_EFI_VARIABLE_AUTHORITY",
    }
    for low in range(256):
        for kind in (low, 0x8000_0000 + low):
            assert eventlog.Event(0, kind, b"", b"").type_name == names.get(kind, f"{kind:#010x}")


# ---- times, signers and enclaves


def outcome(bundle: EvidenceBundle, root: bytes, at: datetime, **rules: Any) -> list[str]:
    policy = TeePolicy.parse(json.dumps({"allow_emulated": True} | rules).encode())
    verdict = appraise_bundle(bundle, policy=policy, roots=Roots.of([root]), at=at, report_data=None, measurements=None)
    return [check.id for check in verdict.failed]


SECOND = timedelta(seconds=1)


def test_certificates_are_valid_from_their_first_to_their_last_second(machine: Machine) -> None:
    one = machine()
    bundle = one.bundle(one.report(bytes(64), bytes(48), bytes(32)))
    for at, wrong in (
        (one.not_before, []),
        (one.not_after, []),
        (one.not_before - SECOND, ["snp.validity"]),
        (one.not_after + SECOND, ["snp.validity"]),
    ):
        assert outcome(bundle, one.ark, at) == wrong


def test_revocation_lists_are_in_force_from_their_first_to_their_last_second(machine: Machine, now: datetime) -> None:
    one = machine()
    report = one.report(bytes(64), bytes(48), bytes(32))
    for start, end, wrong in (
        (now, now, []),
        (now + SECOND, now + 2 * SECOND, ["snp.crl"]),
        (now - 2 * SECOND, now - SECOND, ["snp.crl"]),
    ):
        bundle = EvidenceBundle("snp", report, one.certificates, (one.crl([], start, end),))
        assert outcome(bundle, one.ark, now) == wrong


def test_collateral_is_in_force_from_its_first_to_its_last_second(td: TdxMachine) -> None:
    one = td()
    texts = one.collateral(days=2)
    bundle = EvidenceBundle("tdx", one.quote(bytes(64), bytes(48)), collateral=texts)
    end = one.not_before + timedelta(days=2)
    late = ["tdx.root_crl", "tdx.pck_crl", "tdx.collateral_dates"]
    for at, wrong in (
        (one.not_before, []),
        (end, []),
        (end + SECOND, late),
        (one.not_before - SECOND, ["tdx.validity", *late]),
    ):
        assert outcome(bundle, one.root, at) == wrong


def test_each_signed_text_is_checked_by_the_signer_of_its_own_chain(td: TdxMachine, now: datetime) -> None:
    one = td()
    two = replace(one, keys=replace(one.keys, signer=ec.generate_private_key(ec.SECP256R1())))
    two.__dict__["root"] = one.root
    ours, theirs = one.collateral(), two.collateral()
    quote = one.quote(bytes(64), bytes(48))
    info = {name: text for name, text in ours.items() if name.startswith("tcb_info")}
    identity = {name: text for name, text in ours.items() if name.startswith("qe_identity")}
    for texts in (theirs | info, theirs | identity, ours):
        assert outcome(EvidenceBundle("tdx", quote, collateral=texts), one.root, now) == []
    for name, check in (("tcb_info", "tdx.tcb_info"), ("qe_identity", "tdx.qe_identity")):
        swapped = ours | {f"{name}_issuer_chain": theirs[f"{name}_issuer_chain"]}
        assert outcome(EvidenceBundle("tdx", quote, collateral=swapped), one.root, now) == [check]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"mrsigner": b"\1" * 32}, ["tdx.qe"]),
        ({"isv_prod_id": 1}, ["tdx.qe"]),
        ({"isv_prod_id": 3}, ["tdx.qe"]),
        ({"misc_select": b"\0\0\0\1"}, ["tdx.qe"]),
        ({"attributes": bytes.fromhex("13") + bytes(15)}, ["tdx.qe"]),
        ({"attributes": bytes.fromhex("1500000000000000") + bytes(8)}, []),
        ({"attributes": bytes.fromhex("1100000000000000ff") + bytes(7)}, []),
        ({"mrenclave": bytes(32), "config_svn": 9, "isv_ext_prod_id": b"\1" * 16}, []),
        ({"isv_svn": 3}, ["tdx.tcb_status"]),
        ({"report_data": bytes(64)}, ["tdx.qe_binding"]),
    ],
)
def test_the_quoting_enclave_is_that_of_the_identity(
    td: TdxMachine, now: datetime, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], wrong: list[str]
) -> None:
    one, write = td(), tdx.QE_REPORT.write
    monkeypatch.setattr(tdx.QE_REPORT, "write", lambda values: write(values | change))
    assert outcome(one.bundle(one.quote(bytes(64), bytes(48))), one.root, now) == wrong


@pytest.mark.parametrize(
    ("svn", "seen"),
    [
        ((5, 1, 5), "module UpToDate"),
        ((5, 2, 5), "module version 2 has no identity"),
        ((5, 17, 5), "module version 17 has"),
    ],
)
def test_the_module_is_found_by_its_version(
    td: TdxMachine, now: datetime, svn: tuple[int, int, int], seen: str
) -> None:
    one = td(svn=bytes(svn).ljust(16, b"\0"))
    verdict = appraise_bundle(
        one.bundle(one.quote(bytes(64), bytes(48))),
        policy=TeePolicy(allow_emulated=True),
        roots=Roots.of([one.root]),
        at=now,
        report_data=None,
        measurements=None,
    )
    words = {check.id: check.observed for check in verdict.checks}
    assert seen in words["tdx.module"] + words.get("tdx.tcb_status", "")


@pytest.mark.parametrize("platform", ["snp", "tdx"])
def test_debugging_is_never_allowed_in_the_hardware_tier(
    machine: Machine, td: TdxMachine, now: datetime, platform: str
) -> None:
    """What verification found is taken as hardware here: then no policy lets a debug guest pass."""
    one, other = machine(), td()
    bundle = one.bundle(one.report(bytes(64), bytes(48), bytes(32), policy=0x3_0000 | 1 << 19))
    if platform == "tdx":
        bundle = other.bundle(other.quote(bytes(64), bytes(48), td_attributes=1 << 28 | 1))
    found = verify(parse(bundle), roots=Roots.of([one.ark, other.root]), at=now)
    policy = TeePolicy(allow_emulated=True, allow_debug=True)
    assert appraise(found, policy, report_data=None, measurements=None).passed
    real = appraise(replace(found, tier="hardware"), policy, report_data=None, measurements=None)
    assert [(check.id, check.expected) for check in real.failed] == [
        (f"{platform}.debug", "debugging forbidden" if platform == "snp" else "not a debug TD")
    ]


def test_the_kind_of_key_that_the_report_names_is_taken(machine: Machine, now: datetime) -> None:
    vcek = machine("Genoa")
    vlek = replace(machine("Genoa", "VLEK"), not_after=vcek.not_after + timedelta(days=1))
    given = [vcek.leaf, vlek.leaf, vcek.ca, vlek.ca, vcek.ark]
    for one, kind in ((vcek, "VCEK"), (vlek, "VLEK")):
        report = snp.parse(one.report(bytes(64), bytes(48), bytes(32)))
        for order in (given, given[::-1]):
            assert snp_chain.choose(order, report, Roots.of()).leaf.kind == kind


def test_a_quote_that_ends_too_early_says_where(td: TdxMachine) -> None:
    raw = td().quote(bytes(64), bytes(48))
    for size, want, got in (
        (47, f"48 to {tdx.MAX_QUOTE_BYTES} bytes", "47"),
        (50, "6 bytes at 48", "2"),
        (60, "648 bytes at 54", "6"),
        (703, "4 bytes at 702", "1"),
        (702, "4 bytes at 702", "0"),
        (800, f"{len(raw) - 706} bytes at 706", "94"),
    ):
        short = refused(lambda size=size: tdx.parse(raw[:size]))  # type: ignore[misc]
        assert (short.id, short.want, short.got) == ("tdx.length.malformed", want, got)
    at = 706 + 64 + 64 + 2  # the size of the outer certification data
    outer = int.from_bytes(raw[at : at + 4], "little")
    for other in (outer - 1, outer + 1):
        changed = raw[:at] + other.to_bytes(4, "little") + raw[at + 4 :]
        wrong = refused(lambda changed=changed: tdx.parse(changed))  # type: ignore[misc]
        assert wrong.id == "tdx.length.malformed"
        assert (wrong.want, wrong.got) == (f"{outer} bytes", str(other))


def test_a_time_that_is_none_is_shown_in_part() -> None:
    wrong = refused(der.Reader(der.write(der.UTC_TIME, b"49123123595x" + b"y" * 30)).time)
    assert wrong.got == "49123123595xyyyyyyyy"


def test_event_logs_may_name_their_vendor() -> None:
    for vendor in (b"", b"\1", b"abc"):
        spec = struct.pack("<16sIBBBBIHH", b"Spec ID Event03\0", 0, 0, 2, 0, 2, 1, 0x0C, 48) + bytes((len(vendor),))
        for tail, fits in ((vendor, True), (vendor + b"x", False), (vendor[:-1], not vendor)):
            raw = struct.pack("<II20sI", 1, 3, bytes(20), len(spec + tail)) + spec + tail
            if fits:
                assert eventlog.parse(raw).events == ()
            else:
                refused(lambda raw=raw: eventlog.parse(raw))  # type: ignore[misc]


# ---- names that are not those of the key


@pytest.mark.parametrize("role", ["pck", "pck-ca", "tcb-signing"])
def test_a_list_must_name_the_issuer_whose_key_signed_it(td: TdxMachine, now: datetime, role: pck.Role) -> None:
    """Names before and after the right one, under the right key."""
    one = td()
    texts = one.collateral()
    other = one._crl(role, one.keys.root, [], now + timedelta(days=1))
    parsed, root = crl.parse(other), pck.parse(one.root)
    assert pck.holds(root.key, parsed.signature, parsed.tbs)
    assert not crl.signed_by_intel(parsed, root)
    bundle = EvidenceBundle("tdx", one.quote(bytes(64), bytes(48)), collateral=texts | {"root_ca_crl": other.hex()})
    assert outcome(bundle, one.root, now) == ["tdx.root_crl"]


@pytest.mark.parametrize(("role", "right"), [("pck", False), ("pck-ca", True), ("tcb-signing", False), ("root", False)])
def test_a_certificate_is_issued_by_the_name_and_the_key(td: TdxMachine, role: pck.Role, right: bool) -> None:
    one = td()
    leaf = pck.parse(tdx.pck_certificates(one.chain_pem)[0])
    named = pck.parse(one._certificate(role, 9, one.keys.ca, one.keys.root))
    assert pck.holds(named.key, leaf.signature, leaf.tbs)
    assert pck.issued(named, leaf) == right


def test_marked_certificates_under_a_hardware_root_are_refused(
    machine: Machine, td: TdxMachine, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were a vendor's root ever to sign certificates with the marks of emulation, they would not pass as hardware."""
    one, other = machine(), td()
    pinned = {hashlib.sha256(root).hexdigest(): "pinned for this test" for root in (one.ark, other.root)}
    monkeypatch.setattr(trust, "HARDWARE_ROOTS", pinned)
    for bundle, check in (
        (one.bundle(one.report(bytes(64), bytes(48), bytes(32))), "snp.mark"),
        (other.bundle(other.quote(bytes(64), bytes(48))), "tdx.mark"),
    ):
        verdict = appraise_bundle(
            bundle, policy=TeePolicy(), roots=Roots.of(), at=now, report_data=None, measurements=None
        )
        assert ([failed.id for failed in verdict.failed], verdict.tier) == ([check], "none")


@pytest.mark.parametrize(("exponent", "bits"), [(3, certs.RSA_BITS), (65537, 2048), (65537, 3072)])
def test_only_rsa_keys_as_amd_makes_them_sign(exponent: int, bits: int) -> None:
    key = rsa.generate_private_key(exponent, bits)
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    signature = key.sign(b"signed", certs.PSS, hashes.SHA384())
    key.public_key().verify(signature, b"signed", certs.PSS, hashes.SHA384())
    assert not certs.signed_by(spki, signature, b"signed")
