"""Mutation fuzzing of every parser of TEE evidence. Not a test by itself: test_fuzz_tee.py runs it for a moment.

`python -m tests.fuzz.attest.mutants --inputs 1000000` is the long run (`make fuzz`). One seed for chance: a failure
prints the parser, the seed and the bytes that repeat it. Rules: only MalformedError comes out, no input takes longer
than a second, the process never grows beyond 256 MB.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from pointcall_attest import (
    cert_table,
    certificate_file,
    certs,
    collateral,
    crl,
    eventlog,
    hcl,
    pck,
    pem,
    shown,
    snp,
    tdreport,
    tdvf,
    tdx,
)
from pointcall_attest.appraise import appraise_bundle
from pointcall_attest.emulated import TCBS, EmulatedSnp, Keys
from pointcall_attest.emulated_tdx import EmulatedTdx
from pointcall_attest.emulated_tdx import Keys as TdxKeys
from pointcall_attest.errors import MalformedError
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.tee_policy import TeePolicy
from pointcall_attest.trust import Roots, vendor_certificates

VECTORS: Final = Path(__file__).resolve().parents[3] / "../shared/vectors/tee"
MAX_SECONDS: Final = 1.0
MAX_RSS_KIB: Final = 256 * 1024
NOW: Final = datetime(2026, 11, 20, tzinfo=UTC)
INTERESTING: Final = (0, 1, 2, 0x7F, 0x80, 0x81, 0x82, 0xFF)
Parser = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """One parser and good inputs to start from."""

    name: str
    parse: Parser
    seeds: tuple[bytes, ...]


@cache
def machines() -> tuple[EmulatedSnp, EmulatedTdx]:
    """Emulated machines with keys of this run."""
    big = rsa.generate_private_key(65537, 4096)
    span = (NOW - timedelta(days=1), NOW + timedelta(days=6))
    first = EmulatedSnp(
        "Milan", Keys(big, big, ec.generate_private_key(ec.SECP384R1())), b"12345678", *span, TCBS["Milan"]
    )
    keys = TdxKeys(*(ec.generate_private_key(ec.SECP256R1()) for _ in range(5)))
    return first, EmulatedTdx(keys, *span)


@cache
def targets() -> tuple[Target, ...]:
    """Every parser with its seeds: emulated evidence, and the real vectors where they are."""
    one, td = machines()
    report, quote = one.report(bytes(64), bytes(48), bytes(32)), td.quote(bytes(64), bytes(48))
    texts = td.collateral()
    amd_crl = one.crl([1, 2], NOW, NOW + timedelta(days=1))
    chain = tdx.pck_certificates(td.chain_pem)
    blobs = {cert_table.ENTRIES[name]: der for name, der in zip(("VCEK", "ASK", "ARK"), one.certificates, strict=True)}
    table = cert_table.encode(blobs)
    bundles = (one.bundle(report).encode(), td.bundle(quote).encode())
    blocks = b"".join(pem.encode("CERTIFICATE", der) for der in one.certificates)
    policy = TeePolicy().model_dump_json().encode()
    return (
        Target("snp.parse", snp.parse, (report, *real("snp/*/report.bin"))),
        Target("tdx.parse", tdx.parse, (quote, *real("tdx/*/quote.bin"))),
        Target("tdx.pck_certificates", tdx.pck_certificates, (td.chain_pem,)),
        Target("certs.parse", certs.parse, (*one.certificates, *vendor_certificates(), *real("snp/*/vek.der"))),
        Target("pck.parse", pck.parse, (*chain, *vendor_certificates()[-1:])),
        Target("crl.parse", crl.parse, (amd_crl, bytes.fromhex(texts["pck_crl"]))),
        Target("cert_table.parse", cert_table.parse, (table, *real("snp_certtable/*.bin"))),
        Target("certificate_file.read", certificate_file.read, (table, blocks, amd_crl, one.leaf)),
        Target("evidence.parse", EvidenceBundle.parse, bundles),
        Target("collateral.parse_json", lambda raw: collateral.parse(collateral.parse_json(raw)), (dumped(texts),)),
        Target("collateral.tcb_info", collateral.parse_tcb_info, (texts["tcb_info"].encode(),)),
        Target("collateral.qe_identity", collateral.parse_qe_identity, (texts["qe_identity"].encode(),)),
        Target("eventlog.parse", eventlog.parse, (event_log(), *real("eventlog/ccel_unpadded.bin"))),
        Target("hcl.parse", hcl.parse, (hcl_report(report), *real("azure_hcl/*.bin"))),
        Target("tdreport.parse", tdreport.parse, (bytes(1024), *real("tdreport/*.bin"))),
        Target("tdvf.measure", tdvf.measure, (firmware(),)),
        Target("tee_policy.parse", TeePolicy.parse, (policy,)),
        Target(
            "shown.described",
            shown.described,
            (report, quote, table, one.leaf, chain[0], amd_crl, blocks, dumped(texts), hcl_report(report), *bundles),
        ),
        Target("appraise.snp", judge_snp, (report,)),
        Target("appraise.certificate", judge_certificate, (one.leaf, one.ca)),
        Target("appraise.tdx", judge_tdx, (quote,)),
        Target("appraise.collateral", judge_collateral, (dumped(texts),)),
    )


def dumped(texts: Mapping[str, str]) -> bytes:
    return json.dumps(dict(texts)).encode()


def real(pattern: str) -> tuple[bytes, ...]:
    return tuple(path.read_bytes() for path in sorted(VECTORS.glob(pattern)))


def event_log() -> bytes:
    spec = struct.pack("<16sIBBBBIHH", b"Spec ID Event03\0", 0, 0, 2, 0, 2, 1, 0x0C, 48) + b"\0"
    event = struct.pack("<IIIH48sI", 1, 4, 1, 0x0C, b"\1" * 48, 4) + b"data"
    return struct.pack("<II20sI", 1, 3, bytes(20), len(spec)) + spec + event * 3 + b"\xff" * 32


def hcl_report(report: bytes) -> bytes:
    runtime = b'{"keys":[]}'
    head = struct.pack("<4sIIII12x", b"HCLA", 1, 1236 + len(runtime), 2, 0)
    return head + report + struct.pack("<IIIII", 20 + len(runtime), 1, 2, 1, len(runtime)) + runtime


def firmware() -> bytes:
    raw = bytearray(8192)
    raw[256:304] = struct.pack("<4sIIIIIQQII", b"TDVF", 48, 1, 1, 4096, 4096, 0x1000, 4096, 0, 1)
    table = struct.pack("<IH16s", 8192 - 256, 22, tdvf._METADATA)
    table += struct.pack("<H16s", len(table) + 18, tdvf._FOOTER)
    raw[8192 - 32 - len(table) : 8192 - 32] = table
    return bytes(raw)


def judged(bundle: EvidenceBundle) -> bool:
    """Appraisal never raises: whether the bundle is accepted where emulation is allowed."""
    one, td = machines()
    policy, roots = TeePolicy(allow_emulated=True), Roots.of([one.ark, td.root])
    return appraise_bundle(bundle, policy=policy, roots=roots, at=NOW, report_data=None, measurements=None).passed


def judge_snp(raw: bytes) -> bool:
    return judged(EvidenceBundle("snp", raw, machines()[0].certificates))


def judge_certificate(raw: bytes) -> bool:
    one = machines()[0]
    return judged(EvidenceBundle("snp", targets_report(), (raw, *one.certificates)))


@cache
def targets_report() -> bytes:
    return machines()[0].report(bytes(64), bytes(48), bytes(32))


def judge_tdx(raw: bytes) -> bool:
    return judged(EvidenceBundle("tdx", raw, collateral=machine_texts()))


@cache
def machine_texts() -> dict[str, str]:
    return machines()[1].collateral()


@cache
def machine_quote() -> bytes:
    return machines()[1].quote(bytes(64), bytes(48))


def judge_collateral(raw: bytes) -> bool:
    return judged(EvidenceBundle("tdx", machine_quote(), collateral=collateral.parse_json(raw)))


def mutate(raw: bytes, chance: random.Random) -> bytes:
    """One to four small changes: a bit, a byte, a number, a cut, a copy, a swap or a splice."""
    changed = bytearray(raw)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed) + 1) if changed else 0
        match chance.randrange(8):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1 if at < len(changed):
                changed[at] = chance.choice(INTERESTING)
            case 2:
                changed[at : at + 4] = chance.choice((0, 1, 0xFFFF, 0xFFFF_FFFF, len(raw), 1 << 31)).to_bytes(
                    4, "little"
                )
            case 3:
                del changed[at : at + chance.randint(1, 64)]
            case 4:
                changed[at:at] = changed[at : at + chance.randint(1, 64)]
            case 5:
                changed[at:at] = chance.randbytes(chance.randint(1, 16))
            case 6:
                del changed[at:]
            case _:
                other = chance.randrange(len(changed) + 1)
                changed[at : at + 8] = changed[other : other + 8]
    return bytes(changed)


def run(target: Target, inputs: int, seed: int) -> int:
    """Feed mutants to one parser; AssertionError with everything that repeats it where a rule is broken."""
    chance = random.Random(f"{seed}/{target.name}")
    accepted = 0
    for number in range(inputs):
        raw = mutate(chance.choice(target.seeds), chance)
        start = time.perf_counter()
        try:
            target.parse(raw)
            accepted += 1
        except MalformedError:
            pass
        except Exception as error:
            raise AssertionError(f"{target.name}, seed {seed}, input {number}: {error!r}\n{raw.hex()}") from error
        took = time.perf_counter() - start
        assert took < MAX_SECONDS, f"{target.name}, seed {seed}, input {number}: {took:.2f} s\n{raw[:200].hex()}"
    return accepted


def flips(raw: bytes, accepts: Callable[[bytes], bool]) -> Iterator[int]:
    """Every bit whose flip is still accepted: there must be none."""
    assert accepts(raw), "the evidence itself is good"
    for bit in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        if accepts(bytes(changed)):
            yield bit


def main(words: Sequence[str]) -> int:
    """The long run: mutants for every parser, then every bit of a report and a quote."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="over all parsers")
    parser.add_argument("--seed", type=int, default=time.time_ns())
    args = parser.parse_args(words)
    each = -(-args.inputs // len(targets()))
    for target in targets():
        start = time.perf_counter()
        accepted = run(target, each, args.seed)
        took = time.perf_counter() - start
        print(
            json.dumps(
                {"parser": target.name, "inputs": each, "still_well_formed": accepted, "seconds": round(took, 1)}
            )
        )
    for name, raw, judge in (("report", targets_report(), judge_snp), ("quote", machine_quote(), judge_tdx)):
        accepted_bits = list(flips(raw, judge))
        print(json.dumps({"bits_flipped": len(raw) * 8, "of": name, "accepted": accepted_bits}))
        assert not accepted_bits
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seed": args.seed, "max_rss_kib": grown, "limit_kib": MAX_RSS_KIB}))
    return 0 if grown < MAX_RSS_KIB else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
