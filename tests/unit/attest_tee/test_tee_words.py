"""What a verdict says, word for word: expected and observed of every rule, for good and for bad evidence.

The words are read by people and kept in logs: a change of words.json is a change that a reviewer should see.
`python -m tests.unit.attest_tee.test_tee_words` writes the file again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest import tdx
from pointcall_attest.appraise import appraise_bundle
from pointcall_attest.emulated import EmulatedSnp
from pointcall_attest.emulated_tdx import EmulatedTdx, PlatformRow, Tables
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.tee_policy import TeePolicy
from pointcall_attest.trust import Roots

WORDS = Path(__file__).with_name("words.json")
DATA, MEASUREMENT = b"\x11" * 64, b"\x22" * 48
VARYING = {"tdx.qe_binding", "tdx.tcb_info", "tdx.qe_identity"}  # they name keys and signed texts of this run
HARD = {
    "platforms": [],
    "vmpl": [],
    "snp": {
        "min_abi": "1.55",
        "min_guest_svn": 2,
        "allow_smt": False,
        "require_single_socket": True,
        "guest_policy": {"required": 1 << 24, "forbidden": 1},
        "platform_info": {"required": 1 << 7},
        "min_tcb": {"Milan": {"ucode": 220}},
        "min_committed_tcb": {"Milan": {"snp": 25}},
        "min_launch_tcb": {"Milan": {"bl": 5}},
        "launch_mitigations": {"required": 1},
        "current_mitigations": {"required": 1},
        "host_data": "44" * 32,
        "family_id": "44" * 16,
        "image_id": "44" * 16,
        "id_key_digests": [],
        "author_key_digests": ["44" * 48, "55" * 48],
        "chip_ids": [],
        "csp_ids": ["another"],
        "require_crl": True,
    },
    "tdx": {
        "statuses": [],
        "advisories_allowed": [],
        "min_tcb_evaluation_number": 19,
        "min_tcb_date": "2026-01-02",
        "out_of_date_grace_days": 3,
        "mrservicetd": [],
        "mrseam": [],
        "mrconfigid": "44" * 48,
        "mrowner": "44" * 48,
        "mrownerconfig": "44" * 48,
        "rtmr0": [],
        "rtmr1": [],
        "rtmr2": [],
        "rtmr3": ["44" * 48],
        "td_attributes": {"required": 1 << 63},
        "xfam": {"forbidden": 1},
        "allow_dynamic_platform": False,
        "allow_cached_keys": False,
        "allow_smt": False,
    },
}
SOFT: dict[str, Any] = {
    "allow_emulated": True,
    "allow_debug": True,
    "snp": {"allow_report_v2": True, "allow_migration_agent": True},
}
SOFT |= {"tdx": {"out_of_date_grace_days": 3, "allow_smt": True}}


def bundles(one: EmulatedSnp, td: EmulatedTdx) -> dict[str, EvidenceBundle]:
    bad = {"policy": 0xF_0136, "report_data": bytes(64), "measurement": bytes(48), "vmpl": 2, "current_tcb": bytes(8)}
    values = {"report_data": DATA, "measurement": MEASUREMENT, "report_id": bytes(32)}
    old = Tables((PlatformRow("OutOfDate", advisories=("INTEL-SA-00001",)),))
    debug = td.quote(bytes(64), bytes(48), td_attributes=1, mrservicetd=b"\1" * 48)
    return {
        "snp good": one.bundle(one.report(**values)),
        "snp bad": one.bundle(one.report(**values | bad)),
        "tdx good": td.bundle(td.quote(DATA, MEASUREMENT)),
        "tdx bad": td.bundle(debug, old),
        "tdx 1.0": td.bundle(td.quote(DATA, MEASUREMENT, version=4, body_type=tdx.TD10)),
    }


def words(one: EmulatedSnp, td: EmulatedTdx, at: datetime) -> dict[str, Any]:
    """{policy and case: {check: [outcome, expected, observed, hint]}}."""
    found: dict[str, Any] = {}
    for rules_name, rules in (("soft", SOFT), ("hard", HARD)):
        for name, bundle in bundles(one, td).items():
            verdict = appraise_bundle(
                bundle,
                policy=TeePolicy.parse(json.dumps(rules).encode()),
                roots=Roots.of([one.ark, td.root]),
                at=at,
                report_data=DATA,
                measurements=[MEASUREMENT.hex(), "33" * 48] if rules_name == "soft" else [],
            )
            found[f"{rules_name}, {name}"] = {
                check.id: [check.outcome, check.expected, check.observed, check.hint]
                for check in verdict.checks
                if check.id not in VARYING
            }
    return found


@pytest.fixture(scope="module")
def said(machine: Callable[..., EmulatedSnp], td: Callable[..., EmulatedTdx], now: datetime) -> dict[str, Any]:
    return words(machine(), td(), now)


@pytest.mark.parametrize("case", json.loads(WORDS.read_text()) if WORDS.exists() else [])
def test_every_word_of_a_verdict(said: dict[str, Any], case: str) -> None:
    assert said[case] == json.loads(WORDS.read_text())[case]


def test_the_file_has_every_case(said: dict[str, Any]) -> None:
    assert set(said) == set(json.loads(WORDS.read_text()))


if __name__ == "__main__":
    from tests.fuzz.attest.mutants import NOW, machines

    WORDS.write_text(json.dumps(words(*machines(), NOW), indent=0) + "\n")
