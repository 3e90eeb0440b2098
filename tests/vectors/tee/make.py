"""Vectors that nobody has seen in the wild, made by the emulated platforms.

`python -m tests.vectors.tee.make --out DIR` writes one evidence bundle a case, the emulated roots, and expected.json:
which checks must fail, which TCB status must come out. Keys are made for each run and are not kept; every file is
EMULATED. test_tee_made_vectors.py makes and judges all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from pointcall_attest.certs import Kind
from pointcall_attest.emulated import TCBS, EmulatedSnp, Keys
from pointcall_attest.emulated_tdx import CA, PCK, SIGNER, EmulatedTdx, PlatformRow, SvnRow, Tables
from pointcall_attest.emulated_tdx import Keys as TdxKeys
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.tee_policy import Line, TcbStatus

AT: Final = datetime(2026, 11, 20, tzinfo=UTC)
SPAN: Final = (AT - timedelta(days=1), AT + timedelta(days=6))
NOTHING: Final = (bytes(64), bytes(48))
OLD_MODULE: Final = bytes((3, 1, 5)).ljust(16, b"\0")
MODULES: Final = {"TDX_01": (SvnRow("UpToDate", 5), SvnRow("OutOfDate", 3))}
STATUSES: Final[tuple[TcbStatus, ...]] = (
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "Revoked",
)


@dataclass(frozen=True)
class Case:
    """One bundle and what must happen to it where emulation is allowed."""

    name: str
    bundle: EvidenceBundle
    failed: tuple[str, ...] = ()
    status: TcbStatus | None = None


def snp_cases(one: rsa.RSAPrivateKey, two: rsa.RSAPrivateKey) -> Iterator[Case | bytes]:
    """Venice, VLEK on every line, a masked chip key, a revoked intermediate; each with its root before it."""
    lines: tuple[tuple[Line, Kind], ...] = (("Venice", "VCEK"), ("Genoa", "VLEK"), ("Turin", "VLEK"), ("Milan", "VCEK"))
    for line, kind in lines:
        keys = Keys(one, two, ec.generate_private_key(ec.SECP384R1()))
        machine = EmulatedSnp(line, keys, b"12345678", *SPAN, TCBS[line], kind)
        yield machine.ark
        report = machine.report(*NOTHING, bytes(32))
        yield Case(f"snp-{line}-{kind}".lower(), machine.bundle(report))
    masked = machine.report(*NOTHING, bytes(32), key_info=2)
    unsigned = masked[:0x2A0] + bytes(len(masked) - 0x2A0)
    yield Case("snp-masked-chip-key", machine.bundle(unsigned), ("snp.signing_key", "snp.signature"))
    crl = machine.crl([0x1_0001], *SPAN)
    revoked = EvidenceBundle("snp", report, machine.certificates, (crl,))
    yield Case("snp-revoked-intermediate", revoked, ("snp.crl",))


def tdx_cases(keys: TdxKeys) -> Iterator[Case | bytes]:
    """Every TCB status, relaunch advised, revoked certificates; one machine for each set of versions."""
    machine = EmulatedTdx(keys, *SPAN)
    yield machine.root
    quote = machine.quote(*NOTHING)
    yield Case("tdx-up-to-date", machine.bundle(quote), (), "UpToDate")
    for status in STATUSES:
        tables = Tables((PlatformRow(status),))
        yield Case(f"tdx-{status}".lower(), machine.bundle(quote, tables), ("tdx.tcb_status",), status)
    for name, serial, check in (
        ("pck", PCK, "tdx.pck_crl"),
        ("ca", CA, "tdx.root_crl"),
        ("signer", SIGNER, "tdx.root_crl"),
    ):
        yield Case(f"tdx-revoked-{name}", machine.bundle(quote, revoked=(serial,)), (check,))
    old = EmulatedTdx(keys, *SPAN, svn=OLD_MODULE)
    yield old.root
    relaunch: tuple[tuple[TcbStatus, TcbStatus], ...] = (
        ("UpToDate", "TDRelaunchAdvised"),
        ("ConfigurationNeeded", "TDRelaunchAdvisedConfigurationNeeded"),
    )
    for platform, status in relaunch:
        bundle = old.bundle(old.quote(*NOTHING), Tables((PlatformRow(platform),), MODULES))
        yield Case(f"tdx-{status}".lower(), bundle, ("tdx.tcb_status",), status)
    below = EmulatedTdx(keys, *SPAN, sgx=4)
    yield below.root
    unsupported = below.bundle(below.quote(*NOTHING))
    yield Case("tdx-tcbnotsupported", unsupported, ("tdx.tcb_status",), "TCBNotSupported")


def everything() -> tuple[list[Case], list[bytes]]:
    """All cases and the emulated roots they need."""
    one, two = (rsa.generate_private_key(65537, 4096) for _ in range(2))
    keys = TdxKeys(*(ec.generate_private_key(ec.SECP256R1()) for _ in range(5)))
    found = [*snp_cases(one, two), *tdx_cases(keys)]
    return [case for case in found if isinstance(case, Case)], [root for root in found if isinstance(root, bytes)]


def write(folder: Path) -> None:
    """The cases as files."""
    cases, roots = everything()
    (folder / "emulated").mkdir(parents=True, exist_ok=True)
    for number, root in enumerate(roots):
        (folder / "emulated" / f"{number}.der").write_bytes(root)
    expected: dict[str, Any] = {"at": AT.isoformat(), "cases": {}}
    for case in cases:
        (folder / f"{case.name}.json").write_bytes(case.bundle.encode())
        expected["cases"][case.name] = {"failed": case.failed, "tcb_status": case.status}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    write(parser.parse_args(words).out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
