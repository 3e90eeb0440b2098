"""A verdict in the words of others: EAR claims and an in-toto statement. Pure; nothing is signed here.

EAR (draft-ietf-rats-ear) sums up with the trustworthiness vector of AR4SI (draft-ietf-rats-ar4si): 2 affirming,
32 warning, 96 contraindicated, 0 nothing claimed. The in-toto predicate carries every check. docs/spec/verdict.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import rfc8785

from pointcall_attest.verdict import Verdict

PROFILE: Final = "tag:ietf.org,2026:rats/ear#00"
PREDICATE_TYPE: Final = "https://pointcall.dev/tee-verdict/v1"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
AFFIRMING, WARNING, CONTRAINDICATED, NOTHING = 2, 32, 96, 0
_NAMES: Final = {AFFIRMING: "affirming", WARNING: "warning", CONTRAINDICATED: "contraindicated", NOTHING: "none"}
# Which checks speak for which part of the vector, by the words after the platform.
_PARTS: Final[Mapping[str, frozenset[str]]] = {
    "instance-identity": frozenset({"chip_id", "chip_list", "csp_list", "root", "leaf", "pck_chain", "fmspc"}),
    "configuration": frozenset(
        {"debug", "migration", "smt", "single_socket", "guest_policy", "vmpl", "sept_ve_disable", "mrservicetd"}
        | {"td_attributes", "xfam", "mrconfigid", "host_data", "platform_info"}
    ),
    "executables": frozenset({"measurement", "mrseam", "module", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "event_log"}),
    "hardware": frozenset(
        {"tcb_order", "reported_tcb", "committed_tcb", "launch_tcb", "certificate_tcb", "tcb_status", "qe"}
        | {"launch_mitigations", "current_mitigations", "advisories", "tcb_date", "evaluation_number", "signature"}
    ),
}


def ear(verdict: Verdict, *, at: datetime, policy_sha256: str, version: str) -> dict[str, Any]:
    """Unsigned EAR claims: one submodule named after the platform. `at` is the time of verification."""
    vector = {part: _claim(verdict, part) for part in _PARTS}
    status = CONTRAINDICATED if not verdict.passed else max(AFFIRMING, *vector.values())
    return {
        "eat_profile": PROFILE,
        "iat": int(at.timestamp()),
        "ear.verifier-id": {"developer": "https://pointcall.dev", "build": version},
        "submods": {
            verdict.platform: {
                "ear.status": _NAMES[status],
                "ear.trustworthiness-vector": vector,
                "ear.appraisal-policy-id": f"sha256:{policy_sha256}",
                "pointcall.tier": verdict.tier,
                "pointcall.not-checked": [check.id for check in verdict.not_checked],
            }
        },
    }


def _claim(verdict: Verdict, part: str) -> int:
    """One number: worst check of the part. Emulated hardware is never affirmed; what was not checked claims nothing."""
    found = [check.outcome for check in verdict.checks if check.id.partition(".")[2] in _PARTS[part]]
    if "fail" in found or verdict.tier == "none":
        return CONTRAINDICATED
    if verdict.tier == "emulated" and part in ("hardware", "instance-identity"):
        return WARNING
    return AFFIRMING if "pass" in found else NOTHING


def statement(verdict: Verdict, *, at: datetime, evidence_sha256: str, policy_sha256: str, version: str) -> bytes:
    """An in-toto Statement v1 in canonical JSON (RFC 8785): subject the evidence, predicate the whole verdict."""
    return rfc8785.dumps(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": f"{verdict.platform}-evidence", "digest": {"sha256": evidence_sha256}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "verifier": {"id": "https://pointcall.dev/attest", "version": version},
                "verifiedAt": at.strftime("%Y-%m-%dT%H:%M:%SZ"),
                "policy": {"sha256": policy_sha256},
                **_portable(verdict.as_dict()),
            },
        }
    )


def _portable(value: Any) -> Any:
    """Numbers beyond 2**53 as decimal strings, as RFC 8785 demands."""
    if isinstance(value, dict):
        return {key: _portable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(one) for one in value]
    too_large = isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**53 - 1
    return str(value) if too_large else value
