"""Every vector of real evidence, and every negative made from one, gets the verdict that expected.json names."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest import cert_table, collateral, eventlog, snp, tdx
from pointcall_attest.appraise import appraise_bundle
from pointcall_attest.errors import MalformedError
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.tee_policy import TeePolicy
from pointcall_attest.trust import Roots, vendor_certificates
from pointcall_attest.verdict import Verdict

VECTORS = Path(__file__).resolve().parents[3] / "../shared/vectors/tee"
EXPECTED = VECTORS / "expected.json"
if not EXPECTED.exists():
    pytest.skip("the TEE vectors are not here", allow_module_level=True)
ROWS: dict[str, dict[str, Any]] = json.loads(EXPECTED.read_text())["vectors"]

# The one check that each negative must fail first; words of expected.json -> our ids.
REASONS = {
    "snp/milan_v2_debug": {"snp.debug", "snp.version"},
    "snp/milan_v2": {"snp.version"},
    "snp/azure_milan_v2_hcl": {"snp.version"},
    "snp/vlek_milan_v3_vmpl1": {"snp.vmpl"},
    "snp_negative/bit_measurement": {"snp.signature"},
    "snp_negative/bit_report_data": {"snp.signature"},
    "snp_negative/bit_policy_debug": {"snp.signature"},
    "snp_negative/bit_sig_r_pad": {"snp.reserved.malformed"},
    "snp_negative/bit_sig_tail": {"snp.reserved.malformed"},
    "snp_negative/sig_zero": {"snp.signature"},
    "snp_negative/truncated_1183": {"snp.length.malformed"},
    "snp_negative/trailing_1": {"snp.length.malformed"},
    "snp_negative/version_1": {"snp.version.malformed"},
    "snp_negative/version_6": {"snp.version.malformed"},
    "snp_negative/version_ffffffff": {"snp.version.malformed"},
    "snp_negative/sigalgo_2": {"snp.algorithm.malformed"},
    "snp_negative/unknown_fms": {"snp.product", "snp.signature"},
    "snp_negative/signing_key_none": {"snp.signing_key", "snp.signature"},
    "snp_negative/empty": {"snp.length.malformed"},
    "snp_negative/forged_root_milan": {"snp.root"},
    "snp_negative/cross_product": {"snp.product", "snp.certificate_tcb", "snp.chip_id", "snp.signature"},
    "snp_negative/self_made_vcek_legacy": {"snp.leaf", "snp.certificate_tcb", "snp.chip_id", "snp.signature"},
    "snp_negative/self_made_vcek_new": {"cert.malformed"},
    "tdx/v4_outofdate_module_ok": {"tdx.tcb_status"},
    "tdx/v4_debug_td": {"tdx.debug"},
    "tdx/v4_tcb_unsupported": {"tdx.tcb_status"},
    "tdx/v5_td15_unsupported": {"tdx.tcb_status"},
    "tdx/v5_td15_mrservicetd": {"tdx.tcb_status", "tdx.mrservicetd"},
    "tdx/sgx_v3_config_swhardening": {"tdx.version.malformed"},
    "tdx_negative/bit_mrtd": {"tdx.signature"},
    "tdx_negative/bit_report_data": {"tdx.signature"},
    "tdx_negative/bit_attr_debug": {"tdx.signature"},
    "tdx_negative/bit_attestation_key": {"tdx.qe_binding", "tdx.signature"},
    "tdx_negative/bit_qe_report": {"tdx.qe.reserved.malformed"},
    "tdx_negative/bit_qe_authdata": {"tdx.qe_binding"},
    "tdx_negative/version_6": {"tdx.version.malformed"},
    "tdx_negative/teetype_sgx": {"tdx.tee_type.malformed"},
    "tdx_negative/vendor_id": {"tdx.vendor", "tdx.signature"},
    "tdx_negative/keytype_3": {"tdx.key_type.malformed"},
    "tdx_negative/truncated": {"tdx.length.malformed"},
    "tdx_negative/siglen_huge": {"tdx.length.malformed"},
    "tdx_negative/certdata_type_7": {"tdx.certification.malformed"},
    "tdx_negative/trailing_garbage": {"tdx.trailing.malformed"},
    "tdx_negative/root_pem_malleated": {"tdx.root"},
    "collateral_negative/tcbinfo_status_flipped.json": {"tdx.tcb_info"},
    "collateral_negative/qeidentity_svn_lowered.json": {"tdx.qe_identity"},
    "collateral_negative/crl_swapped.json": {"tdx.pck_crl"},
    "collateral_negative/tcbinfo_other_fmspc.json": {
        "tdx.validity",
        "tdx.pck_crl",
        "tdx.collateral_dates",
        "tdx.fmspc",
    },
    "collateral_negative/tcbinfo_other_fmspc_in_date.json": {"tdx.fmspc"},
    "collateral_negative/expired.json": {"tdx.root_crl", "tdx.pck_crl", "tdx.collateral_dates"},
    "collateral_negative/future.json": {"tdx.validity", "tdx.root_crl", "tdx.pck_crl", "tdx.collateral_dates"},
}


def names(*kinds: str) -> list[str]:
    return [name for name, row in ROWS.items() if row["kind"] in kinds]


def judged(bundle: EvidenceBundle, at: datetime) -> Verdict:
    return appraise_bundle(bundle, policy=TeePolicy(), roots=Roots.of(), at=at, report_data=None, measurements=None)


def snp_time(row: dict[str, Any]) -> datetime:
    origin = row if "verify_time" in row else ROWS.get(row.get("derived_from", ""), ROWS["snp/milan_v3"])
    return datetime.fromisoformat(origin["verify_time"]).replace(tzinfo=UTC)


def check_expected(name: str, verdict: Verdict) -> None:
    assert ("accept" if verdict.passed else "reject") == ROWS[name]["default_verdict"], verdict.failed
    assert {check.id for check in verdict.failed} == REASONS.get(name, set())


@pytest.mark.parametrize("name", names("snp", "snp_negative"))
def test_snp_vector(name: str) -> None:
    folder, row = VECTORS / name, ROWS[name]
    certificates = tuple(path.read_bytes() for path in sorted(folder.glob("*.der")))
    bundle = EvidenceBundle("snp", (folder / "report.bin").read_bytes(), certificates)
    verdict = judged(bundle, snp_time(row))
    check_expected(name, verdict)
    if row["kind"] == "snp":
        claims = verdict.claims
        assert (claims["line"], claims["measurement"]) == (row["product_line"], row["measurement"])
        tcb = {key: claims["reported_tcb"][key] for key in row["reported_tcb"]}
        assert tcb == row["reported_tcb"]


@pytest.mark.parametrize("name", names("snp"))
def test_snp_report_survives_the_round_trip(name: str) -> None:
    raw = (VECTORS / name / "report.bin").read_bytes()
    assert snp.encode(dict(zip(snp.LAYOUT.names, snp.LAYOUT.read(raw), strict=True))) == raw


def tdx_bundle(name: str) -> EvidenceBundle:
    row = ROWS[name]
    texts = collateral.parse_json((VECTORS / row.get("collateral", name)).read_bytes())
    log = VECTORS / name / "ccel_data.dat"
    quote = (VECTORS / row.get("quote", name) / "quote.bin").read_bytes()
    return EvidenceBundle("tdx", quote, collateral=texts, event_log=log.read_bytes() if log.exists() else None)


@pytest.mark.parametrize("name", names("tdx", "tdx_negative", "collateral_negative"))
def test_tdx_vector(name: str) -> None:
    row = ROWS[name]
    verdict = judged(tdx_bundle(name), datetime.fromtimestamp(row["now"], UTC))
    check_expected(name, verdict)
    if (semantics := row.get("intel_semantics")) and verdict.claims:
        assert verdict.claims["tcb_status"] == semantics["status"]
        if "tcb_date" in semantics:
            assert verdict.claims["tcb_date"] == semantics["tcb_date"]
            assert verdict.claims["advisories"] == semantics["advisories"]
            assert verdict.claims["tcb_evaluation_number"] == semantics["tcb_eval"]


def test_the_real_event_log_replays_and_another_does_not() -> None:
    name = "tdx/v4_gcp_ccel"
    bundle, at = tdx_bundle(name), datetime.fromtimestamp(ROWS[name]["now"], UTC)
    assert {c.id: c.outcome for c in judged(bundle, at).checks}["tdx.event_log"] == "pass"
    other = (VECTORS / "eventlog/ccel_ovmf.bin").read_bytes()
    mixed = EvidenceBundle("tdx", bundle.evidence, collateral=bundle.collateral, event_log=other)
    assert [c.id for c in judged(mixed, at).failed] == ["tdx.event_log"]


@pytest.mark.parametrize("name", names("ccel"))
def test_event_log_vector(name: str) -> None:
    row, log = ROWS[name], eventlog.parse((VECTORS / name).read_bytes())
    assert (len(log.events), log.end) == (row["events"], row["end"][1])
    assert {str(i): value.hex() for i, value in enumerate(log.replay()) if str(i) in row["rtmr"]} == row["rtmr"]


@pytest.mark.parametrize("name", names("cert_table"))
def test_certificate_table_vector(name: str) -> None:
    row, raw = ROWS[name], (VECTORS / name).read_bytes()
    if row["default_verdict"] == "reject":
        with pytest.raises(MalformedError):
            cert_table.parse(raw)
        return
    found = cert_table.parse(raw)
    assert [(guid.bytes.hex(), len(blob)) for guid, blob in found.items()] == [(g, n) for g, _, n in row["entries"]]
    assert cert_table.encode(found) == raw[: sum(map(len, found.values())) + 96]


def test_the_shipped_certificates_are_those_of_the_vectors() -> None:
    theirs = {path.read_bytes() for path in (VECTORS / "common").rglob("*.der")}
    assert set(vendor_certificates()) == theirs


def test_the_pinned_digests_are_those_of_the_vectors() -> None:
    roots = json.loads(EXPECTED.read_text())["roots"]
    ours = {hashlib.sha256(der).hexdigest() for der in vendor_certificates()}
    assert ours == {row["sha256"] for row in roots.values()}


def test_trailing_zeros_of_a_quote_are_not_signed_but_bounded() -> None:
    raw = (VECTORS / "tdx/v5_td15_uptodate/quote.bin").read_bytes()
    assert tdx.parse(raw + bytes(100)).signed_bytes == tdx.parse(raw).signed_bytes
    with pytest.raises(MalformedError):
        tdx.parse(raw + bytes(tdx.MAX_QUOTE_BYTES))
