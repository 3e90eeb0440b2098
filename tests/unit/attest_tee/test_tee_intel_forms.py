"""Intel's forms: quotes, PCK certificates, collateral, event logs, TDREPORTs, firmware images, Azure HCL reports."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from pointcall_attest import (
    collateral,
    der,
    emulated_tdx,
    eventlog,
    hcl,
    measure,
    pck,
    pem,
    shown,
    tdreport,
    tdvf,
    tdx,
    tdx_chain,
)
from pointcall_attest.appraise import appraise_hcl
from pointcall_attest.emulated import EmulatedSnp
from pointcall_attest.emulated_tdx import EmulatedTdx, Keys, Tables
from pointcall_attest.errors import MalformedError
from pointcall_attest.tee_policy import TeePolicy
from pointcall_attest.trust import Roots

TdxMachine = Callable[..., EmulatedTdx]
DATA, MRTD = b"\x11" * 64, b"\x22" * 48


def refused(call: Callable[[], object]) -> MalformedError:
    with pytest.raises(MalformedError) as raised:
        call()
    return raised.value


@pytest.fixture(scope="module")
def good(td: TdxMachine) -> bytes:
    return td().quote(DATA, MRTD)


@pytest.mark.parametrize(
    ("at", "value", "id"),
    [
        (0, 3, "tdx.version.malformed"),
        (0, 6, "tdx.version.malformed"),
        (2, 3, "tdx.key_type.malformed"),
        (4, 0, "tdx.tee_type.malformed"),
        (8, 1, "tdx.reserved.malformed"),
        (48, 1, "tdx.body_type.malformed"),
        (48, 4, "tdx.body_type.malformed"),
        (50, 0, "tdx.body_type.malformed"),
        (702, 1, "tdx.trailing.malformed"),
        (702, 0xFFFF, "tdx.length.malformed"),
        (702 + 4 + 128, 5, "tdx.certification.malformed"),
        (702 + 4 + 130, 1, "tdx.length.malformed"),
        (702 + 4 + 134 + 448, 0xFFFF, "tdx.length.malformed"),
        (702 + 4 + 134 + 450 + 32, 4, "tdx.certification.malformed"),
        (702 + 4 + 134 + 452 + 32, 1, "tdx.length.malformed"),
        (702 + 4 + 134 + 20, 1, "tdx.qe.reserved.malformed"),
    ],
)
def test_one_wrong_number_in_a_quote(good: bytes, at: int, value: int, id: str) -> None:
    raw = bytearray(good)
    raw[at : at + 2] = value.to_bytes(2, "little")
    assert refused(lambda: tdx.parse(bytes(raw))).id == id


def test_every_truncation_of_a_quote_is_refused(good: bytes) -> None:
    for size in range(0, len(good), 7):
        refused(lambda size=size: tdx.parse(good[:size]))  # type: ignore[misc]
    assert refused(lambda: tdx.parse(good + b"\1")).id == "tdx.trailing.malformed"
    assert refused(lambda: tdx.parse(good + bytes(tdx.MAX_QUOTE_BYTES))).id == "tdx.length.malformed"
    assert tdx.parse(good + bytes(70)).body.mrtd == MRTD


def test_the_pck_chain_has_one_spelling(td: TdxMachine) -> None:
    text = td().chain_pem
    for form in (text, text + b"\0", text[:-1], text[:-1] + b"\0", text + b"\0\0\0"):
        assert len(tdx.pck_certificates(form)) == 3
    blocks = tdx.pck_certificates(text)
    two = b"".join(pem.encode("CERTIFICATE", one) for one in blocks[:2])
    for form in (
        text + b"\0\n",
        text + b"\n",
        b"\n" + text,
        b"\0" + text,
        text.replace(b"\n", b"\r\n"),
        two,
        two + text,
    ):
        refused(lambda form=form: tdx.pck_certificates(form))  # type: ignore[misc]


@given(st.binary(max_size=900))
def test_any_bytes_are_a_quote_or_refused(raw: bytes) -> None:
    for head in (b"", struct.pack("<HHI", 4, 2, 0x81), struct.pack("<HHI", 5, 2, 0x81)):
        try:
            tdx.parse(head + raw)
        except MalformedError:
            continue


# ---- PCK certificates


def certificate(key: ec.EllipticCurvePrivateKey, now: datetime, **change: Any) -> bytes:
    """A certificate in Intel's form with one thing changed."""
    parts: dict[str, Any] = {
        "name": "Intel SGX PCK Certificate",
        "organization": "Intel Corporation",
        "sgx": sgx(),
        "ca": False,
        "usage": False,
        "mark": None,
        "extra": [],
        "hash": hashes.SHA256(),
        "serial": 5,
    } | change
    names = [x509.NameAttribute(NameOID.COMMON_NAME, parts["name"])]
    if parts["organization"]:
        names.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, parts["organization"]))
    builder = x509.CertificateBuilder().subject_name(x509.Name(names)).issuer_name(x509.Name(names))
    builder = builder.serial_number(parts["serial"]).not_valid_before(now).not_valid_after(now)
    builder = builder.public_key(key.public_key())
    if parts["ca"] is not None:
        builder = builder.add_extension(x509.BasicConstraints(parts["ca"], None), critical=True)
    if parts["usage"] is not None:
        builder = builder.add_extension(emulated_tdx._usage(parts["usage"]), critical=True)
    if parts["sgx"] is not None:
        builder = builder.add_extension(emulated_tdx._unknown(pck.SGX, parts["sgx"]), critical=False)
    if parts["mark"] is not None:
        builder = builder.add_extension(emulated_tdx._unknown(pck.EMULATED_MARK, b"\x05\0"), critical=parts["mark"])
    for extension, critical in parts["extra"]:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(key, parts["hash"]).public_bytes(Encoding.DER)


def octets(raw: bytes) -> bytes:
    return der.write(der.OCTET_STRING, raw)


def sgx(**change: bytes | None) -> bytes:
    """The SGX extension; keys like p7 or t2_17 replace or drop (None) a part."""
    tcb: dict[str, bytes | None] = {f"t2_{i}": der.write_integer(5) for i in range(1, 17)}
    tcb |= {"t2_17": der.write_integer(13), "t2_18": octets(bytes(16))}
    parts: dict[str, bytes | None] = {
        "p1": octets(bytes(16)),
        "p2": b"",
        "p3": octets(bytes(2)),
        "p4": octets(bytes(6)),
        "p5": der.write(pck.ENUMERATED, b"\0"),
    }
    tcb |= {key: value for key, value in change.items() if key.startswith("t")}
    parts |= {key: value for key, value in change.items() if key.startswith("p")}
    if parts["p2"] == b"":
        parts["p2"] = der.write(der.SEQUENCE, *_sgx_rows(tcb))
    return der.write(der.SEQUENCE, *_sgx_rows(parts), change.get("extra") or b"")


def _sgx_rows(parts: Mapping[str, bytes | None]) -> list[bytes]:
    return [emulated_tdx._row(key[1:].replace("_", "."), value) for key, value in parts.items() if value is not None]


@pytest.fixture(scope="module")
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def test_a_single_package_platform_has_no_configuration(key: ec.EllipticCurvePrivateKey, now: datetime) -> None:
    found = pck.parse(certificate(key, now)).sgx
    assert found is not None
    assert (found.pcesvn, found.components, found.smt_enabled, found.platform_instance) == (13, b"\5" * 16, None, None)


@pytest.mark.parametrize(
    "change",
    [
        {"p1": None},
        {"p1": octets(bytes(15))},
        {"p2": None},
        {"p2": octets(b"")},
        {"p2": der.write(der.SEQUENCE)},
        {"p3": octets(b"")},
        {"p4": octets(bytes(7))},
        {"p5": der.write_integer(0)},
        {"p5": der.write(pck.ENUMERATED)},
        {"p6": octets(bytes(1))},
        {"p7": der.write(der.SEQUENCE, emulated_tdx._row("7.1", der.write(der.BOOLEAN, b"\x01")))},
        {"p7": der.write(der.SEQUENCE, emulated_tdx._row("7.1", der.write(der.BOOLEAN)))},
        {"p7": octets(b"x")},
        {"t2_1": None},
        {"t2_1": der.write_integer(256)},
        {"t2_1": octets(b"x")},
        {"t2_17": der.write_integer(0x10000)},
        {"t2_18": octets(bytes(17))},
        {"extra": emulated_tdx._row("1", octets(bytes(16)))},
        {"extra": der.write(der.SEQUENCE, der.write_oid("1.2.3"), octets(b""))},
        {"extra": der.write(der.SEQUENCE, der.write_oid(f"{pck.SGX}.6"))},
        {"extra": b"\0"},
    ],
)
def test_one_wrong_part_of_the_sgx_extension(
    key: ec.EllipticCurvePrivateKey, now: datetime, change: dict[str, bytes | None]
) -> None:
    refused(lambda: pck.parse(certificate(key, now, sgx=sgx(**change))))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Intel SGX Something"},
        {"name": "EMULATED Intel SGX PCK Certificate"},
        {"organization": None},
        {"organization": pck.EMULATED_ORGANIZATION},
        {"organization": pck.EMULATED_ORGANIZATION, "name": "EMULATED Intel SGX PCK Certificate"},
        {"mark": True},
        {"ca": True},
        {"usage": None},
        {"usage": True},
        {"sgx": None},
        {"name": "Intel SGX Root CA"},
        {"name": "Intel SGX Root CA", "sgx": None},
        {"name": "Intel SGX Root CA", "sgx": None, "ca": True},
        {"hash": hashes.SHA384()},
        {"extra": [(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b""), True)]},
    ],
)
def test_one_wrong_part_of_a_certificate(
    key: ec.EllipticCurvePrivateKey, now: datetime, change: dict[str, Any]
) -> None:
    refused(lambda: pck.parse(certificate(key, now, **change)))


def test_certificates_that_are_fine(key: ec.EllipticCurvePrivateKey, now: datetime) -> None:
    tolerated = [(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b""), False)]
    assert pck.parse(certificate(key, now, extra=tolerated)).role == "pck"
    assert pck.parse(certificate(key, now, ca=None)).role == "pck"
    root = certificate(key, now, name="Intel SGX Root CA", sgx=None, ca=True, usage=True)
    assert pck.parse(root).role == "root"


def test_other_curves_and_forms_are_refused(key: ec.EllipticCurvePrivateKey, now: datetime) -> None:
    refused(lambda: pck.parse(certificate(ec.generate_private_key(ec.SECP384R1()), now)))
    good = certificate(key, now)
    refused(lambda: pck.parse(bytes(pck.MAX_CERTIFICATE_BYTES + 1)))
    refused(lambda: pck.parse(good + b"\0"))
    for at in range(0, len(good), 3):
        raw = bytearray(good)
        raw[at] ^= 0x42
        try:
            found = pck.parse(bytes(raw))
        except MalformedError:
            continue
        assert not pck.holds(found.key, found.signature, found.tbs)


def test_keys_and_signatures_that_are_none() -> None:
    assert pck.key_of(b"\x01" * 64) is None
    assert not pck.holds_raw(None, bytes(64), b"")
    made = ec.generate_private_key(ec.SECP256R1())
    assert not pck.holds_raw(made.public_key(), bytes(63), b"")
    assert not pck.holds_raw(made.public_key(), bytes(64), b"")
    assert pck.key_of(emulated_tdx._point(made)) is not None


def test_chains_with_other_roles_are_refused(td: TdxMachine) -> None:
    one = td()
    quote, texts = tdx.parse(one.quote(DATA, MRTD)), one.collateral()
    parts = collateral.parse(texts)
    leaf, ca, root = tdx.pck_certificates(one.chain_pem)
    swapped = b"".join(pem.encode("CERTIFICATE", der_) for der_ in (ca, leaf, root))
    wrong_quote = replace(quote, pck_pem=swapped)
    arguments: dict[str, Any] = {"roots": Roots.of([one.root]), "at": one.not_before}
    assert refused(lambda: tdx_chain.verify(wrong_quote, parts, **arguments)).id == "tdx.chain.malformed"
    wrong = replace(parts, qe_identity_chain=(root, root))
    assert refused(lambda: tdx_chain.verify(quote, wrong, **arguments)).id == "collateral.malformed"
    signer = parts.tcb_info_chain[0]
    twice = replace(parts, tcb_info_chain=(signer, signer))
    assert refused(lambda: tdx_chain.verify(quote, twice, **arguments)).id == "collateral.malformed"
    short = replace(parts, tcb_info_chain=(root,))
    assert refused(lambda: tdx_chain.verify(quote, short, **arguments)).id == "collateral.malformed"
    fine = tdx_chain.verify(quote, parts, **arguments)
    with pytest.raises(AssertionError, match="only verify"):
        replace(fine, seal=object())


# ---- collateral


def test_collateral_has_its_texts_and_no_others(td: TdxMachine) -> None:
    texts = td().collateral()
    assert collateral.parse_json(json.dumps(texts | {"pck_certificate_chain": None}).encode()) == texts
    collateral.parse(texts | {"pck_crl_issuer_chain": ""})
    for bad in (
        b"[]",
        b"{",
        b'{"a":1}',
        b"[" * 100_000,
        bytes(collateral.MAX_COLLATERAL_BYTES + 1),
        b"\xff",
    ):
        refused(lambda bad=bad: collateral.parse_json(bad))  # type: ignore[misc]
    for change in ({"other": ""}, {"tcb_info_signature": "zz"}, {"tcb_info": "\ud800"}, {"root_ca_crl": "0"}):
        refused(lambda change=change: collateral.parse(texts | change))  # type: ignore[misc]
    refused(lambda: collateral.parse({key: value for key, value in texts.items() if key != "pck_crl"}))


def changed(raw: str, path: tuple[Any, ...], value: Any) -> bytes:
    rows = json.loads(raw)
    inner = rows
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(rows).encode()


LEVEL = ("tcbLevels", 0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("id",), "SGX"),
        (("version",), 2),
        (("tcbType",), 1),
        (("issueDate",), "yesterday"),
        (("issueDate",), "2026-01-01T00:00:00+00:00"),
        (("issueDate",), "2026-01-01 00:00:00"),
        (("nextUpdate",), 5),
        (("fmspc",), "00"),
        (("fmspc",), 5),
        (("pceId",), ...),
        (("tcbEvaluationDataNumber",), -1),
        (("tcbEvaluationDataNumber",), True),
        (("tcbEvaluationDataNumber",), 1 << 32),
        (("tdxModule",), []),
        (("tdxModule", "mrsigner"), ""),
        (("tdxModuleIdentities",), {}),
        (("tdxModuleIdentities", 0, "attributesMask"), "zz"),
        (("tcbLevels",), [{}] * 257),
        (("tcbLevels",), [5]),
        ((*LEVEL, "tcbStatus"), "Fine"),
        ((*LEVEL, "tcbStatus"), "TDRelaunchAdvised"),
        ((*LEVEL, "tcbDate"), ...),
        ((*LEVEL, "advisoryIDs"), "INTEL"),
        ((*LEVEL, "tcb", "pcesvn"), "13"),
        ((*LEVEL, "tcb", "sgxtcbcomponents"), []),
        ((*LEVEL, "tcb", "tdxtcbcomponents"), ...),
        ((*LEVEL, "tcb", "tdxtcbcomponents", 0, "svn"), 256),
    ],
)
def test_one_wrong_part_of_tcb_info(td: TdxMachine, path: tuple[Any, ...], value: Any) -> None:
    raw = td().collateral()["tcb_info"]
    collateral.parse_tcb_info(raw.encode())
    assert refused(lambda: collateral.parse_tcb_info(changed(raw, path, value))).id == "collateral.malformed"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("id",), "QE"),
        (("version",), 3),
        (("miscselect",), "00"),
        (("attributes",), ...),
        (("isvprodid",), 1 << 16),
        ((*LEVEL, "tcb", "isvsvn"), None),
        ((*LEVEL, "tcb"), []),
    ],
)
def test_one_wrong_part_of_qe_identity(td: TdxMachine, path: tuple[Any, ...], value: Any) -> None:
    raw = td().collateral()["qe_identity"]
    collateral.parse_qe_identity(raw.encode())
    assert refused(lambda: collateral.parse_qe_identity(changed(raw, path, value))).id == "collateral.malformed"


def test_signed_texts_that_are_no_objects() -> None:
    for raw in (b"", b"[]", b"5", b"{", b"\xff", b"[" * 100_000):
        refused(lambda raw=raw: collateral.parse_tcb_info(raw))  # type: ignore[misc]
        refused(lambda raw=raw: collateral.parse_qe_identity(raw))  # type: ignore[misc]


def test_tables_are_sorted_and_the_first_module_may_be_missing(td: TdxMachine) -> None:
    raw = td().collateral(Tables((emulated_tdx.PlatformRow("OutOfDate", 1), emulated_tdx.PlatformRow("UpToDate", 5))))
    assert [level.status for level in collateral.parse_tcb_info(raw["tcb_info"].encode()).levels] == [
        "UpToDate",
        "OutOfDate",
    ]
    bare = collateral.parse_tcb_info(changed(raw["tcb_info"], ("tdxModule",), ...))
    assert bare.module is None


# ---- event logs


def log(*events: tuple[int, int, bytes, bytes], algorithms: tuple[tuple[int, int], ...] = ((0x0C, 48),)) -> bytes:
    spec = struct.pack("<16sIBBBBI", b"Spec ID Event03\0", 0, 0, 2, 0, 2, len(algorithms))
    spec += b"".join(struct.pack("<HH", *pair) for pair in algorithms) + b"\0"
    raw = struct.pack("<II20sI", 1, 3, bytes(20), len(spec)) + spec
    for register, kind, digest, data in events:
        raw += struct.pack("<III", register, kind, len(algorithms))
        raw += b"".join(struct.pack("<H", a) + (digest if a == 0x0C else bytes(n)) for a, n in algorithms)
        raw += struct.pack("<I", len(data)) + data
    return raw


D1, D2 = b"\1" * 48, b"\2" * 48


def test_replay_extends_in_order_and_skips_no_action() -> None:
    found = eventlog.parse(log((1, 4, D1, b"a"), (4, 4, D2, b""), (1, 3, D2, b"skipped"), (1, 0x77, D2, b"b")))
    once = hashlib.sha384(bytes(48) + D1).digest()
    assert found.replay() == (
        hashlib.sha384(once + D2).digest(),
        bytes(48),
        bytes(48),
        hashlib.sha384(bytes(48) + D2).digest(),
    )
    assert [event.type_name for event in found.events] == ["EV_SEPARATOR", "EV_SEPARATOR", "EV_NO_ACTION", "0x00000077"]


def test_two_algorithms_and_either_filling() -> None:
    raw = log((1, 4, D1, b"a"), algorithms=((0x0B, 32), (0x0C, 48)))
    for filling in (b"", b"\xff" * 100, bytes(100)):
        assert eventlog.parse(raw + filling).events[0].digest == D1


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        log()[:40],
        log().replace(b"Event03", b"Event02"),
        b"\1" + log()[1:4] + b"\4" + log()[5:],
        b"\7" + log()[1:],
        log(algorithms=()),
        log(algorithms=((0x0B, 32),)),
        log(algorithms=((0x0C, 48), (0x0C, 48))),
        log(algorithms=((0x0C, 47),)),
        log((0, 4, D1, b"")),
        log((5, 4, D1, b"")),
        log((1, 4, D1, b"abc"))[:-1],
        log((1, 4, D1, b""))[:-50],
        log((1, 4, D1, b"")) + b"\xff\xff\xff\xff\0\1",
        log((1, 4, D1, b"")) + bytes(9) + b"\1",
        log((1, 4, D1, b"")).replace(struct.pack("<III", 1, 4, 1), struct.pack("<III", 1, 4, 2)),
        log((1, 4, D1, b"")).replace(struct.pack("<IIIH", 1, 4, 1, 12), struct.pack("<IIIH", 1, 4, 1, 11)),
        log() + b"\1\0",
        bytes(eventlog.MAX_LOG_BYTES + 1),
        log(*[(1, 4, D1, b"")] * (eventlog.MAX_EVENTS + 1)),
    ],
)
def test_logs_that_are_refused(raw: bytes) -> None:
    assert refused(lambda: eventlog.parse(raw)).id == "eventlog.malformed"


@given(st.binary(max_size=300))
def test_any_bytes_are_a_log_or_refused(raw: bytes) -> None:
    for head in (b"", log()):
        try:
            eventlog.parse(head + raw)
        except MalformedError:
            continue


def test_a_register_that_differs_is_explained() -> None:
    found = eventlog.parse(log((1, 4, D1, b""), (1, 5, D2, b""), (2, 4, D1, b"")))
    zero, one, *rest = found.replay()
    partly = hashlib.sha384(bytes(48) + D1).digest()
    first, second, third, fourth = measure.explain_registers(found, (partly, b"\7" * 48, rest[0], rest[1]))
    assert (first.matches, "after 1 of 2 events; the next is EV_ACTION" in first.reasons[0]) == (False, True)
    assert "none of the 1 events" in second.reasons[0]
    assert (third.matches, fourth.matches) == (True, True)
    assert (len(zero), len(one)) == (48, 48)


def test_two_boots_are_compared_event_by_event() -> None:
    ours = eventlog.parse(log((1, 4, D1, b""), (2, 4, D1, b""), (3, 4, D1, b"")))
    theirs = eventlog.parse(log((1, 4, D2, b""), (2, 4, D1, b""), (2, 4, D1, b""), (3, 4, D1, b"")))
    assert measure.explain_logs(ours, ours) == ()
    first, second = measure.explain_logs(ours, theirs)
    assert first.startswith("RTMR0 event 0: EV_SEPARATOR 01")
    assert second == "RTMR1: 1 events became 2"
    assert measure.described(ours)[0] == {"rtmr": 0, "type": "EV_SEPARATOR", "digest": D1.hex(), "bytes": 0}


# ---- TDREPORT and HCL


def td_report(**values: Any) -> bytes:
    fields = {"type": tdreport.TYPES[0], "report_data": DATA} | values
    bare = tdreport.LAYOUT.write(fields)
    hashes_ = {"tee_tcb_info_hash": bare[256:495], "tdinfo_hash": bare[512:]}
    return tdreport.LAYOUT.write({name: hashlib.sha384(part).digest() for name, part in hashes_.items()} | fields)


def test_tdreports() -> None:
    assert tdreport.parse(td_report(mrtd=MRTD)).mrtd == MRTD
    assert tdreport.parse(td_report(type=tdreport.TYPES[1])).type == tdreport.TYPES[1]
    assert refused(lambda: tdreport.parse(td_report(type=b"\x81\0\0\1"))).id == "tdreport.type.malformed"
    for name in ("tee_tcb_info_hash", "tdinfo_hash"):
        wrong = td_report(**{name: bytes(48)})
        assert refused(lambda wrong=wrong: tdreport.parse(wrong)).id == "tdreport.hash.malformed"  # type: ignore[misc]
    assert refused(lambda: tdreport.parse(td_report()[:-1])).id == "tdreport.length.malformed"


def hcl_report(
    report: bytes, kind: int = 2, runtime: bytes = b'{"keys":[]}', tail: bytes = b"", **change: int
) -> bytes:
    end = 1236 + len(runtime)
    numbers = (
        {"version": 1, "total": end, "request": 2, "status": 0}
        | {"data": 1, "hash": 1, "size": 20 + len(runtime)}
        | change
    )
    head = struct.pack("<4sIIII12x", b"HCLA", *(numbers[key] for key in ("version", "total", "request", "status")))
    data = struct.pack("<IIIII", numbers["size"], numbers["data"], kind, numbers["hash"], len(runtime))
    return head + report.ljust(1184, b"\0") + data + runtime + tail


@pytest.fixture(scope="module")
def inner(machine: Callable[..., EmulatedSnp]) -> bytes:
    data = hashlib.sha256(b'{"keys":[]}').digest().ljust(64, b"\0")
    return machine().report(data, bytes(48), bytes(32))


def test_hcl_reports_bind_their_runtime_data(machine: Callable[..., EmulatedSnp], inner: bytes, now: datetime) -> None:
    one = machine()
    arguments: dict[str, Any] = {
        "policy": TeePolicy(allow_emulated=True),
        "roots": Roots.of([one.ark]),
        "at": now,
        "measurements": None,
    }
    verdict = appraise_hcl(hcl_report(inner, tail=bytes(9)), one.certificates, **arguments)
    assert verdict.passed
    other = hcl_report(inner, runtime=b'{"keys":[1]}')
    assert [c.id for c in appraise_hcl(other, one.certificates, **arguments).failed] == ["hcl.binding"]
    sha512 = hashlib.sha512(b'{"keys":[]}').digest()
    wide = hcl_report(one.report(sha512, bytes(48), bytes(32)), hash=3)
    assert appraise_hcl(wide, one.certificates, **arguments).passed
    assert [c.id for c in appraise_hcl(b"", one.certificates, **arguments).failed] == ["hcl.malformed"]
    data = hashlib.sha256(b'{"keys":[]}').digest().ljust(64, b"\0")
    td = hcl_report(td_report(report_data=data), 4)
    assert hcl.parse(td).binds
    assert [c.id for c in appraise_hcl(td, (), **arguments).failed] == ["hcl.platform"]


def test_intels_forms_are_shown(inner: bytes) -> None:
    for raw, form in (
        (hcl_report(inner), "Azure HCL report"),
        (td_report(), "TDREPORT"),
        (log((1, 4, D1, b"")), "CCEL event log"),
    ):
        assert json.loads(json.dumps(shown.described(raw)))["form"] == form


def test_hcl_reports_that_are_refused(inner: bytes) -> None:
    good = hcl_report(inner)
    for bad in (
        good[:1235],
        b"X" + good[1:],
        hcl_report(inner, version=3),
        hcl_report(inner, request=1),
        hcl_report(inner, status=1),
        good[:20] + b"\1" + good[21:],
        hcl_report(inner, total=5),
        hcl_report(inner, data=2),
        hcl_report(inner, size=5),
        hcl_report(inner, tail=b"\1"),
        good[:-1],
        hcl_report(inner, kind=3),
        hcl_report(inner, hash=4),
        hcl_report(inner, runtime=b"[]"),
        hcl_report(inner, runtime=b"{}"),
        hcl_report(inner, runtime=b"{"),
        hcl_report(inner, runtime=b"[" * 20000),
        hcl_report(td_report() + b"\1", 4),
        bytes(hcl.MAX_HCL_BYTES + 1),
    ):
        assert refused(lambda bad=bad: hcl.parse(bad)).id == "hcl.malformed"  # type: ignore[misc]
    assert refused(lambda: hcl.parse(hcl_report(b""))).id.startswith("snp.")


# ---- firmware images


def image(sections: list[tuple[int, int, int, int, int, int]], size: int = 8192, **change: Any) -> bytes:
    """A firmware image with TDX metadata at 256 bytes, and a GUID table that points there."""
    count = change.get("count", len(sections))
    body = struct.pack("<4sIII", change.get("magic", b"TDVF"), change.get("length", 16 + 32 * len(sections)), 1, count)
    body += b"".join(struct.pack("<IIQQII", *section) for section in sections)
    raw = bytearray(bytes(i % 251 for i in range(size)))
    raw[256 : 256 + len(body)] = body
    entry = struct.pack("<I", change.get("offset", size - 256)) + struct.pack(
        "<H16s", 22, change.get("guid", tdvf._METADATA)
    )
    other = b"abcd" + struct.pack("<H16s", 22, b"\5" * 16)
    table = entry + other
    table += struct.pack("<H16s", change.get("table", len(table) + 18), change.get("footer", tdvf._FOOTER))
    raw[size - 32 - len(table) : size - 32] = table
    return bytes(raw)


def test_both_orders_of_an_image_are_computed() -> None:
    found = tdvf.measure(
        image([(4096, 4096, 0x1000, 8192, 0, 1), (0, 0, 0x8000, 4096, 2, 0), (0, 0, 0x9000, 4096, 3, 2)])
    )
    raw = image([(4096, 4096, 0x1000, 8192, 0, 1), (0, 0, 0x8000, 4096, 2, 0), (0, 0, 0x9000, 4096, 3, 2)])

    def add(page: int) -> bytes:
        return b"MEM.PAGE.ADD\0\0\0\0" + page.to_bytes(8, "little") + bytes(104)

    def extend(page: int, data: bytes) -> bytes:
        return b"".join(
            b"MR.EXTEND\0\0\0\0\0\0\0" + (page + at).to_bytes(8, "little") + bytes(104) + data[at : at + 256]
            for at in range(0, 4096, 256)
        )

    first, second, third = extend(0x1000, raw[4096:8192]), extend(0x2000, bytes(4096)), add(0x8000)
    assert found.one_pass == hashlib.sha384(add(0x1000) + first + add(0x2000) + second + third).digest()
    assert found.two_pass == hashlib.sha384(add(0x1000) + add(0x2000) + first + second + third).digest()
    assert len(found.sections) == 3


GOOD_SECTION = (4096, 4096, 0x1000, 4096, 0, 1)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        bytes(4095),
        bytes(8192),
        image([GOOD_SECTION], magic=b"TDVE"),
        image([GOOD_SECTION], count=0),
        image([GOOD_SECTION], count=65),
        image([GOOD_SECTION], length=16),
        image([GOOD_SECTION] * 64, size=4096 + 8192)[:4096],
        image([GOOD_SECTION], offset=0),
        image([GOOD_SECTION], offset=99999),
        image([GOOD_SECTION], guid=bytes(16)),
        image([GOOD_SECTION], footer=bytes(16)),
        image([GOOD_SECTION], table=9999),
        image([GOOD_SECTION], table=5),
        image([(4096, 4097, 0x1000, 8192, 0, 1)]),
        image([(4096, 4096, 0x1000, 0, 0, 1)]),
        image([(0, 0, 0x1001, 4096, 0, 1)]),
        image([(0, 0, 0x1000, 4097, 0, 1)]),
        image([(0, 0, 1 << 60, 4096, 0, 1)]),
        image([(0, 0, 0x1000, 1 << 30, 0, 1)]),
    ],
)
def test_images_that_are_refused(raw: bytes) -> None:
    assert refused(lambda: tdvf.measure(raw)).id == "tdvf.malformed"


def test_a_broken_guid_table_entry() -> None:
    raw = bytearray(image([GOOD_SECTION]))
    raw[8192 - 32 - 18 - 18 : 8192 - 32 - 18 - 16] = b"\1\0"
    refused(lambda: tdvf.measure(bytes(raw)))


@given(st.binary(max_size=120))
def test_any_metadata_is_measured_or_refused(tail: bytes) -> None:
    raw = bytearray(image([GOOD_SECTION]))
    raw[256 : 256 + len(tail)] = tail
    raw[8192 - 32 - len(tail[:62]) : 8192 - 32] = tail[:62]
    try:
        tdvf.measure(bytes(raw))
    except MalformedError:
        return


def test_keys_of_the_emulated_machine_are_not_reused(td_keys: Keys) -> None:
    assert len({id(key) for key in (td_keys.root, td_keys.ca, td_keys.pck, td_keys.signer, td_keys.attestation)}) == 5
