"""Every bit of every real report and quote flipped, one at a time: none may verify. Needs the shared vectors.

`python -m tests.fuzz.attest.bits [--only WORD] [--sample N]` prints one JSON object a vector. What counts is parse and
verify: no policy helps to refuse. test_tee_bits.py takes a sample of each vector.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pointcall_attest import collateral
from pointcall_attest.appraise import parse, verify
from pointcall_attest.errors import MalformedError
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.findings import UnverifiedError
from pointcall_attest.trust import Roots

VECTORS: Final = Path(__file__).resolve().parents[3] / "../shared/vectors/tee"


def real() -> dict[str, tuple[EvidenceBundle, datetime]]:
    """Every real report and quote that is authentic, by name, with the time of its verification."""
    rows: dict[str, dict[str, Any]] = json.loads((VECTORS / "expected.json").read_text())["vectors"]
    found = {}
    for name, row in rows.items():
        if row["kind"] == "snp":
            at = datetime.fromisoformat(row["verify_time"]).replace(tzinfo=UTC)
            files = (VECTORS / name / "report.bin").read_bytes(), (VECTORS / name / "vek.der").read_bytes()
            found[name] = EvidenceBundle("snp", files[0], (files[1],)), at
        elif row["kind"] == "tdx" and "sgx" not in name:
            texts = collateral.parse_json((VECTORS / row["collateral"]).read_bytes())
            quote = (VECTORS / name / "quote.bin").read_bytes()
            found[name] = EvidenceBundle("tdx", quote, collateral=texts), datetime.fromtimestamp(row["now"], UTC)
    return found


def authentic(bundle: EvidenceBundle, at: datetime) -> bool:
    """Whether it parses and verifies; any other error than the two declared ones comes out."""
    try:
        verify(parse(bundle), roots=Roots.of(), at=at)
    except (MalformedError, UnverifiedError):
        return False
    return True


def accepted(bundle: EvidenceBundle, at: datetime, bits: Iterable[int]) -> Iterator[int]:
    """The bits that can be flipped unnoticed: there must be none."""
    good = bundle.evidence
    for bit in bits:
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        if authentic(replace(bundle, evidence=bytes(raw)), at):
            yield bit


def main(words: Sequence[str]) -> int:
    """Flip, print, and fail where one flip verified."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="WORD", help="vectors whose name holds it")
    parser.add_argument("--sample", type=int, metavar="N", help="so many bits of each, by chance (default: all)")
    args = parser.parse_args(words)
    bad = 0
    for name, (bundle, at) in real().items():
        if args.only not in name:
            continue
        assert authentic(bundle, at), f"{name} itself is authentic"
        every, start = range(len(bundle.evidence) * 8), time.perf_counter()
        bits = every if args.sample is None else random.Random(1).sample(every, min(args.sample, len(every)))
        found = list(accepted(bundle, at, bits))
        bad += len(found)
        row = {"vector": name, "bits": len(every), "flipped": len(bits), "accepted": found}
        print(json.dumps(row | {"seconds": round(time.perf_counter() - start, 1)}), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
