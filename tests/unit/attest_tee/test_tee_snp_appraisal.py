"""From one good emulated report, each wrong thing fails exactly its own check."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from pointcall_attest import snp, snp_chain
from pointcall_attest.appraise import appraise_bundle
from pointcall_attest.emulated import TCBS, EmulatedSnp
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.findings import UnverifiedError
from pointcall_attest.snp import Tcb
from pointcall_attest.tee_policy import TeePolicy
from pointcall_attest.trust import Roots
from pointcall_attest.verdict import Verdict

Machine = Callable[..., EmulatedSnp]
DATA, MEASUREMENT, ID = b"\x11" * 64, b"\x22" * 48, b"\x33" * 32
ALLOW = TeePolicy(allow_emulated=True)


def judged(
    one: EmulatedSnp, at: datetime, rules: TeePolicy = ALLOW, crls: tuple[bytes, ...] = (), **fields: Any
) -> Verdict:
    values = {"report_data": DATA, "measurement": MEASUREMENT, "report_id": ID} | fields
    report = one.report(**values)
    return appraise_bundle(
        EvidenceBundle("snp", report, one.certificates, crls),
        policy=rules,
        roots=Roots.of([one.ark]),
        at=at,
        report_data=DATA,
        measurements=[MEASUREMENT.hex()],
    )


def failed(verdict: Verdict) -> list[str]:
    return [check.id for check in verdict.failed]


@pytest.mark.parametrize("line", ["Milan", "Genoa", "Turin", "Venice"])
@pytest.mark.parametrize("kind", ["VCEK", "VLEK"])
@pytest.mark.parametrize("version", [3, 5])
def test_good_evidence_passes_in_the_emulated_tier(
    machine: Machine, now: datetime, line: str, kind: str, version: int
) -> None:
    verdict = judged(machine(line, kind), now, version=version)
    assert failed(verdict) == []
    assert (verdict.tier, verdict.platform, verdict.claims["line"]) == ("emulated", "snp", line)


OLD = snp.tcb_bytes("Milan", TCBS["Milan"]._replace(snp=23))
NEW = snp.tcb_bytes("Milan", TCBS["Milan"]._replace(snp=25))


@pytest.mark.parametrize(
    ("fields", "check"),
    [
        ({"report_data": bytes(64)}, "tee.report_data"),
        ({"measurement": bytes(48)}, "tee.measurement"),
        ({"policy": 0x3_0000 | 1 << 19}, "snp.debug"),
        ({"policy": 0x3_0000 | 1 << 18}, "snp.migration"),
        ({"report_id_ma": bytes(32)}, "snp.migration"),
        ({"vmpl": 1}, "snp.vmpl"),
        ({"vmpl": 0xFFFFFFFF}, "snp.vmpl"),
        ({"key_info": 1 << 2}, "snp.signing_key"),
        ({"key_info": 7 << 2}, "snp.signing_key"),
        ({"key_info": 2}, "snp.signing_key"),
        ({"cpuid_model": 0x11}, "snp.product"),
        ({"cpuid_family": 0x77}, "snp.product"),
        ({"chip_id": b"EMULATED".ljust(64, b"x")}, "snp.chip_id"),
        ({"chip_id": bytes(64)}, "snp.chip_id"),
        ({"reported_tcb": OLD}, "snp.certificate_tcb"),
        ({"committed_tcb": OLD}, "snp.tcb_order"),
        ({"current_tcb": OLD}, "snp.tcb_order"),
        ({"committed_tcb": NEW}, "snp.tcb_order"),
    ],
)
def test_one_wrong_field_fails_exactly_one_check(
    machine: Machine, now: datetime, fields: dict[str, Any], check: str
) -> None:
    assert failed(judged(machine(), now, **fields)) == [check]


@pytest.mark.parametrize("field", ["reported_tcb", "committed_tcb"])
def test_version_2_with_a_reserved_tcb_byte_is_refused(machine: Machine, now: datetime, field: str) -> None:
    bad = bytes((4, 0, 0, 1, 0, 0, 24, 219))
    old = {"version": 2, "cpuid_family": 0, "cpuid_model": 0, "cpuid_stepping": 0, field: bad}
    wanted = {"reported_tcb": "snp.certificate_tcb", "committed_tcb": "snp.tcb.malformed"}
    assert failed(judged(machine(), now, **old)) == [wanted[field]]


def test_version_2_must_be_opted_in(machine: Machine, now: datetime) -> None:
    old = {"version": 2, "cpuid_family": 0, "cpuid_model": 0, "cpuid_stepping": 0}
    assert failed(judged(machine(), now, **old)) == ["snp.version"]
    opted = TeePolicy.parse(b'{"allow_emulated":true,"snp":{"allow_report_v2":true}}')
    assert failed(judged(machine(), now, opted, **old)) == []


@pytest.mark.parametrize(
    ("snp_policy", "fields", "check"),
    [
        ({"min_abi": "1.55"}, {"policy": 0x3_0000 | 1 << 8 | 54}, "snp.abi"),
        ({"min_abi": "1.55"}, {"policy": 0x3_0000 | 1 << 8 | 55}, None),
        ({"min_guest_svn": 2}, {"guest_svn": 1}, "snp.guest_svn"),
        ({"min_guest_svn": 2}, {"guest_svn": 2}, None),
        ({"allow_migration_agent": True}, {"policy": 0x3_0000 | 1 << 18}, None),
        ({"allow_smt": False}, {}, "snp.smt"),
        ({"allow_smt": False}, {"policy": 0x2_0000}, None),
        ({"require_single_socket": True}, {}, "snp.single_socket"),
        ({"require_single_socket": True}, {"policy": 0x13_0000}, None),
        ({"guest_policy": {"required": 1 << 24}}, {}, "snp.guest_policy"),
        ({"guest_policy": {"required": 1 << 24}}, {"policy": 0x103_0000}, None),
        ({"guest_policy": {"forbidden": 1 << 21}}, {"policy": 0x23_0000}, "snp.guest_policy"),
        ({"platform_info": {"required": 0x20}}, {"platform_info": 0x05}, "snp.platform_info"),
        ({"platform_info": {"required": 0x20}}, {"platform_info": 0xFF67}, None),
        ({"platform_info": {"forbidden": 1}}, {}, "snp.platform_info"),
        ({"launch_mitigations": {"required": 1}}, {}, "snp.launch_mitigations"),
        ({"launch_mitigations": {"required": 1}}, {"version": 5, "launch_mit_vector": 3}, None),
        ({"current_mitigations": {"required": 1}}, {}, "snp.current_mitigations"),
        ({"min_tcb": {"Milan": {"snp": 25}}}, {}, "snp.reported_tcb"),
        ({"min_tcb": {"Milan": {"snp": 24, "ucode": 219, "bl": 4}}}, {}, None),
        ({"min_tcb": {"Genoa": {"snp": 255}}}, {}, None),
        ({"min_committed_tcb": {"Milan": {"ucode": 220}}}, {}, "snp.committed_tcb"),
        ({"min_launch_tcb": {"Milan": {"bl": 5}}}, {}, "snp.launch_tcb"),
        ({"host_data": "44" * 32}, {}, "snp.host_data"),
        ({"host_data": "44" * 32}, {"host_data": b"\x44" * 32}, None),
        ({"family_id": "44" * 16}, {}, "snp.family_id"),
        ({"image_id": "44" * 16}, {}, "snp.image_id"),
        ({"id_key_digests": []}, {}, "snp.id_key"),
        ({"id_key_digests": ["44" * 48]}, {"id_key_digest": b"\x44" * 48}, None),
        ({"author_key_digests": ["44" * 48]}, {"author_key_digest": b"\x44" * 48}, "snp.author_key"),
        ({"author_key_digests": ["44" * 48]}, {"author_key_digest": b"\x44" * 48, "key_info": 1}, None),
        ({"chip_ids": ["44" * 64]}, {}, "snp.chip_list"),
        ({"chip_ids": [b"EMULATED12345678".ljust(64, b"\0").hex()]}, {}, None),
        ({"csp_ids": ["EMULATED provider"]}, {}, "snp.csp_list"),
        ({"require_crl": True}, {}, "snp.crl_required"),
    ],
)
def test_one_rule_of_the_policy_is_one_check(
    machine: Machine, now: datetime, snp_policy: dict[str, Any], fields: dict[str, Any], check: str | None
) -> None:
    base = TeePolicy(allow_emulated=True).model_dump(mode="json")
    policy = TeePolicy.model_validate_json(json.dumps(base | {"snp": snp_policy}))
    assert failed(judged(machine(), now, policy, **fields)) == ([check] if check else [])


def test_csp_id_of_a_vlek(machine: Machine, now: datetime) -> None:
    for names, want in ((["EMULATED provider"], []), (["another"], ["snp.csp_list"]), ([], ["snp.csp_list"])):
        policy = TeePolicy.parse(
            b'{"allow_emulated":true,"snp":{"csp_ids":%s}}' % str(names).replace("'", '"').encode()
        )
        assert failed(judged(machine("Genoa", "VLEK"), now, policy)) == want


def test_tier_platform_and_debug_rules(machine: Machine, now: datetime) -> None:
    debug = {"policy": 0x3_0000 | 1 << 19}
    assert failed(judged(machine(), now, TeePolicy())) == ["tee.emulated"]
    assert failed(judged(machine(), now, TeePolicy(allow_emulated=True, platforms=("tdx",)))) == ["tee.platform"]
    assert failed(judged(machine(), now, TeePolicy(allow_emulated=True, allow_debug=True), **debug)) == []
    assert failed(judged(machine(), now, TeePolicy(allow_emulated=True, vmpl=(1, 2)), vmpl=2)) == []


def test_nothing_expected_is_not_checked_and_nothing_known_is_refused(machine: Machine, now: datetime) -> None:
    one = machine()
    bundle = one.bundle(one.report(DATA, MEASUREMENT, ID))
    arguments: dict[str, Any] = {"policy": ALLOW, "roots": Roots.of([one.ark]), "at": now}
    open_ended = appraise_bundle(bundle, report_data=None, measurements=None, **arguments)
    assert {"tee.report_data", "tee.measurement"} <= {check.id for check in open_ended.not_checked}
    assert failed(appraise_bundle(bundle, report_data=DATA, measurements=[], **arguments)) == ["tee.measurement"]


def test_every_check_names_its_specification(machine: Machine, now: datetime) -> None:
    assert all(check.spec for check in judged(machine(), now).checks)
    assert len({check.id for check in judged(machine(), now).checks}) == len(judged(machine(), now).checks)


def test_every_flipped_bit_of_a_report_is_refused(machine: Machine, now: datetime) -> None:
    """All 9472 of them: the parser refuses, or a check of verification fails; never anything else."""
    one = machine()
    good = one.report(DATA, MEASUREMENT, ID)
    roots = Roots.of([one.ark])
    for bit in range(len(good) * 8):
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        try:
            report = snp.parse(bytes(raw))
        except snp.MalformedError:
            continue
        chain = snp_chain.choose(one.certificates, report, roots)
        with pytest.raises(UnverifiedError):
            snp_chain.verify(report, chain, roots=roots, at=now)


@pytest.mark.parametrize(
    ("revoked", "start", "end", "check"),
    [
        ([], -1, 1, None),
        ([5, 6], -1, 1, None),
        ([0x1_0001], -1, 1, "snp.crl"),
        ([], -3, -1, "snp.crl"),
        ([], 1, 3, "snp.crl"),
    ],
)
def test_revocation(
    machine: Machine, now: datetime, revoked: list[int], start: int, end: int, check: str | None
) -> None:
    one = machine()
    crl = one.crl(revoked, now + timedelta(days=start), now + timedelta(days=end))
    policy = TeePolicy.parse(b'{"allow_emulated":true,"snp":{"require_crl":true}}')
    verdict = judged(one, now, policy, (crl,))
    assert failed(verdict) == ([check] if check else [])


def test_a_crl_of_another_root_is_no_crl(machine: Machine, now: datetime) -> None:
    other = machine("Genoa").crl([], now - timedelta(days=1), now + timedelta(days=1))
    assert failed(judged(machine(), now, ALLOW, (other,))) == ["snp.crl"]


def test_the_claims_are_readable(machine: Machine, now: datetime) -> None:
    claims = judged(machine(), now, policy=0x13_0000 | 1 << 8 | 55, platform_info=0xA5).claims
    wanted = {"smt": True, "debug": False, "single_socket": True, "abi": "1.55"}
    assert {key: claims["policy"][key] for key in wanted} == wanted
    bits = ("smt_en", "tsme_en", "ecc_en", "rapl_dis", "ciphertext_hiding_dram", "alias_check_complete", "sev_tio")
    assert [claims["platform_info"][bit] for bit in bits] == [True, False, True, False, False, True, True]
    assert (claims["signing_key"], claims["line"], claims["reported_tcb"]["ucode"]) == ("VCEK", "Milan", 219)


def test_tcb_names_read_well() -> None:
    assert str(Tcb(1, 2, 3, 4, 5)) == "fmc=1 bl=2 tee=3 snp=4 ucode=5"
