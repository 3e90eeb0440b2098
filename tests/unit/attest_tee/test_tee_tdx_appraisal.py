"""From one good emulated quote, each wrong thing fails exactly its own check; every TCB status is reached."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from pointcall_attest import collateral, tdx, tdx_chain
from pointcall_attest.appraise import appraise_bundle
from pointcall_attest.emulated_tdx import CA, PCK, ROOT, SIGNER, EmulatedTdx, PlatformRow, SvnRow, Tables
from pointcall_attest.errors import MalformedError
from pointcall_attest.findings import UnverifiedError
from pointcall_attest.tee_policy import TeePolicy
from pointcall_attest.trust import Roots
from pointcall_attest.verdict import Verdict

TdxMachine = Callable[..., EmulatedTdx]
DATA, MRTD = b"\x11" * 64, b"\x22" * 48


def policy(**rules: Any) -> TeePolicy:
    return TeePolicy.parse(json.dumps({"allow_emulated": True, "tdx": rules}).encode())


def judged(
    one: EmulatedTdx,
    at: datetime,
    rules: TeePolicy | None = None,
    tables: Tables | None = None,
    revoked: tuple[int, ...] = (),
    **fields: Any,
) -> Verdict:
    values = {"report_data": DATA, "mrtd": MRTD} | fields
    return appraise_bundle(
        one.bundle(one.quote(**values), tables or Tables(), revoked),
        policy=rules or policy(),
        roots=Roots.of([one.root]),
        at=at,
        report_data=DATA,
        measurements=[MRTD.hex()],
    )


def failed(verdict: Verdict) -> list[str]:
    return [check.id for check in verdict.failed]


@pytest.mark.parametrize(("version", "body_type"), [(4, tdx.TD10), (5, tdx.TD10), (5, tdx.TD15)])
def test_good_evidence_passes_in_the_emulated_tier(td: TdxMachine, now: datetime, version: int, body_type: int) -> None:
    verdict = judged(td(), now, version=version, body_type=body_type)
    assert failed(verdict) == []
    assert (verdict.tier, verdict.platform, verdict.claims["tcb_status"]) == ("emulated", "tdx", "UpToDate")
    assert len({check.id for check in verdict.checks}) == len(verdict.checks)
    assert all(check.spec for check in verdict.checks)


@pytest.mark.parametrize(
    ("fields", "check"),
    [
        ({"report_data": bytes(64)}, "tee.report_data"),
        ({"mrtd": bytes(48)}, "tee.measurement"),
        ({"td_attributes": 1 << 28 | 1}, "tdx.debug"),
        ({"td_attributes": 1 << 28 | 0x80}, "tdx.debug"),
        ({"td_attributes": 0}, "tdx.sept_ve_disable"),
        ({"mrservicetd": b"\x01" * 48}, "tdx.mrservicetd"),
        ({"mrsignerseam": b"\x01" * 48}, "tdx.module"),
        ({"seam_attributes": b"\x01" + bytes(7)}, "tdx.module"),
        ({"tee_tcb_svn": bytes((5, 9, 5)).ljust(16, b"\0")}, "tdx.module"),
    ],
)
def test_one_wrong_field_fails_exactly_one_check(
    td: TdxMachine, now: datetime, fields: dict[str, Any], check: str
) -> None:
    assert failed(judged(td(), now, **fields)) == [check]


@pytest.mark.parametrize(
    ("rules", "fields", "check"),
    [
        ({"require_sept_ve_disable": False}, {"td_attributes": 0}, None),
        ({"mrservicetd": ["01" * 48]}, {"mrservicetd": b"\x01" * 48}, None),
        ({"mrservicetd": []}, {}, "tdx.mrservicetd"),
        ({"mrseam": ["01" * 48]}, {}, "tdx.mrseam"),
        ({"mrseam": ["01" * 48]}, {"mrseam": b"\x01" * 48}, None),
        ({"mrconfigid": "01" * 48}, {}, "tdx.mrconfigid"),
        ({"mrowner": "01" * 48}, {}, "tdx.mrowner"),
        ({"mrownerconfig": "01" * 48}, {"mrownerconfig": b"\x01" * 48}, None),
        *(({f"rtmr{i}": ["01" * 48]}, {}, f"tdx.rtmr{i}") for i in range(4)),
        ({"rtmr3": ["01" * 48]}, {"rtmr3": b"\x01" * 48}, None),
        ({"td_attributes": {"forbidden": 1 << 63}}, {"td_attributes": 1 << 63 | 1 << 28}, "tdx.td_attributes"),
        ({"xfam": {"required": 1 << 60}}, {}, "tdx.xfam"),
        ({"allow_dynamic_platform": False}, {}, "tdx.dynamic_platform"),
        ({"allow_cached_keys": False}, {}, "tdx.cached_keys"),
        ({"allow_smt": False}, {}, "tdx.smt"),
        ({"allow_smt": True}, {}, None),
        ({"min_tcb_evaluation_number": 19}, {}, "tdx.evaluation_number"),
        ({"min_tcb_evaluation_number": 18}, {}, None),
        ({"min_tcb_date": "2026-01-02"}, {}, "tdx.tcb_date"),
        ({"min_tcb_date": "2026-01-01"}, {}, None),
        ({"statuses": []}, {}, "tdx.tcb_status"),
    ],
)
def test_one_rule_of_the_policy_is_one_check(
    td: TdxMachine, now: datetime, rules: dict[str, Any], fields: dict[str, Any], check: str | None
) -> None:
    assert failed(judged(td(), now, policy(**rules), **fields)) == ([check] if check else [])


def test_debug_needs_the_emulated_tier_and_the_policy(td: TdxMachine, now: datetime) -> None:
    rules = TeePolicy(allow_emulated=True, allow_debug=True)
    assert failed(judged(td(), now, rules, td_attributes=1 << 28 | 1)) == []
    assert failed(judged(td(), now, TeePolicy())) == ["tee.emulated"]
    assert failed(judged(td(), now, TeePolicy(allow_emulated=True, platforms=("snp",)))) == ["tee.platform"]


OLD_MODULE = bytes((3, 1, 5)).ljust(16, b"\0")
OLD_LOADER = bytes((5, 1, 3)).ljust(16, b"\0")
VERSION_0 = bytes((5, 0, 5)).ljust(16, b"\0")
MODULES = {"TDX_01": (SvnRow("UpToDate", 5), SvnRow("OutOfDate", 3, "2025-01-01T00:00:00Z", ("INTEL-SA-01036",)))}
WITH_OLD = (PlatformRow("UpToDate"), PlatformRow("OutOfDate", tdx=OLD_LOADER[:1] + b"\0\3" + bytes(13)))


@pytest.mark.parametrize(
    ("machine", "tables", "status"),
    [
        ({}, Tables(), "UpToDate"),
        *(
            ({}, Tables((PlatformRow(status),)), status)
            for status in (
                "SWHardeningNeeded",
                "ConfigurationNeeded",
                "ConfigurationAndSWHardeningNeeded",
                "OutOfDate",
                "OutOfDateConfigurationNeeded",
                "Revoked",
            )
        ),
        # newer than every level is as good as the newest
        ({"qe_svn": 900, "sgx": 6, "pcesvn": 14, "svn": bytes((9, 1, 9)).ljust(16, b"\1")}, Tables(), "UpToDate"),
        # components 0 and 1 belong to the module's own table
        ({}, Tables((PlatformRow("UpToDate", tdx=bytes((9, 9, 5)).ljust(16, b"\0")),)), "UpToDate"),
        ({}, Tables((PlatformRow("UpToDate", tdx=bytes((0, 0, 6)).ljust(16, b"\0")),)), "TCBNotSupported"),
        ({"sgx": 4}, Tables(), "TCBNotSupported"),
        ({"pcesvn": 12}, Tables(), "TCBNotSupported"),
        ({"svn": OLD_LOADER, "svn2": OLD_LOADER}, Tables(), "TCBNotSupported"),
        ({"svn": OLD_MODULE, "svn2": OLD_MODULE}, Tables(), "TCBNotSupported"),
        ({"qe_svn": 3}, Tables(), "TCBNotSupported"),
        # a module of version 0 is judged by the platform's table alone
        ({"svn": VERSION_0, "svn2": VERSION_0}, Tables(modules={}), "UpToDate"),
        ({"svn": bytes((4, 0, 5)).ljust(16, b"\0"), "svn2": VERSION_0[:0] + bytes(16)}, Tables(), "TCBNotSupported"),
        # module and quoting enclave pull the status down
        ({"svn": OLD_MODULE, "svn2": OLD_MODULE}, Tables(modules=MODULES), "OutOfDate"),
        ({"svn": OLD_MODULE, "svn2": OLD_MODULE}, Tables((PlatformRow("SWHardeningNeeded"),), MODULES), "OutOfDate"),
        (
            {"svn": OLD_MODULE, "svn2": OLD_MODULE},
            Tables((PlatformRow("ConfigurationNeeded"),), MODULES),
            "OutOfDateConfigurationNeeded",
        ),
        (
            {"svn": OLD_MODULE, "svn2": OLD_MODULE},
            Tables((PlatformRow("ConfigurationAndSWHardeningNeeded"),), MODULES),
            "OutOfDateConfigurationNeeded",
        ),
        ({}, Tables(qe=(SvnRow("OutOfDate", 4),)), "OutOfDate"),
        (
            {},
            Tables((PlatformRow("ConfigurationNeeded"),), qe=(SvnRow("OutOfDate", 4),)),
            "OutOfDateConfigurationNeeded",
        ),
        ({}, Tables(qe=(SvnRow("Revoked", 4),)), "Revoked"),
        ({}, Tables(modules={"TDX_01": (SvnRow("Revoked"),)}), "Revoked"),
        ({}, Tables(modules={"tdx_01": (SvnRow("UpToDate"),)}), "UpToDate"),
        # launched under an old module, now running a new one
        ({"svn": OLD_MODULE}, Tables(modules=MODULES), "TDRelaunchAdvised"),
        ({"svn": OLD_MODULE}, Tables((PlatformRow("SWHardeningNeeded"),), MODULES), "TDRelaunchAdvised"),
        (
            {"svn": OLD_MODULE},
            Tables((PlatformRow("ConfigurationNeeded"),), MODULES),
            "TDRelaunchAdvisedConfigurationNeeded",
        ),
        ({"svn": OLD_LOADER}, Tables(WITH_OLD, MODULES), "TDRelaunchAdvised"),
        # the quoting enclave or the platform itself is old: relaunching would not help
        ({"svn": OLD_MODULE}, Tables(modules=MODULES, qe=(SvnRow("OutOfDate", 4),)), "OutOfDate"),
        ({"svn": OLD_MODULE}, Tables((PlatformRow("OutOfDate"),), MODULES), "OutOfDate"),
    ],
)
def test_every_status_of_intels_algorithm(
    td: TdxMachine, now: datetime, machine: dict[str, Any], tables: Tables, status: str
) -> None:
    verdict = judged(td(**machine), now, None, tables)
    assert verdict.claims["tcb_status"] == status
    assert failed(verdict) == ([] if status == "UpToDate" else ["tdx.tcb_status"])
    accepting = policy(statuses=[status])
    assert failed(judged(td(**machine), now, accepting, tables)) == []


def test_td_10_has_no_relaunch(td: TdxMachine, now: datetime) -> None:
    verdict = judged(td(svn=OLD_MODULE), now, None, Tables(modules=MODULES), version=4, body_type=tdx.TD10)
    assert verdict.claims["tcb_status"] == "OutOfDate"


@pytest.mark.parametrize(
    ("rules", "check"),
    [
        ({}, None),
        ({"advisories_denied": ["INTEL-SA-01036"]}, "tdx.advisories"),
        ({"advisories_denied": ["INTEL-SA-09999"]}, None),
        ({"advisories_allowed": ["INTEL-SA-01036"]}, None),
        ({"advisories_allowed": []}, "tdx.advisories"),
    ],
)
def test_advisories(td: TdxMachine, now: datetime, rules: dict[str, Any], check: str | None) -> None:
    old = td(svn=OLD_MODULE, svn2=OLD_MODULE)
    verdict = judged(old, now, policy(statuses=["OutOfDate"], **rules), Tables(modules=MODULES))
    assert failed(verdict) == ([check] if check else [])
    assert verdict.claims["advisories"] == ["INTEL-SA-01036"]


@pytest.mark.parametrize(("days", "check"), [(0, "tdx.tcb_status"), (18, "tdx.tcb_status"), (21, None)])
def test_grace_counts_from_the_date_of_the_newer_level(
    td: TdxMachine, now: datetime, days: int, check: str | None
) -> None:
    modules = {"TDX_01": (SvnRow("UpToDate", 5, "2026-11-01T00:00:00Z"), MODULES["TDX_01"][1])}
    old = td(svn=OLD_MODULE, svn2=OLD_MODULE)
    verdict = judged(old, now, policy(out_of_date_grace_days=days), Tables(modules=modules))
    assert failed(verdict) == ([check] if check else [])


def test_grace_never_excuses_a_revoked_part(td: TdxMachine, now: datetime) -> None:
    tables = Tables((PlatformRow("UpToDate", sgx=6, date="2026-11-19T00:00:00Z"), PlatformRow("Revoked")))
    assert failed(judged(td(), now, policy(out_of_date_grace_days=366), tables)) == ["tdx.tcb_status"]


@pytest.mark.parametrize(
    ("serial", "check"),
    [(PCK, "tdx.pck_crl"), (CA, "tdx.root_crl"), (SIGNER, "tdx.root_crl"), (99, None), (ROOT, None)],
)
def test_revocation(td: TdxMachine, now: datetime, serial: int, check: str | None) -> None:
    assert failed(judged(td(), now, revoked=(serial,))) == ([check] if check else [])


def test_times(td: TdxMachine, now: datetime) -> None:
    assert "tdx.validity" in failed(judged(td(), now + timedelta(days=7)))
    assert failed(judged(td(), now - timedelta(days=2))) == [
        "tdx.validity",
        "tdx.root_crl",
        "tdx.pck_crl",
        "tdx.collateral_dates",
    ]


def test_an_unregistered_root_fails_only_the_root(td: TdxMachine, now: datetime) -> None:
    one = td()
    verdict = appraise_bundle(
        one.bundle(one.quote(DATA, MRTD)),
        policy=policy(),
        roots=Roots.of(),
        at=now,
        report_data=DATA,
        measurements=None,
    )
    assert failed(verdict) == ["tdx.root"]
    assert (verdict.tier, verdict.claims) == ("none", {})


@pytest.mark.parametrize(
    ("part", "checks"),
    [("signature", ["tdx.signature"]), ("qe_signature", ["tdx.qe_signature"]), ("qe_auth", ["tdx.qe_binding"])],
)
def test_one_other_part_of_the_quote(td: TdxMachine, now: datetime, part: str, checks: list[str]) -> None:
    one, other = td(), td(sgx=6)
    good, bad = tdx.parse(one.quote(DATA, MRTD)), tdx.parse(other.quote(DATA, bytes(48)))
    parts = {
        name: getattr(good, name)
        for name in ("signature", "attestation_key", "qe_report", "qe_signature", "qe_auth", "pck_pem")
    }
    parts[part] = bad.signature if part != "qe_auth" else b"another"
    order = ("signature", "attestation_key", "qe_report", "qe_signature", "qe_auth", "pck_pem")
    quote = tdx.encode_signed(good.signed_bytes, *(parts[name] for name in order))
    verdict = appraise_bundle(
        one.bundle(quote), policy=policy(), roots=Roots.of([one.root]), at=now, report_data=DATA, measurements=None
    )
    assert failed(verdict) == checks


@pytest.mark.parametrize(
    ("part", "check"),
    [
        ("tcb_info", "tdx.tcb_info"),
        ("qe_identity", "tdx.qe_identity"),
    ],
)
def test_a_changed_text_is_not_signed(td: TdxMachine, now: datetime, part: str, check: str) -> None:
    one = td()
    texts = one.collateral()
    texts[part] = texts[part].replace("UpToDate", "Revoked ")
    bundle = replace(one.bundle(one.quote(DATA, MRTD)), collateral=texts)
    verdict = appraise_bundle(
        bundle, policy=policy(), roots=Roots.of([one.root]), at=now, report_data=None, measurements=None
    )
    assert failed(verdict) == [check]


def test_one_bit_of_every_byte_flipped_is_refused(td: TdxMachine, now: datetime) -> None:
    """Each byte of the quote once, a different bit each time; `make fuzz` flips every bit."""
    one = td()
    good, parts = one.quote(DATA, MRTD), collateral.parse(one.collateral())
    roots = Roots.of([one.root])
    for at in range(len(good)):
        raw = bytearray(good)
        raw[at] ^= 1 << at % 8
        with pytest.raises((MalformedError, UnverifiedError)):
            tdx_chain.verify(tdx.parse(bytes(raw)), parts, roots=roots, at=now)


@pytest.mark.parametrize(
    ("fields", "outcome", "words"),
    [
        ({}, "pass", "0 events; all four agree"),
        ({"rtmr1": b"\1" * 48, "rtmr3": b"\1" * 48}, "fail", "0 events; differs in RTMR [1, 3]"),
    ],
)
def test_an_event_log_must_explain_the_registers(
    td: TdxMachine, now: datetime, fields: dict[str, Any], outcome: str, words: str
) -> None:
    spec = struct.pack("<16sIBBBBIHH", b"Spec ID Event03\0", 0, 0, 2, 0, 2, 1, 0x0C, 48) + b"\0"
    log = struct.pack("<II20sI", 1, 3, bytes(20), len(spec)) + spec
    one = td()
    bundle = replace(one.bundle(one.quote(DATA, MRTD, **fields)), event_log=log)
    roots = Roots.of([one.root])
    verdict = appraise_bundle(bundle, policy=policy(), roots=roots, at=now, report_data=None, measurements=None)
    (check,) = (check for check in verdict.checks if check.id == "tdx.event_log")
    assert (check.outcome, check.observed) == (outcome, words)


def test_the_claims_are_json(td: TdxMachine, now: datetime) -> None:
    assert json.loads(json.dumps(judged(td(), now).as_dict()))["tier"] == "emulated"
