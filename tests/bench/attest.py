"""What it costs to verify evidence, beside `dcap-qvl` and a bare signature check in the same run.

`python -m tests.bench.attest` prints one JSON object a figure. First: nothing is memoised, every certificate is parsed
and every signature checked, as in a process that just started. Cold: nothing about this evidence is memoised; of the CA
certificates that we ship and pin the process has read all and checked that AMD's roots signed AMD's intermediates.
Cached: chain and collateral were seen before, as when a node renews its evidence. Rounds of all candidates are
interleaved, so that a busy machine shifts all sides. Needs the shared vectors; asserts nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from pointcall_attest import certs, collateral, crl, pck, snp_chain, tdx_chain
from pointcall_attest.appraise import appraise_bundle
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.tee_policy import TeePolicy
from pointcall_attest.trust import Roots, vendor_certificates
from tests.bench.figures import figure, percentile

VECTORS: Final = Path(__file__).resolve().parents[2] / "../shared/vectors/tee"
ROUNDS: Final = 300
MEMOISED: Final[tuple[Any, ...]] = (
    certs.parse,
    certs.signed_by,
    certs.name_parts,
    certs._rsa_key,
    snp_chain._p384_key,
    pck.parse,
    pck.issued,
    pck.key_of,
    crl.parse,
    crl.signed_by_intel,
    collateral._parsed,
    collateral.parse_tcb_info,
    collateral.parse_qe_identity,
    tdx_chain._chain,
    tdx_chain._text_signed,
)
Work = Callable[[], object]


def main() -> None:
    """Measure and print."""
    if not VECTORS.exists():
        print(json.dumps({"suite": "attest", "skipped": "the TEE vectors are not here"}))
        return
    times = _measured(_candidates())
    for metric, baseline in (
        ("snp_verify_first_us_p50", "p384_verify"),
        ("snp_verify_cold_us_p50", "p384_verify"),
        ("snp_verify_cached_us_p50", "p384_verify"),
        ("tdx_verify_first_us_p50", "dcap_qvl"),
        ("tdx_verify_cold_us_p50", "dcap_qvl"),
        ("tdx_verify_cached_us_p50", "dcap_qvl"),
        ("tdx_verify_cold_us_p50", "p256_verify"),
    ):
        _print(times, metric, baseline)
    for name in ("dcap_qvl", "p384_verify", "p256_verify"):
        if name in times:
            figure("attest", f"{name}_us_p50", percentile(times[name], 0.5), "us", ROUNDS, peer=name)


def _print(times: Mapping[str, list[float]], metric: str, baseline: str) -> None:
    """The median, and the tenth of the rounds that others on the machine disturbed least."""
    name = metric.removesuffix("_us_p50")
    if baseline not in times:
        return
    peer, run = baseline if baseline == "dcap_qvl" else None, f"{baseline} in the same run"
    for share, word in ((0.5, "p50"), (0.1, "p10")):
        value, other = percentile(times[name], share), percentile(times[baseline], share)
        figure("attest", f"{name}_us_{word}", value, "us", ROUNDS, baseline=run, ratio=value / other, peer=peer)


def _measured(candidates: Mapping[str, Work]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, work in candidates.items():
            if name.endswith(("_first", "_cold")):
                for function in MEMOISED:
                    function.cache_clear()
                if name.endswith("_cold"):
                    _read_ours()
            else:
                work()  # memoised, and warm in the processor's caches
            start = time.perf_counter()
            work()
            times[name].append((time.perf_counter() - start) * 1e6)
    return times


def _read_ours() -> None:
    """What a process knows of the shipped CA certificates after its first verification, whosever evidence that was."""
    *amd, intel = vendor_certificates()
    pck.parse(intel)
    found = [certs.parse(der) for der in amd]
    for ark, of in ((ark, of) for ark in found for of in found if ark.kind == "ARK" and of.issuer == ark.subject):
        assert of.kind == "ARK" or certs.signed_by(ark.spki, of.signature, of.tbs)


def _candidates() -> dict[str, Work]:
    snp_work, tdx_work = _snp(), _tdx()
    found = {
        "snp_verify_first": snp_work,
        "snp_verify_cold": snp_work,
        "snp_verify_cached": snp_work,
        "tdx_verify_first": tdx_work,
        "tdx_verify_cold": tdx_work,
        "tdx_verify_cached": tdx_work,
        "p384_verify": _signature(ec.SECP384R1(), hashes.SHA384()),
        "p256_verify": _signature(ec.SECP256R1(), hashes.SHA256()),
    }
    if importlib.util.find_spec("dcap_qvl"):
        found["dcap_qvl"] = _dcap_qvl()
    return found


def _judge(bundle: EvidenceBundle, at: datetime) -> Work:
    policy, roots = TeePolicy(), Roots.of()

    def work() -> None:
        verdict = appraise_bundle(bundle, policy=policy, roots=roots, at=at, report_data=None, measurements=None)
        verdict.require()

    return work


def _snp() -> Work:
    names = ("snp/genoa_v5/vek.der", "common/amd/genoa_ask.der", "common/amd/genoa_ark.der")
    chain = tuple((VECTORS / name).read_bytes() for name in names)
    return _judge(
        EvidenceBundle("snp", (VECTORS / "snp/genoa_v5/report.bin").read_bytes(), chain),
        datetime(2026, 3, 1, tzinfo=UTC),
    )


def _tdx() -> Work:
    quote, texts, at = _tdx_files()
    return _judge(EvidenceBundle("tdx", quote, collateral=collateral.parse_json(texts)), at)


def _tdx_files() -> tuple[bytes, bytes, datetime]:
    name = "tdx/v5_td15_uptodate"
    row = json.loads((VECTORS / "expected.json").read_text())["vectors"][name]
    texts = (VECTORS / row["collateral"]).read_bytes()
    return (VECTORS / name / "quote.bin").read_bytes(), texts, datetime.fromtimestamp(row["now"], UTC)


def _dcap_qvl() -> Work:
    library = importlib.import_module("dcap_qvl")
    quote, texts, at = _tdx_files()
    parts = library.QuoteCollateralV3.from_json(texts.decode())
    return lambda: library.verify(quote, parts, int(at.timestamp()))


def _signature(curve: ec.EllipticCurve, algorithm: hashes.HashAlgorithm) -> Work:
    key = ec.generate_private_key(curve)
    public, message = key.public_key(), hashlib.sha256(b"message").digest()
    signature = key.sign(message, ec.ECDSA(algorithm))
    return lambda: public.verify(signature, message, ec.ECDSA(algorithm))


if __name__ == "__main__":
    main()
