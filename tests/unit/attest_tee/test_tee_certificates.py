"""Certificates, CRLs, PEM, certificate tables and DER: one form only, and nothing but MalformedError out."""

from __future__ import annotations

import base64
import itertools
import struct
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from pointcall_attest import cert_table, certificate_file, certs, crl, der, emulated, pck, pem, snp, snp_chain, tdx
from pointcall_attest.certificate_file import CertificateFile
from pointcall_attest.certs import AMD
from pointcall_attest.emulated import EmulatedSnp
from pointcall_attest.emulated_tdx import EmulatedTdx
from pointcall_attest.errors import MalformedError
from pointcall_attest.findings import UnverifiedError
from pointcall_attest.trust import HARDWARE_ROOTS, RootError, Roots, vendor_certificates

Machine = Callable[..., EmulatedSnp]
TdxMachine = Callable[..., EmulatedTdx]


def refused(call: Callable[[], object]) -> MalformedError:
    with pytest.raises(MalformedError) as raised:
        call()
    return raised.value


@given(st.binary(max_size=300))
def test_der_reader_refuses_or_consumes(raw: bytes) -> None:
    for tag in (der.SEQUENCE, der.INTEGER, der.OCTET_STRING):
        try:
            content = der.Reader(raw).value(tag)
        except MalformedError:
            continue
        assert der.write(tag, content) == raw[: len(der.write(tag, content))]


@given(st.integers(0, 1 << 160))
def test_integers_survive_the_round_trip(value: int) -> None:
    assert der.Reader(der.write_integer(value)).integer() == value


@given(st.binary(max_size=70000).filter(lambda b: len(b) <= der.MAX_LENGTH))
def test_lengths_survive_the_round_trip(content: bytes) -> None:
    assert der.Reader(der.write(der.OCTET_STRING, content)).value(der.OCTET_STRING) == content


@pytest.mark.parametrize(
    "raw",
    [
        "0281020101",  # long length that would fit the short form
        "02820001ff",
        "0280",
        "028401000000",
        "02020001",  # leading zero
        "0200",
        "0281",
        "02",
        "0201ff",  # negative
        "0101",
    ],
)
def test_der_has_one_form(raw: str) -> None:
    refused(lambda: der.Reader(bytes.fromhex(raw)).integer())


@pytest.mark.parametrize("raw", ["010100", "0101fe", "0102ffff"])
def test_true_is_ff(raw: str) -> None:
    refused(lambda: der.Reader(bytes.fromhex(raw)).boolean())


@pytest.mark.parametrize("raw", ["0300", "030101", "030201ff"])
def test_bit_strings_end_at_a_byte(raw: str) -> None:
    refused(lambda: der.Reader(bytes.fromhex(raw)).bits())


@pytest.mark.parametrize(
    ("tag", "text", "year"),
    [
        (der.UTC_TIME, "491231235959Z", 2049),
        (der.UTC_TIME, "500101000000Z", 1950),
        (der.GENERALIZED_TIME, "20500101000000Z", 2050),
        (der.UTC_TIME, "4912312359Z", None),
        (der.UTC_TIME, "491231235959+", None),
        (der.UTC_TIME, "49123123595aZ", None),
        (der.UTC_TIME, "491331235959Z", None),
        (der.GENERALIZED_TIME, "20490101000000Z", None),
        (der.OCTET_STRING, "491231235959Z", None),
    ],
)
def test_times(tag: int, text: str, year: int | None) -> None:
    reader = der.Reader(der.write(tag, text.encode()))
    if year is None:
        refused(reader.time)
    else:
        assert reader.time().year == year


@given(st.integers(-631152000, 2524607999))
def test_times_survive_the_round_trip(seconds: int) -> None:
    whole = datetime.fromtimestamp(seconds, UTC)
    assert der.Reader(der.write_time(whole)).time() == whole


def test_something_left_over_is_refused() -> None:
    refused(der.Reader(b"\0").done)


@pytest.mark.parametrize("line", certs.LINES)
@pytest.mark.parametrize("kind", ["VCEK", "VLEK"])
def test_emulated_certificates_parse_as_what_they_are(machine: Machine, line: str, kind: str) -> None:
    one = machine(line, kind)
    leaf, ca, ark = map(certs.parse, one.certificates)
    assert (leaf.kind, ca.kind, ark.kind) == (kind, "ASVK" if kind == "VLEK" else "ASK", "ARK")
    assert leaf.emulated and ca.emulated and ark.emulated
    assert leaf.leaf is not None
    assert (leaf.leaf.tcb, leaf.leaf.line, leaf.serial) == (one.tcb, line, 0)
    assert certs.signed_by(ca.spki, leaf.signature, leaf.tbs)
    assert not certs.signed_by(leaf.spki, leaf.signature, leaf.tbs)
    assert not certs.signed_by(b"no key", leaf.signature, leaf.tbs)


def test_vendor_certificates_are_ca_certificates_without_marks() -> None:
    amd = [certs.parse(raw) for raw in vendor_certificates() if b"Advanced Micro Devices" in raw]
    assert [(c.kind, c.line) for c in amd] == [
        (kind, line) for line in ("Milan", "Genoa", "Turin") for kind in ("ARK", "ASK", "ASVK")
    ]
    assert not any(c.emulated for c in amd)


class Forge:
    """An emulated leaf whose parts can be changed before it is signed: well-formed DER, wrong content."""

    def __init__(self, one: EmulatedSnp) -> None:
        self.one = one

    def leaf(self, change: dict[str, bytes | None], extra: tuple[bytes, ...] = ()) -> bytes:
        """The leaf with extensions (keys after AMD's arc) replaced, or left out where None."""
        names = ("1", "2", "3.1", "3.2", "3.3", "3.8", "4")
        values = dict(zip(names, self.values(), strict=True)) | change
        rows = [emulated._extension(certs.EMULATED_MARK, b"\x05\x00", critical=True)]
        rows += [emulated._extension(f"{AMD}.{key}", value) for key, value in values.items() if value is not None]
        return self.around((*rows, *extra))

    def values(self) -> tuple[bytes, ...]:
        number = der.write_integer
        tcb = self.one.tcb
        text = der.write(der.IA5_STRING, self.one.line.encode())
        parts = (number(part) for part in (tcb.bl, tcb.tee, tcb.snp, tcb.ucode))
        return number(0), text, *parts, self.one.chip_id

    def around(self, extensions: tuple[bytes, ...], **parts: bytes) -> bytes:
        one = self.one
        fields: dict[str, bytes] = {
            "version": der.write(der.explicit(0), der.write_integer(2)),
            "serial": der.write_integer(0),
            "algorithm": certs.PSS_ALGORITHM,
            "issuer": emulated._name("ASK", one.line),
            "dates": der.write(der.SEQUENCE, der.write_time(one.not_before), der.write_time(one.not_after)),
            "subject": emulated._name("VCEK", one.line),
            "spki": emulated._spki(one.keys.leaf),
            "extensions": der.write(der.explicit(3), der.write(der.SEQUENCE, *extensions)),
        }
        tbs = der.write(der.SEQUENCE, *(fields | parts).values())
        return emulated._signed(tbs, one.keys.ca)


@pytest.fixture(scope="module")
def forge(machine: Machine) -> Forge:
    return Forge(machine())


def small(value: int) -> bytes:
    return der.write_integer(value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"2": None}, "an extension is missing"),
        ({"2": der.write(der.IA5_STRING, b"Rome")}, "the product is not known"),
        ({"2": der.write(der.IA5_STRING, b"")}, "printable"),
        ({"2": der.write(der.IA5_STRING, b"Milan\n")}, "printable"),
        ({"2": der.write(der.UTF8_STRING, b"Milan")}, "unexpected type"),
        ({"2": der.write(der.IA5_STRING, b"Milan") + b"\0"}, "something follows"),
        ({"3.1": None}, "TCB extensions"),
        ({"1": None}, "TCB extensions"),
        ({"3.9": small(0)}, "TCB extensions"),
        ({"3.4": small(1)}, "spare"),
        ({"3.4": small(0)}, None),
        ({"3.8": small(256)}, "does not fit a byte"),
        ({"3.8": der.write(der.OCTET_STRING, b"\x01")}, "unexpected type"),
        ({"3.8": small(1) + b"\0"}, "something follows"),
        ({"4": None}, "owner"),
        ({"4": bytes(8)}, "hardware id"),
        ({"4": der.write(der.OCTET_STRING, bytes(64))}, "hardware id"),
        ({"4": b"x" * 64}, "only some of the marks"),
        ({"5": der.write(der.IA5_STRING, b"CSP")}, "owner"),
        ({"2": der.write(der.IA5_STRING, b"Milan-B1")}, None),
    ],
)
def test_extensions_of_a_leaf(forge: Forge, change: dict[str, bytes | None], words: str | None) -> None:
    raw = forge.leaf(change)
    if words is None:
        assert certs.parse(raw).kind == "VCEK"
    else:
        assert words in refused(lambda: certs.parse(raw)).message


def test_critical_unknown_doubled_and_unmarked_extensions(forge: Forge) -> None:
    row = emulated._extension
    unknown = "1.2.3.4"
    assert certs.parse(forge.leaf({}, (row(unknown, b""),))).kind == "VCEK"
    assert "critical" in refused(lambda: certs.parse(forge.leaf({}, (row(unknown, b"", True),)))).message
    assert "twice" in refused(lambda: certs.parse(forge.leaf({}, (row(f"{AMD}.1", small(0)),)))).message
    assert "CA extensions" in refused(lambda: certs.parse(forge.leaf({}, (row("2.5.29.19", b""),)))).message
    assert "CA extensions" in refused(lambda: certs.parse(forge.leaf({}, (row("2.5.29.15", b""),)))).message
    rows = [
        row(f"{AMD}.{k}", v) for k, v in zip(("1", "2", "3.1", "3.2", "3.3", "3.8", "4"), forge.values(), strict=True)
    ]
    assert "only some of the marks" in refused(lambda: certs.parse(forge.around(tuple(rows)))).message
    mark = row(certs.EMULATED_MARK, b"\x05\x00")
    assert "not critical" in refused(lambda: certs.parse(forge.around((mark, *rows)))).message


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"version": der.write(der.explicit(0), der.write_integer(1))}, "not version 3"),
        ({"algorithm": der.write(der.SEQUENCE, bytes.fromhex("06092a864886f70d01010c"))}, "differ"),
        ({"spki": der.write(der.SEQUENCE, b"")}, "P-384"),
        ({"spki": der.write(der.SEQUENCE, bytes(118))}, "P-384"),
        ({"subject": der.write(der.SEQUENCE)}, "lacks"),
        ({"subject": emulated._name("ASK", "Milan")}, "names are not those"),
        ({"issuer": emulated._name("ARK", "Milan")}, "names are not those"),
        (
            {"dates": der.write(der.SEQUENCE, *[der.write_time(datetime(2026, 1, 1, tzinfo=UTC))] * 3)},
            "something follows",
        ),
    ],
)
def test_parts_of_a_leaf(forge: Forge, parts: dict[str, bytes], words: str) -> None:
    assert words in refused(lambda: certs.parse(forge.around((), **parts))).message


def test_names_are_single_and_simple(forge: Forge) -> None:
    def name(*rows: tuple[str, int, bytes]) -> bytes:
        pairs = [der.write(der.SEQUENCE, der.write_oid(oid), der.write(tag, text)) for oid, tag, text in rows]
        return der.write(der.SEQUENCE, *(der.write(der.SET, pair) for pair in pairs))

    twice = name(("2.5.4.10", der.UTF8_STRING, b"a"), ("2.5.4.10", der.UTF8_STRING, b"b"))
    assert "twice" in refused(lambda: certs.parse(forge.around((), subject=twice))).message
    printable = name(("2.5.4.10", der.PRINTABLE_STRING, b"a"), ("2.5.4.3", der.PRINTABLE_STRING, b"SEV-VCEK"))
    refused(lambda: certs.parse(forge.around((), subject=printable)))
    two = der.write(der.SEQUENCE, der.write(der.SET, printable, printable))
    refused(lambda: certs.parse(forge.around((), subject=two)))


def test_constraints_of_a_ca(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for usage, constraints, words in (
        ("03020780", "30060101ff020100", "may not sign"),
        ("03020104", "30030101ff", "basic constraints"),
        ("03020104", "3000", "basic constraints"),
    ):
        rows: dict[Any, Any] = {**emulated._EXTENSION_CA, "ASK": (bytes.fromhex(usage), bytes.fromhex(constraints))}
        monkeypatch.setattr(emulated, "_EXTENSION_CA", rows)
        one = replace(machine(), chip=b"87654321")
        assert words in refused(lambda one=one: certs.parse(one.ca)).message  # type: ignore[misc]


def test_a_certificate_is_bounded_and_whole(machine: Machine) -> None:
    good = machine().leaf
    assert "too long" in refused(lambda: certs.parse(good.ljust(certs.MAX_CERTIFICATE_BYTES + 1, b"\0"))).message
    refused(lambda: certs.parse(good + b"\0"))
    other = good.replace(certs.PSS_ALGORITHM, certs.PSS_ALGORITHM[:-1] + b"\x31")
    assert "another signature algorithm" in refused(lambda: certs.parse(other)).message


def test_a_leaf_key_that_is_no_point_signs_nothing(machine: Machine, now: datetime) -> None:
    one = machine()
    bad = Forge(one).leaf({})
    bad = bad.replace(emulated._spki(one.keys.leaf)[-96:], b"\x01" * 96)
    report = snp.parse(one.report(bytes(64), bytes(48), bytes(32)))
    roots = Roots.of([one.ark])
    chain = snp_chain.choose([bad, one.ca, one.ark], report, roots)
    with pytest.raises(UnverifiedError) as raised:
        snp_chain.verify(report, chain, roots=roots, at=now)
    assert {c.id for c in raised.value.checks if c.outcome == "fail"} == {"snp.leaf", "snp.signature"}


def test_the_chain_is_chosen_by_name_and_kind(machine: Machine) -> None:
    vcek, vlek = machine("Genoa"), machine("Genoa", "VLEK")
    report = snp.parse(vlek.report(bytes(64), bytes(48), bytes(32)))
    tcb_other = vlek.tcb._replace(snp=1)
    everything = [*vcek.certificates, *vlek.certificates[:2]]
    for order in itertools.islice(itertools.permutations(everything), 0, 120, 17):
        chain = snp_chain.choose(order, report, Roots.of())
        assert (chain.leaf.kind, chain.ca.kind, chain.ark.kind) == ("VLEK", "ASVK", "ARK")
    for given_, words in (
        ([], "needs one certificate"),
        ([vcek.ark], "needs one certificate"),
        ([replace(vlek, tcb=tcb).leaf for tcb in (tcb_other, tcb_other._replace(bl=9))], "needs one certificate"),
        ([vlek.leaf], "missing"),
        ([vlek.leaf, vlek.ca], "missing"),
        ([replace(vlek, csp_id=str(i)).ca for i in range(20)], "too many"),
    ):
        assert words in refused(lambda g=given_: snp_chain.choose(g, report, Roots.of())).message  # type: ignore[misc]
    assert snp_chain.choose([vlek.leaf, vlek.ca], report, Roots.of([vlek.ark])).ark.raw == vlek.ark


def test_of_several_leaves_the_one_of_this_chip_and_tcb_is_taken(machine: Machine, now: datetime) -> None:
    one = machine("Genoa")
    report = snp.parse(one.report(bytes(64), bytes(48), bytes(32)))
    leaf, ca, ark = one.certificates
    later = replace(one, not_after=one.not_after + timedelta(days=1)).leaf
    others = [replace(one, chip=b"87654321").leaf, replace(one, tcb=one.tcb._replace(tee=7)).leaf]
    for wanted, leaves in ((leaf, [leaf, *others]), (later, [leaf, later, others[0]])):
        for order in itertools.permutations(leaves):
            assert snp_chain.choose([*order, ca, ark], report, Roots.of()).leaf.raw == wanted
    for alone in others:
        assert snp_chain.choose([alone, ca, ark], report, Roots.of()).leaf.raw == alone


def test_a_forged_certificate_beside_the_right_one_is_refused_in_any_order(machine: Machine, now: datetime) -> None:
    """What is given must hold, also where a right one of the same name is there too."""
    one = machine()
    keys = emulated.Keys(one.keys.ca, one.keys.ark, one.keys.leaf)  # swapped
    forger = replace(one, keys=keys)
    report = snp.parse(one.report(bytes(64), bytes(48), bytes(32)))
    roots = Roots.of([one.ark])
    for order in itertools.permutations([*one.certificates, forger.ark]):
        with pytest.raises(UnverifiedError) as raised:
            snp_chain.verify(report, snp_chain.choose(order, report, roots), roots=roots, at=now)
        assert {c.id for c in raised.value.checks if c.outcome == "fail"} == {"snp.root", "snp.ca"}
    for order in itertools.permutations([*one.certificates, forger.ca]):
        refusal = refused(lambda order=order: snp_chain.choose(order, report, roots))  # type: ignore[misc]
        assert (refusal.id, refusal.got) == ("cert.chain.malformed", "2 certificates")


def test_only_verify_makes_authentic(machine: Machine) -> None:
    report = snp.parse(machine().report(bytes(64), bytes(48), bytes(32)))
    chain = snp_chain.choose(machine().certificates, report, Roots.of())
    tcbs = snp_chain.Tcbs(*[snp.Tcb(0, 0, 0, 0, 0)] * 4)
    with pytest.raises(AssertionError, match="only verify"):
        snp_chain.Authentic(report, chain, "hardware", "Milan", tcbs, (), object())


def test_roots_are_pinned(machine: Machine, tmp_path: Any) -> None:
    hardware = [raw for raw in vendor_certificates() if Roots.of().tier_of(raw) == "hardware"]
    assert len(hardware) == len(HARDWARE_ROOTS) == 4
    with pytest.raises(RootError) as refused:
        Roots.of([hardware[0]])
    assert refused.value.id == "tee.root"
    (tmp_path / "emulated").mkdir()
    (tmp_path / "emulated/snp.der").write_bytes(machine().ark)
    assert Roots.open(tmp_path).tier_of(machine().ark) == "emulated"
    assert Roots.open(tmp_path / "none").tier_of(machine().ark) == "none"


def test_a_shipped_certificate_that_is_not_pinned_stops_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pointcall_attest.trust._INTERMEDIATES", frozenset())
    with pytest.raises(RootError, match="not the pinned one"):
        vendor_certificates.__wrapped__()


def test_pem_has_one_form(machine: Machine) -> None:
    one = pem.encode("CERTIFICATE", machine().leaf)
    assert pem.certificates(b"a comment\n" + one + one.replace(b"\n", b"\r\n")) == [machine().leaf] * 2
    for bad in (
        b"",
        b"no block",
        one.replace(b"-----END CERTIFICATE", b"-----END CERTIFICATE REQUEST"),
        one.replace(b"-----END", b"-----ENDE"),
        one[:-30],
        one + b"-----BEGIN CERTIFICATE-----\n",
        one * (pem.MAX_BLOCKS + 1),
        pem.encode("X509 CRL", b"123"),
        b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\nA===\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\nAB==\n-----END CERTIFICATE-----\n",
    ):
        refused(lambda bad=bad: pem.certificates(bad))  # type: ignore[misc]


@given(st.binary(min_size=1, max_size=400))
def test_pem_survives_the_round_trip(raw: bytes) -> None:
    assert pem.blocks(pem.encode("X", raw)) == [("X", raw)]


blobs = st.dictionaries(st.uuids(), st.binary(min_size=1, max_size=40), max_size=5)


@given(blobs)
def test_certificate_table_survives_the_round_trip(rows: dict[Any, bytes]) -> None:
    assert cert_table.parse(cert_table.encode(rows)) == rows


@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_refused(raw: bytes) -> None:
    try:
        found = cert_table.parse(raw)
    except MalformedError:
        return
    assert all(found.values())


def test_certificate_table_limits() -> None:
    row = (bytes(range(16)), 48, 4)

    def table(*rows: tuple[bytes, int, int], end: bytes = bytes(24), body: bytes = b"abcd") -> bytes:
        return b"".join(struct.pack("<16sII", *r) for r in rows) + end + body

    assert list(cert_table.parse(table(row)).values()) == [b"abcd"]
    for bad in (
        table((row[0], 47, 4)),
        table((row[0], 48, 5)),
        table((row[0], 48, 0)),
        table((row[0], 0xFFFF_FFF0, 0x20)),
        table(row, row, body=b"abcd" * 20),
        table(row, end=b"", body=b""),
        b"".join(struct.pack("<16sII", bytes((i + 1,)) * 16, 1, 1) for i in range(40)) + bytes(24),
        bytes(cert_table.MAX_TABLE_BYTES + 24),
    ):
        refused(lambda bad=bad: cert_table.parse(bad))  # type: ignore[misc]


def test_a_table_inside_a_table_is_no_table() -> None:
    """However deep: a host must not choose how far we recurse."""
    inner = b"blob"
    for _ in range(1000):
        inner = cert_table.encode({cert_table.ENTRIES["VCEK"]: inner})
    found = certificate_file.read(inner)
    assert len(found.certificates) == 1
    refused(lambda: certs.parse(found.certificates[0]))


def test_certificate_files_in_every_form(machine: Machine, now: datetime) -> None:
    leaf, ca, ark = machine().certificates
    revoked = machine().crl([1], now, now + timedelta(days=1))
    names = {"VCEK": leaf, "ASK": pem.encode("CERTIFICATE", ca), "CRL": revoked}
    table = cert_table.encode({cert_table.ENTRIES[name]: blob for name, blob in names.items()})
    assert certificate_file.read(table) == CertificateFile((leaf, ca), (revoked,))
    assert certificate_file.read(ark).certificates == (ark,)
    assert certificate_file.read(revoked).crls == (revoked,)
    both = pem.encode("CERTIFICATE", leaf) + pem.encode("X509 CRL", revoked)
    assert certificate_file.read(both) == CertificateFile((leaf,), (revoked,))
    stranger, rows = uuid.UUID(int=5), {cert_table.ENTRIES["ARK"]: ark}
    for foreign in (rows | {stranger: b"x"}, {stranger: b"x"} | rows):
        assert certificate_file.read(cert_table.encode(foreign)).certificates == (ark,)
    assert certificate_file.read(bytes(4096)) == certificate_file.read(cert_table.encode({})) == CertificateFile()
    as_text = cert_table.encode({cert_table.ENTRIES["VCEK"]: pem.encode("CERTIFICATE", leaf)})
    assert certificate_file.read(as_text).certificates == (leaf,)
    as_text = cert_table.encode({stranger: b"x", cert_table.ENTRIES["VCEK"]: pem.encode("CERTIFICATE", leaf)})
    assert certificate_file.read(as_text).certificates == (leaf,)
    for bad in (b"", b"hello", pem.encode("PRIVATE KEY", b"1"), bytes(certificate_file.MAX_FILE_BYTES + 1)):
        refused(lambda bad=bad: certificate_file.read(bad))  # type: ignore[misc]


@given(st.binary(max_size=300))
def test_any_bytes_are_a_certificate_file_or_refused(raw: bytes) -> None:
    for prefix in (b"", b"\x30\x82", cert_table.ENTRIES["ARK"].bytes, b"-----BEGIN "):
        try:
            certificate_file.read(prefix + raw)
        except MalformedError:
            continue


def test_crls_that_we_do_not_know(machine: Machine, td: TdxMachine, now: datetime) -> None:
    good = machine().crl([7], now, now + timedelta(days=1))
    assert (crl.parse(good).revokes(7), crl.parse(good).revokes(8)) == (True, False)
    assert refused(lambda: crl.parse(good[:-1])).id == "crl.malformed"
    assert refused(lambda: crl.parse(bytes(crl.MAX_CRL_BYTES + 1))).id == "crl.malformed"
    endless = good.replace(der.write_time(now + timedelta(days=1)), b"")
    refused(lambda: crl.parse(endless))
    builder = x509.CertificateRevocationListBuilder().issuer_name(x509.Name([]))
    builder = builder.last_update(now).next_update(now + timedelta(days=1))
    odd = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b""), critical=True)
    refused(lambda: crl.parse(odd.sign(td().keys.ca, hashes.SHA256()).public_bytes(Encoding.DER)))
    ark = certs.parse(machine().ark)
    assert crl.signed_by_amd(crl.parse(good), ark.subject, ark.spki)
    assert not crl.signed_by_amd(crl.parse(good), ark.issuer + b"x", ark.spki)
    ecdsa = crl.parse(builder.sign(td().keys.ca, hashes.SHA256()).public_bytes(Encoding.DER))
    assert not crl.signed_by_amd(ecdsa, ecdsa.issuer, ark.spki)
    head, algorithm, tail = ecdsa.raw.rpartition(bytes.fromhex("06082a8648ce3d040302"))
    assert "do not match" in refused(lambda: crl.parse(head + algorithm[:-1] + b"\x03" + tail)).message.lower()
    intel = pck.parse(tdx.pck_certificates(td().chain_pem)[1])
    assert not crl.signed_by_intel(crl.parse(good), intel)
    assert not crl.signed_by_intel(ecdsa, intel)


def test_base64_of_the_shipped_files_is_canonical() -> None:
    for raw in vendor_certificates():
        assert pem.certificates(pem.encode("CERTIFICATE", raw)) == [raw]
        assert base64.b64decode(base64.b64encode(raw)) == raw
