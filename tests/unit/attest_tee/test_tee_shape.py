"""What holds for every module that verifies evidence: its types cannot be changed, its limits are those listed here."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest

from pointcall_attest import cert_table, certs, collateral, crl, eventlog, hcl, pck, snp, snp_chain, tdreport, tdx
from pointcall_attest.appraise import parse, verify
from pointcall_attest.emulated import EmulatedSnp
from pointcall_attest.emulated_tdx import EmulatedTdx
from pointcall_attest.errors import RefusedError
from pointcall_attest.trust import Roots
from pointcall_attest.verdict import Check, Verdict

Machine = Callable[..., EmulatedSnp]
TdxMachine = Callable[..., EmulatedTdx]
MODULES = (
    "appraise",
    "certificate_file",
    "certs",
    "collateral",
    "crl",
    "eventlog",
    "evidence",
    "hcl",
    "pck",
    "snp",
    "snp_chain",
    "tdreport",
    "tdvf",
    "tdx",
    "tdx_chain",
    "tdx_tcb",
    "trust",
    "verdict",
)
# Each with its reason at the code. Outside input may not make us work or keep more than this.
LIMITS = {
    "cert_table.MAX_ENTRIES": 32,
    "cert_table.MAX_TABLE_BYTES": 65_536,
    "certificate_file.MAX_FILE_BYTES": 4_194_304,
    "certs.MAX_CERTIFICATE_BYTES": 8_192,
    "certs.RSA_BITS": 4096,
    "collateral.MAX_COLLATERAL_BYTES": 524_288,
    "collateral.MAX_LEVELS": 256,
    "crl.MAX_CRL_BYTES": 1_048_576,
    "der.MAX_LENGTH": 65_535,
    "eventlog.MAX_EVENTS": 4096,
    "eventlog.MAX_LOG_BYTES": 1_048_576,
    "evidence.MAX_BUNDLE_BYTES": 2_097_152,
    "evidence.MAX_CERTIFICATES": 16,
    "evidence.MAX_EVIDENCE_BYTES": 65_536,
    "hcl.MAX_BRACKETS": 128,
    "hcl.MAX_HCL_BYTES": 65_536,
    "pck.MAX_CERTIFICATE_BYTES": 8_192,
    "pem.MAX_BLOCKS": 32,
    "snp_chain.MAX_CERTIFICATES": 16,
    "tdvf.MAX_ADDED_BYTES": 67_108_864,
    "tdvf.MAX_IMAGE_BYTES": 67_108_864,
    "tdvf.MAX_SECTIONS": 64,
    "tdx.MAX_QUOTE_BYTES": 65_536,
    "tee_policy.MAX_POLICY_BYTES": 65_536,
}


def types() -> Iterator[type]:
    for name in MODULES:
        module = importlib.import_module(f"pointcall_attest.{name}")
        for value in vars(module).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == module.__name__:
                yield value


@pytest.mark.parametrize("kind", tuple(types()), ids=lambda kind: kind.__qualname__)
def test_a_type_cannot_be_changed(kind: Any) -> None:
    assert kind.__dataclass_params__.frozen
    assert "__slots__" in vars(kind) or kind.__name__ == "Roots", "no attribute can be added either"


def test_limits_are_as_written() -> None:
    found = {}
    for name in LIMITS:
        module, constant = name.split(".")
        found[name] = getattr(importlib.import_module(f"pointcall_attest.{module}"), constant)
    assert found == LIMITS


def test_what_is_printed_of_a_value_is_short(machine: Machine, td: TdxMachine, now: datetime) -> None:
    """A repr ends up in logs and failed assertions: raw bytes, keys and signatures stay out of it."""
    one, other = machine(), td()
    bundle, quote = (
        one.bundle(one.report(bytes(64), bytes(48), bytes(32))),
        other.bundle(other.quote(bytes(64), bytes(48))),
    )
    parsed, quoted = parse(bundle), parse(quote)
    roots = Roots.of([one.ark, other.root])
    texts = collateral.parse(other.collateral())
    values: list[tuple[object, set[str]]] = [
        (certs.parse(one.leaf), {"raw", "issuer", "subject", "spki", "tbs", "signature"}),
        (crl.parse(texts.root_crl), {"raw", "tbs", "signature", "entries"}),
        (pck.parse(other.root), {"raw", "issuer", "subject", "key", "tbs", "signature"}),
        (snp.parse(bundle.evidence), {"raw"}),
        (tdx.parse(quote.evidence), {"raw", "signed_bytes", "signature", "qe_report", "qe_signature", "pck_pem"}),
        (texts, {field.name for field in dataclasses.fields(texts)}),
        (verify(parsed, roots=roots, at=now), {"seal"}),
        (verify(quoted, roots=roots, at=now), {"seal"}),
    ]
    for value, hidden in values:
        assert {field.name for field in dataclasses.fields(value) if not field.repr} == hidden  # type: ignore[arg-type]
    hcl_fields = {field.name for field in dataclasses.fields(hcl.HclReport) if not field.repr}
    assert hcl_fields == {"report", "runtime_data"}


def test_certificates_are_equal_by_their_bytes(machine: Machine, td: TdxMachine) -> None:
    for parse_one, raw in ((pck.parse, td().root), (crl.parse, bytes.fromhex(td().collateral()["root_ca_crl"]))):
        one = parse_one(raw)
        parse_one.cache_clear()
        again = parse_one(raw)
        assert one is not again
        assert (one, hash(one)) == (again, hash(raw))


def test_a_verdict_cannot_be_misread() -> None:
    good, bad = Check.of("a", True, expected=1, observed=1), Check.of("b", False, expected=1, observed=2, hint="do")
    with pytest.raises(TypeError, match="no truth value"):
        bool(Verdict((good,)))
    assert Verdict((good,)).require().passed
    assert bad.as_dict() == {"id": "b", "spec": "", "expected": "1", "observed": "2", "outcome": "fail", "hint": "do"}
    for checks, id_ in (((), "verdict.empty"), ((Check.skipped("c", "why"),), "verdict.empty"), ((good, bad), "b")):
        assert not Verdict(checks).passed
        with pytest.raises(RefusedError) as raised:
            Verdict(checks).require()
        assert raised.value.id == id_
    joined = Verdict((good,)).joined(
        [Verdict((bad,), "emulated", "snp", {"x": 1}), Verdict((good,), "hardware", "tdx")]
    )
    assert (joined.checks, joined.tier, joined.platform) == ((good, bad, good), "emulated", "snp")
    assert joined.claims == {"x": 1}
    assert Verdict((good,), platform="snp").joined([]).platform == "snp"


def test_the_layouts_agree_with_their_types() -> None:
    for layout, kind in ((snp.LAYOUT, snp.Report), (tdx.TD15_BODY, tdx.Body), (tdx.QE_REPORT, tdx.QeReport)):
        assert [name for name in kind.__annotations__ if name != "raw"] == list(layout.names)
    assert list(tdreport.TdReport.__annotations__) == list(tdreport.LAYOUT.names)
    assert (snp_chain.Tcbs._fields, len(cert_table.ENTRIES)) == (("current", "reported", "committed", "launch"), 5)
    assert eventlog.NO_ACTION == 3
