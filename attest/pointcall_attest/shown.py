"""Any evidence file as named fields, for people. Says what bytes claim; nothing here is verified. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any, Final

from pointcall_attest import (
    cert_table,
    certs,
    collateral,
    crl,
    eventlog,
    hcl,
    measure,
    pck,
    pem,
    snp,
    snp_rules,
    tdreport,
    tdx,
    tdx_rules,
)
from pointcall_attest.errors import MalformedError
from pointcall_attest.evidence import EvidenceBundle


def described(raw: bytes) -> dict[str, Any]:
    """`{"form": ..., fields}`; MalformedError `evidence.form.malformed` where no format fits, with every reason."""
    reasons = []
    for form, read in _FORMS.items():
        try:
            return {"form": form, **read(raw)}
        except MalformedError as error:
            reasons.append(f"{form}: {error.message}")
    raise MalformedError(
        "no evidence that we know", id="evidence.form.malformed", want=", ".join(_FORMS), got="; ".join(reasons)
    )


def _snp(raw: bytes) -> dict[str, Any]:
    report = snp.parse(raw)
    rows = snp_rules.described(report)
    if line := report.line:
        rows |= {name: str(snp.tcb_of(line, getattr(report, name))) for name in rows if name.endswith("_tcb")}
    return rows


def _bundle(raw: bytes) -> dict[str, Any]:
    bundle = EvidenceBundle.parse(raw)
    return {
        "platform": bundle.platform,
        "sha256": bundle.sha256,
        "certificates": len(bundle.certificates),
        "crls": len(bundle.crls),
        "collateral": sorted(bundle.collateral or ()),
        "event_log_bytes": len(bundle.event_log or b""),
        "evidence": described(bundle.evidence),
    }


def _certificate(raw: bytes) -> dict[str, Any]:
    certificate = certs.parse(raw)
    leaf = certificate.leaf
    rows: dict[str, Any] = {
        "kind": certificate.kind,
        "line": certificate.line,
        "emulated": certificate.emulated,
        "subject": certificate.subject_name,
        "serial": certificate.serial,
        "not_before": certificate.not_before.isoformat(),
        "not_after": certificate.not_after.isoformat(),
    }
    if leaf is not None:
        rows |= {"product": leaf.product, "tcb": str(leaf.tcb), "csp_id": leaf.csp_id}
        rows["hwid"] = leaf.hwid.hex() if leaf.hwid else None
    return rows


def _intel(raw: bytes) -> dict[str, Any]:
    certificate = pck.parse(raw)
    sgx = certificate.sgx
    return {
        "role": certificate.role,
        "emulated": certificate.emulated,
        "subject": certificate.name,
        "serial": f"{certificate.serial:x}",
        "not_before": certificate.not_before.isoformat(),
        "not_after": certificate.not_after.isoformat(),
        "sgx": None if sgx is None else _readable(sgx),
    }


def _crl(raw: bytes) -> dict[str, Any]:
    found = crl.parse(raw)
    return {
        "issuer": certs.name_parts(found.issuer)["CN"],
        "this_update": found.this_update.isoformat(),
        "next_update": found.next_update.isoformat(),
        "revoked": [f"{entry.serial_number:x}" for entry in found.entries],
    }


def _collateral(raw: bytes) -> dict[str, Any]:
    """The tables as they are written; their signatures are for a verification to check."""
    parts = collateral.parse(collateral.parse_json(raw))
    info, identity = collateral.parse_tcb_info(parts.tcb_info), collateral.parse_qe_identity(parts.qe_identity)
    return {
        "tcb_info": _readable(info),
        "qe_identity": _readable(identity),
        "signers": [pck.parse(chain[0]).name for chain in (parts.tcb_info_chain, parts.qe_identity_chain)],
        "root_ca_crl": _crl(parts.root_crl),
        "pck_crl": _crl(parts.pck_crl),
    }


def _readable(value: Any) -> Any:
    """Fields of a frozen type by name, bytes as hex, times as text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: _readable(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, tuple):
        return [_readable(one) for one in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return value.hex() if isinstance(value, bytes) else value


def _file(raw: bytes) -> dict[str, Any]:
    """Whatever its blocks are."""
    found = pem.blocks(raw)
    if not found:
        raise MalformedError("no PEM block", id="pem.malformed")
    return {"blocks": [described(der) for _, der in found]}


def _table(raw: bytes) -> dict[str, Any]:
    names = {guid: name for name, guid in cert_table.ENTRIES.items()}
    return {names.get(guid, str(guid)): f"{len(blob)} bytes" for guid, blob in cert_table.parse(raw).items()}


def _tdx(raw: bytes) -> dict[str, Any]:
    quote = tdx.parse(raw)
    rows = tdx_rules.described(quote)
    leaf, ca, root = map(pck.parse, tdx.pck_certificates(quote.pck_pem))
    rows["chain"] = f"{leaf.name} <- {ca.name} <- {root.name}"
    return rows | {"pck": _readable(leaf.sgx)}


def _hcl(raw: bytes) -> dict[str, Any]:
    report = hcl.parse(raw)
    return {
        "platform": report.platform,
        "binds_runtime_data": report.binds,
        "runtime_data": dict(report.runtime),
        "report": described(report.report),
    }


def _tdreport(raw: bytes) -> dict[str, Any]:
    report = tdreport.parse(raw)
    return {
        name: value.hex() if isinstance(value := getattr(report, name), bytes) else value
        for name in tdreport.LAYOUT.names
    }


def _eventlog(raw: bytes) -> dict[str, Any]:
    log = eventlog.parse(raw)
    registers = {f"rtmr{i}": value.hex() for i, value in enumerate(log.replay())}
    return {"events": measure.described(log), **registers}


_FORMS: Final[Mapping[str, Callable[[bytes], dict[str, Any]]]] = {
    "SNP report": _snp,
    "TDX quote": _tdx,
    "Azure HCL report": _hcl,
    "TDREPORT": _tdreport,
    "CCEL event log": _eventlog,
    "evidence bundle": _bundle,
    "Intel collateral": _collateral,
    "AMD certificate": _certificate,
    "Intel certificate": _intel,
    "certificate revocation list": _crl,
    "GHCB certificate table": _table,
    "certificates in PEM": _file,
}
