"""Two verifiers must agree: `dcap-qvl` judges every TDX quote too. Each difference is listed here with its reason."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest import collateral
from pointcall_attest.appraise import appraise_bundle
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.tee_policy import TeePolicy
from pointcall_attest.trust import Roots
from pointcall_attest.verdict import Verdict
from tests.fuzz.attest.mutants import NOW, machines, mutate

dcap_qvl = pytest.importorskip("dcap_qvl", reason="the package dcap-qvl is not installed")
VECTORS = Path(__file__).resolve().parents[3] / "../shared/vectors/tee"
if not VECTORS.exists():
    pytest.skip("the TEE vectors are not here", allow_module_level=True)
ROWS: dict[str, dict[str, Any]] = {
    name: row
    for name, row in json.loads((VECTORS / "expected.json").read_text())["vectors"].items()
    if row["kind"] in ("tdx", "tdx_negative", "collateral_negative")
}

# We refuse, dcap-qvl accepts: evidence that can be rewritten without breaking a signature, or another policy.
STRICTER = {
    "tdx_negative/certdata_type_7": "certification data that is not type 6 around 5",
    "tdx_negative/trailing_garbage": "bytes after the quote that are not zero",
    "tdx_negative/root_pem_malleated": "a root that is not the pinned one byte for byte",
    "tdx/sgx_v3_config_swhardening": "an SGX quote is no TDX quote",
    "tdx/v4_outofdate_module_ok": "dcap-qvl reports the status and leaves the refusal to its caller",
}


def files(name: str) -> tuple[bytes, bytes, int]:
    row = ROWS[name]
    quote = (VECTORS / row.get("quote", name) / "quote.bin").read_bytes()
    return quote, (VECTORS / row.get("collateral", name)).read_bytes(), row["now"]


def ours(name: str) -> Verdict:
    quote, texts, now = files(name)
    bundle = EvidenceBundle("tdx", quote, collateral=collateral.parse_json(texts))
    at = datetime.fromtimestamp(now, UTC)
    return appraise_bundle(bundle, policy=TeePolicy(), roots=Roots.of(), at=at, report_data=None, measurements=None)


def theirs(name: str) -> tuple[str, list[str]] | None:
    """(status, advisories), or None where dcap-qvl refuses."""
    quote, texts, now = files(name)
    try:
        found = dcap_qvl.verify(quote, dcap_qvl.QuoteCollateralV3.from_json(texts.decode()), now)
    except ValueError:
        return None
    return str(found.status), list(found.advisory_ids)


@pytest.mark.parametrize("name", ROWS)
def test_no_contradiction(name: str) -> None:
    verdict, other = ours(name), theirs(name)
    if other is None or name in STRICTER:
        assert not verdict.passed
    else:
        assert verdict.passed
        assert verdict.claims["tcb_status"] == other[0]
        assert verdict.claims["advisories"] == other[1]


def test_what_we_accept_of_changed_quotes_they_accept_too() -> None:
    chance = random.Random(0x5EED)
    good, texts, now = files("tdx/v5_td15_uptodate")
    parts, at = collateral.parse_json(texts), datetime.fromtimestamp(now, UTC)
    theirs_parts = dcap_qvl.QuoteCollateralV3.from_json(texts.decode())
    for _ in range(200):
        raw = mutate(good, chance)
        bundle = EvidenceBundle("tdx", raw, collateral=parts)
        verdict = appraise_bundle(
            bundle, policy=TeePolicy(), roots=Roots.of(), at=at, report_data=None, measurements=None
        )
        if verdict.passed:
            dcap_qvl.verify(raw, theirs_parts, now)


def test_they_refuse_emulated_evidence() -> None:
    _, td = machines()
    texts = json.dumps(td.collateral() | {"pck_crl_issuer_chain": td.signer_pem.decode()})
    parts = dcap_qvl.QuoteCollateralV3.from_json(texts)
    quote, now = td.quote(bytes(64), bytes(48)), int(NOW.timestamp())
    with pytest.raises(ValueError, match=r"."):
        dcap_qvl.verify(quote, parts, now)
    with pytest.raises(ValueError, match=r"."):
        dcap_qvl.verify_with_root_ca(quote, parts, td.root, now)


def test_every_documented_difference_is_one() -> None:
    assert [name for name in STRICTER if theirs(name) is None] == []
