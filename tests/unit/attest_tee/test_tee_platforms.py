"""The emulated platform on disk, evidence bundles, policies, statements, the command line and fetching."""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote as quoted

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointcall_attest import (
    binding,
    certs,
    collateral,
    findings,
    measure,
    pck,
    pem,
    shown,
    snp,
    tdvf,
    tdx,
    tee_statement,
)
from pointcall_attest.appraise import appraise_bundle
from pointcall_attest.cert_table import ENTRIES
from pointcall_attest.cert_table import encode as encode_table
from pointcall_attest.emulated import EmulatedSnp
from pointcall_attest.emulated_tdx import EmulatedTdx
from pointcall_attest.errors import MalformedError
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.tee_policy import TeePolicy
from pointcall_attest.trust import Roots
from pointcall_attest.verdict import Verdict
from pointcall_executor.cli import attest as cli
from pointcall_executor.cli import main
from pointcall_executor.tee import fetch, measurement, platform
from pointcall_executor.tee.emulated import EmulatedPlatform
from pointcall_executor.tee.emulated_tdx import EmulatedTdxPlatform
from pointcall_executor.tee.fetch import Answer, Cache, FetchError
from pointcall_executor.tee.platform import PlatformError

DATA, MEASUREMENT, MRTD = b"\x11" * 64, b"\x22" * 48, b"\x22" * 48
Machine = Callable[..., EmulatedSnp]
TdxMachine = Callable[..., EmulatedTdx]


def judged(bundle: EvidenceBundle, roots: Roots, at: datetime, **rules: Any) -> Verdict:
    return appraise_bundle(bundle, policy=TeePolicy(**rules), roots=roots, at=at, report_data=None, measurements=None)


# ---- the emulated platform of an installation


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, now: datetime) -> tuple[Path, EmulatedPlatform]:
    folder = tmp_path_factory.mktemp("installed")
    return folder, EmulatedPlatform.open(folder / "tee", clock=lambda: now, system=folder)


def test_the_platform_gives_evidence_that_verifies_with_its_root_only(
    installed: tuple[Path, EmulatedPlatform], now: datetime
) -> None:
    folder, one = installed
    bundle = one.evidence(DATA)
    assert appraise_bundle(
        bundle,
        policy=TeePolicy(allow_emulated=True),
        roots=Roots.of([one.root_der]),
        at=now,
        report_data=DATA,
        measurements=[one.measurement],
    ).passed
    assert [c.id for c in judged(bundle, Roots.of(), now, allow_emulated=True).failed] == ["snp.root"]
    assert one.register(folder / "trust").read_bytes() == one.root_der
    assert judged(bundle, Roots.open(folder / "trust"), now, allow_emulated=True).passed


def test_the_keys_are_kept_private_and_used_again(installed: tuple[Path, EmulatedPlatform], now: datetime) -> None:
    folder, one = installed
    (path,) = (folder / "tee").glob("emulated-snp-*.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert EmulatedPlatform.open(folder / "tee", clock=lambda: now, system=folder).root_der == one.root_der
    later = now + timedelta(days=6, hours=22)
    assert EmulatedPlatform.open(folder / "tee", clock=lambda: later, system=folder).root_der == one.root_der


@pytest.mark.parametrize("days", [7, -1])
def test_expired_keys_are_replaced_root_and_all(tmp_path: Path, now: datetime, days: int) -> None:
    first = EmulatedTdxPlatform.open(tmp_path, clock=lambda: now, system=tmp_path)
    later = now + timedelta(days=days)
    second = EmulatedTdxPlatform.open(tmp_path, clock=lambda: later, system=tmp_path)
    assert second.root_der != first.root_der


def test_a_broken_key_file_is_replaced(tmp_path: Path, now: datetime) -> None:
    first = EmulatedTdxPlatform.open(tmp_path, clock=lambda: now, system=tmp_path)
    (path,) = tmp_path.glob("emulated-tdx.json")
    for broken in (b"", b"{}", b'{"keys": 5}', path.read_bytes()[:-9]):
        path.write_bytes(broken)
        assert EmulatedTdxPlatform.open(tmp_path, clock=lambda: now, system=tmp_path).root_der != first.root_der


def test_the_tdx_platform_gives_evidence_that_verifies(tmp_path: Path, now: datetime) -> None:
    one = EmulatedTdxPlatform.open(tmp_path / "tee", clock=lambda: now, system=tmp_path)
    again = EmulatedTdxPlatform.open(tmp_path / "tee", clock=lambda: now, system=tmp_path)
    one.register(tmp_path / "trust")
    for each in (one, again):
        verdict = judged(each.evidence(DATA), Roots.open(tmp_path / "trust"), now, allow_emulated=True)
        assert (verdict.passed, verdict.tier, verdict.claims["mrtd"]) == (True, "emulated", one.measurement)


@pytest.mark.parametrize("device", [platform.SNP_DEVICE, platform.TDX_DEVICE])
def test_emulation_refuses_to_start_beside_a_real_tee(tmp_path: Path, now: datetime, device: str) -> None:
    (tmp_path / device).parent.mkdir(parents=True)
    (tmp_path / device).write_bytes(b"")
    for kind in (EmulatedPlatform, EmulatedTdxPlatform):
        with pytest.raises(PlatformError) as refusal:
            kind.open(tmp_path / "tee", clock=lambda: now, system=tmp_path)
        assert refusal.value.id == "tee.emulated.beside_hardware"
        assert not (tmp_path / "tee").exists()


def test_the_measurement_is_of_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "measured_package"
    (package / "__pycache__").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(measurement, "PACKAGES", ("measured_package", "no_such_package"))
    monkeypatch.setattr(measurement, "ENGINE", "no_such_engine")
    measure_now = measurement.executor_measurement.__wrapped__
    first = measure_now()
    (package / "__pycache__/a.pyc").write_bytes(b"compiled")
    assert (len(first), measure_now()) == (48, first)
    (package / "__init__.py").write_text(" ")
    second = measure_now()
    (package / "__init__.py").rename(package / "other.py")
    assert len({first, second, measure_now()}) == 3
    assert len(measurement.executor_measurement()) == 48


# ---- binding, bundles, policies


def test_binding_is_the_documented_hash() -> None:
    parts = bytes(32), b"\1" * 32, b"spki", b"\2" * 32
    want = hashlib.sha512(
        b"pointcall/binding/v1\0" + parts[0] + parts[1] + hashlib.sha256(b"spki").digest() + parts[3]
    ).digest()
    assert binding.report_data(*parts) == want
    for at in (0, 1, 3):
        wrong = [*parts]
        wrong[at] = wrong[at][:-1]
        with pytest.raises(AssertionError):
            binding.report_data(*wrong)


bundles = st.builds(
    EvidenceBundle,
    st.sampled_from(["snp", "tdx"]),
    st.binary(max_size=60),
    st.lists(st.binary(max_size=20), max_size=3).map(tuple),
    st.lists(st.binary(max_size=20), max_size=3).map(tuple),
    st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3),
    st.none() | st.binary(max_size=20),
)


@given(bundles)
def test_bundles_survive_the_round_trip(bundle: EvidenceBundle) -> None:
    try:
        raw = bundle.encode()
    except UnicodeEncodeError:
        return
    assert EvidenceBundle.parse(raw) == bundle
    assert bundle.sha256 == hashlib.sha256(raw).hexdigest()


@given(st.binary(max_size=200))
def test_any_bytes_are_a_bundle_or_refused(raw: bytes) -> None:
    with pytest.raises(MalformedError):
        EvidenceBundle.parse(raw)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"crls":[]', b'"crls": []'),
        (b'"crls":[]', b'"crls":[],"more":1'),
        (b'"crls":[]', b'"crls":["%%%"]'),
        (b'"crls":[]', b'"crls":["AB=="]'),
        (b'"crls":[]', b'"crls":' + b"[" * 90_000),
        (b'"crls":[]', b'"crls":[' + b",".join([b'""'] * 17) + b"]"),
        (b"evidence/v1", b"evidence/v2"),
        (b'"snp"', b'"sgx"'),
    ],
)
def test_a_bundle_has_one_form(old: bytes, new: bytes) -> None:
    good = EvidenceBundle("snp", b"evidence").encode()
    assert old in good
    with pytest.raises(MalformedError) as refusal:
        EvidenceBundle.parse(good.replace(old, new))
    assert refusal.value.id == "evidence.malformed"


def test_a_bundle_is_bounded() -> None:
    for raw in (EvidenceBundle("snp", bytes(70_000)).encode(), bytes(3 * 1024 * 1024)):
        with pytest.raises(MalformedError):
            EvidenceBundle.parse(raw)


@pytest.mark.parametrize(
    "raw",
    [
        "[]",
        "{",
        '{"allow": true}',
        '{"allow_debug": "yes"}',
        '{"vmpl": [4]}',
        '{"snp": {"min_tcb": {"Rome": {}}}}',
        '{"snp": {"min_tcb": {"Milan": {"bl": 256}}}}',
        '{"snp": {"host_data": "00"}}',
        '{"snp": {"min_abi": "1"}}',
        '{"tdx": {"statuses": ["Fine"]}}',
        '{"tdx": {"min_tcb_date": "yesterday"}}',
        '{"tdx": {"advisories_denied": ["CVE-2026-1"]}}',
        " " * 70_000,
    ],
)
def test_policies_that_are_refused(raw: str) -> None:
    with pytest.raises(MalformedError) as refusal:
        TeePolicy.parse(raw.encode())
    assert refusal.value.id == "tee.policy.malformed"


def test_an_empty_policy_is_the_strict_default() -> None:
    policy = TeePolicy.parse(b"{}")
    assert policy == TeePolicy()
    assert (policy.allow_emulated, policy.allow_debug, policy.vmpl) == (False, False, (0,))
    assert (policy.tdx.statuses, policy.tdx.require_sept_ve_disable) == (("UpToDate",), True)


# ---- statements


def test_ear_sums_up_and_never_affirms_emulated_hardware(machine: Machine, now: datetime) -> None:
    one = machine()
    bundle = one.bundle(one.report(DATA, MEASUREMENT, bytes(32)))
    arguments: dict[str, Any] = {"at": now, "policy_sha256": "00" * 32, "version": "1"}
    good = judged(bundle, Roots.of([one.ark]), now, allow_emulated=True)
    ear = tee_statement.ear(good, **arguments)["submods"]["snp"]
    vector = ear["ear.trustworthiness-vector"]
    assert (ear["ear.status"], ear["pointcall.tier"]) == ("warning", "emulated")
    assert vector == {"instance-identity": 32, "configuration": 2, "executables": 0, "hardware": 32}
    bad = tee_statement.ear(judged(bundle, Roots.of(), now), **arguments)["submods"]["snp"]
    assert (bad["ear.status"], set(bad["ear.trustworthiness-vector"].values())) == ("contraindicated", {96})
    refused = tee_statement.ear(judged(bundle, Roots.of([one.ark]), now), **arguments)["submods"]["snp"]
    assert refused["ear.status"] == "contraindicated"
    hardware = replace(good, tier="hardware")
    assert tee_statement.ear(hardware, **arguments)["submods"]["snp"]["ear.status"] == "affirming"


def test_the_statement_is_canonical_and_whole(machine: Machine, now: datetime) -> None:
    one = machine()
    verdict = judged(one.bundle(one.report(DATA, MEASUREMENT, bytes(32))), Roots.of([one.ark]), now)
    large = replace(verdict, claims={**verdict.claims, "large": 1 << 63, "list": [1, (True,)]})
    raw = tee_statement.statement(large, at=now, evidence_sha256="11" * 32, policy_sha256="00" * 32, version="1")
    rows = json.loads(raw)
    assert rows["subject"] == [{"name": "snp-evidence", "digest": {"sha256": "11" * 32}}]
    assert rows["predicate"]["checks"] == [check.as_dict() for check in verdict.checks]
    assert rows["predicate"]["claims"]["large"] == str(1 << 63)
    assert rows["predicate"]["claims"]["list"] == [1, [True]]


def test_every_check_belongs_to_a_clause(machine: Machine, td: TdxMachine, now: datetime) -> None:
    with pytest.raises(KeyError):
        findings.Findings().check("no.such", True, expected="", observed="")
    for id_, clause in findings.CLAUSES.items():
        assert clause
        assert id_.split(".")[0] in ("tee", "snp", "tdx", "hcl")


# ---- showing


def test_every_form_is_shown(machine: Machine, td: TdxMachine) -> None:
    one, td_one = machine(), td()
    report = one.report(DATA, MEASUREMENT, bytes(32))
    vlek = machine("Genoa", "VLEK")
    old = one.report(DATA, MEASUREMENT, bytes(32), version=2, cpuid_family=0, cpuid_model=0, cpuid_stepping=0)
    for raw, form in (
        (report, "SNP report"),
        (old, "SNP report"),
        (td_one.quote(DATA, MRTD), "TDX quote"),
        (td_one.quote(DATA, MRTD, version=4, body_type=tdx.TD10), "TDX quote"),
        (one.bundle(report).encode(), "evidence bundle"),
        (one.leaf, "AMD certificate"),
        (one.ark, "AMD certificate"),
        (vlek.leaf, "AMD certificate"),
        (encode_table({ENTRIES["VCEK"]: one.leaf}), "GHCB certificate table"),
    ):
        assert json.loads(json.dumps(shown.described(raw)))["form"] == form
    with pytest.raises(MalformedError) as refusal:
        shown.described(b"nothing")
    assert "SNP report: SNP report has a wrong length" in refusal.value.got


# ---- the command line


@pytest.fixture
def files(tmp_path: Path, machine: Machine, now: datetime) -> Path:
    one = machine()
    (tmp_path / "report.bin").write_bytes(one.report(DATA, MEASUREMENT, bytes(32)))
    (tmp_path / "chain.pem").write_bytes(b"".join(pem.encode("CERTIFICATE", der) for der in one.certificates))
    (tmp_path / "root.der").write_bytes(one.ark)
    (tmp_path / "bundle.json").write_bytes(one.bundle((tmp_path / "report.bin").read_bytes()).encode())
    (tmp_path / "policy.json").write_text('{"allow_emulated": true}')
    return tmp_path


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], files: Path) -> Callable[..., tuple[int, Any]]:
    def call(*words: str) -> tuple[int, Any]:
        code = main(["attest", *words, "--state-dir", str(files / "state"), "--json"])
        out = capsys.readouterr().out
        return code, json.loads(out) if out else None

    return call


AT = ("--at", "2026-11-20T12:00:00Z")


def test_verify_snp_and_its_exit_codes(files: Path, said: Callable[..., tuple[int, Any]]) -> None:
    words = ("verify", "snp", str(files / "report.bin"), "--certs", str(files / "chain.pem"), *AT)
    root = ("--emulated-root", str(files / "root.der"))
    assert [code for code, _ in (said(*words), said(*words, *root), said(*words, *root, "--allow-emulated"))] == [
        1,
        3,
        0,
    ]
    code, verdict = said(*words, *root, "--policy", str(files / "policy.json"))
    assert (code, verdict["verdict"], verdict["tier"]) == (3, "accept", "emulated")
    allowed = (*words, *root, "--allow-emulated")
    assert said(*allowed, "--report-data", DATA.hex(), "--measurement", MEASUREMENT.hex().upper())[0] == 0
    code, verdict = said(*allowed, "--report-data", "00" * 64, "--measurement", "00" * 48)
    assert code == 1
    failed = [check["id"] for check in verdict["checks"] if check["outcome"] == "fail"]
    assert failed == ["tee.report_data", "tee.measurement"]
    assert set(verdict) == {"verdict", "tier", "platform", "checks", "not_checked", "claims"}
    assert all(set(row) - {"hint"} == {"id", "spec", "expected", "observed", "outcome"} for row in verdict["checks"])


def test_verify_malformed_prints_the_object_all_the_same(files: Path, said: Callable[..., tuple[int, Any]]) -> None:
    (files / "short").write_bytes(b"x")
    chain = ("--certs", str(files / "chain.pem"))
    for words in (
        ("snp", str(files / "short"), *chain),
        ("snp", str(files / "report.bin")),
        ("snp", str(files / "report.bin"), "--certs", str(files / "short")),
        ("hcl", str(files / "short"), *chain),
        ("hcl", str(files / "short"), "--certs", str(files / "short")),
        ("bundle", str(files / "short")),
        ("tdx", str(files / "short"), "--collateral", str(files / "short")),
        ("tdx", str(files / "short"), "--collateral", str(files / "policy.json")),
    ):
        code, verdict = said("verify", *words, *AT)
        assert (code, verdict["verdict"]) == (4, "reject")
        assert any(row["id"].endswith(".malformed") and row["outcome"] == "fail" for row in verdict["checks"])


def test_wrong_words_and_missing_files(files: Path, said: Callable[..., tuple[int, Any]]) -> None:
    words = ("verify", "snp", str(files / "report.bin"), "--certs", str(files / "chain.pem"))
    for more, code in (
        (("--at", "yesterday"), 2),
        (("--at", "2026-11-20"), 2),
        (("--report-data", "00"), 2),
        (("--report-data", "zz"), 2),
        (("--policy", str(files / "none")), 5),
        (("--policy", str(files / "report.bin")), 4),
        (("--emulated-root", str(files / "none")), 5),
    ):
        assert said(*words, *more)[0] == code


def test_files_are_read_within_bounds(files: Path, said: Callable[..., tuple[int, Any]]) -> None:
    chain = ("--certs", str(files / "chain.pem"))
    assert said("verify", "snp", "/dev/zero", *chain, *AT)[0] == 4
    assert said("verify", "snp", str(files / "report.bin"), "--certs", "/dev/zero", *AT)[0] == 4
    assert said("verify", "tdx", "/dev/zero", "--collateral", "/dev/zero", *AT)[0] == 4
    assert said("show", "/dev/zero")[0] == 4


def test_other_outputs(files: Path, said: Callable[..., tuple[int, Any]]) -> None:
    words = ("verify", "bundle", str(files / "bundle.json"), *AT, "--allow-emulated")
    root = ("--emulated-root", str(files / "root.der"))
    _, ear = said(*words, *root, "--as", "ear")
    assert ear["submods"]["snp"]["ear.status"] == "warning"
    _, statement = said(*words, *root, "--as", "in-toto", "--policy", str(files / "policy.json"))
    assert statement["predicateType"] == tee_statement.PREDICATE_TYPE
    assert (
        statement["subject"][0]["digest"]["sha256"] == hashlib.sha256((files / "bundle.json").read_bytes()).hexdigest()
    )


def test_people_get_tables(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["attest", "verify", "snp", str(files / "report.bin"), "--certs", str(files / "chain.pem"), *AT]
    assert main([*words, "--emulated-root", str(files / "root.der"), "--allow-emulated"]) == 0
    out = capsys.readouterr().out
    assert "EMULATED: software-emulated TEE" in out
    assert "verdict: accept" in out
    assert main(["attest", "show", str(files / "report.bin")]) == 0
    assert "policy.debug" in capsys.readouterr().out
    assert main(["attest", "probe"]) == 0
    assert "SNP guest device" in capsys.readouterr().out
    assert main(["attest", "show", str(files / "policy.json")]) == 4


def test_bundles_are_made(files: Path, said: Callable[..., tuple[int, Any]], td: TdxMachine) -> None:
    out = str(files / "out.json")
    code, row = said("bundle", "snp", str(files / "report.bin"), "--certs", str(files / "chain.pem"), "--out", out)
    assert (code, row["sha256"]) == (0, hashlib.sha256(Path(out).read_bytes()).hexdigest())
    (files / "quote").write_bytes(td().quote(DATA, MRTD))
    (files / "collateral").write_text(json.dumps(td().collateral()))
    (files / "td-root").write_bytes(td().root)
    tdx_words = (str(files / "quote"), "--collateral", str(files / "collateral"))
    assert said("bundle", "tdx", *tdx_words, "--out", out)[0] == 0
    root = ("--emulated-root", str(files / "td-root"), "--allow-emulated")
    assert said("verify", "bundle", out, *AT, *root)[0] == 0
    assert said("verify", "tdx", *tdx_words, *AT, *root)[0] == 0
    code, _ = said("bundle", "emulated", "--out", out, "--report-data", DATA.hex())
    assert code == 0
    assert said("verify", "bundle", out, "--allow-emulated", "--report-data", DATA.hex())[0] == 0
    assert said("verify", "bundle", out)[0] == 3


def test_probe_and_show_in_json(files: Path, said: Callable[..., tuple[int, Any]]) -> None:
    assert {row["what"] for row in said("probe")[1]["findings"]} >= {"SNP guest device", "TDX guest device"}
    assert said("show", str(files / "bundle.json"))[1]["evidence"]["version"] == 3


def test_measure_needs_its_package_to_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("pointcall_attest.measure.importlib.import_module", missing)
    with pytest.raises(measure.MeasureError) as refusal:
        measure.launch_digest(measure.Launch(tmp_path))
    assert "sev-snp-measure" in refusal.value.message
    assert refusal.value.id == "measure.unavailable"


VECTORS = Path(__file__).resolve().parents[3] / "../shared/vectors/tee"


@pytest.fixture
def ovmf() -> Path:
    pytest.importorskip("sevsnpmeasure", reason="the package sev-snp-measure is not installed")
    path = VECTORS / "common/ovmf/ovmf_AmdSev_suffix.bin"
    if not path.exists():
        pytest.skip("the TEE vectors are not here")
    return path


def test_launch_digests_are_the_known_answers(ovmf: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    rows = json.loads((VECTORS / "measure/snp_launch_digest_kat.json").read_text())
    for row in rows:
        empty = {name: tmp_path / "empty" if row[name] else None for name in ("kernel", "initrd")}
        launch = measure.Launch(
            VECTORS / row["ovmf"], row["vcpus"], row["vcpu_type"], row["guest_features"], append=row["append"], **empty
        )
        assert measure.launch_digest(launch).hex() == row["launch_digest"]
        assert measure.explain_launch(launch, bytes.fromhex(row["launch_digest"])).matches


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vcpus": 7}, "vcpus is 7, not 1"),
        ({"vcpu_type": "EPYC-Genoa"}, "vcpu_type is EPYC-Genoa"),
        ({"guest_features": 0x21}, "guest_features is 0x21, not 0x1"),
        ({"append": None}, "the command line was empty"),
        ({"append": "console=ttyS0"}, "no space around it"),
        ({"append": "console=ttyS0\n"}, "ended with a newline"),
        ({"initrd": None}, "the initrd was not there"),
        ({"kernel": None, "initrd": None, "append": None}, "the kernel was not measured"),
        ({"vcpus": 3, "guest_features": 0x21}, "no single change"),
    ],
)
def test_a_launch_digest_that_differs_is_explained(
    ovmf: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    (tmp_path / "kernel").write_bytes(b"kernel")
    (tmp_path / "initrd").write_bytes(b"initrd")
    launch = measure.Launch(ovmf, kernel=tmp_path / "kernel", initrd=tmp_path / "initrd", append="console=ttyS0 ")
    seen = measure.launch_digest(replace(launch, **change))
    explained = measure.explain_launch(launch, seen)
    assert not explained.matches
    assert any(words in reason for reason in explained.reasons)


def test_without_a_command_line_fewer_changes_are_tried(ovmf: Path, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(b"kernel")
    explained = measure.explain_launch(measure.Launch(ovmf, kernel=tmp_path / "kernel"), bytes(48))
    assert "no single change" in explained.reasons[0]


@pytest.mark.parametrize("change", [{"vcpus": 0}, {"vcpus": 513}, {"vcpu_type": "486"}, {"vmm": "bochs"}])
def test_launches_that_cannot_be_measured(ovmf: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(MalformedError) as refused:
        measure.launch_digest(replace(measure.Launch(ovmf), **change))
    assert refused.value.id == "measure.malformed"
    (tmp_path / "bad").write_bytes(bytes(5000))
    with pytest.raises(MalformedError):
        measure.launch_digest(measure.Launch(tmp_path / "bad"))


def test_measure_on_the_command_line(
    ovmf: Path, files: Path, said: Callable[..., tuple[int, Any]], td: TdxMachine
) -> None:
    assert len(said("measure", "snp", "--ovmf", str(ovmf), "--guest-features", "0x1")[1]["launch_digest"]) == 96
    code, rows = said("measure", "snp", "--ovmf", str(ovmf), "--report", str(files / "report.bin"))
    assert (code, rows["launch_digest"]["matches"]) == (1, False)
    logs = [VECTORS / "eventlog" / name for name in ("ccel_ovmf.bin", "ccel_grub.bin")]
    assert set(said("measure", "ccel", str(logs[0]))[1]) == {"rtmr0", "rtmr1", "rtmr2", "rtmr3"}
    assert said("measure", "ccel", str(logs[0]), "--reference", str(logs[0])) == (0, {"same": True, "differences": []})
    assert said("measure", "ccel", str(logs[0]), "--reference", str(logs[1]))[0] == 1
    quote = str(VECTORS / "tdx/v4_gcp_ccel/quote.bin")
    assert said("measure", "ccel", str(VECTORS / "tdx/v4_gcp_ccel/ccel_data.dat"), "--quote", quote)[0] == 0
    assert said("measure", "ccel", str(logs[0]), "--quote", quote)[0] == 1
    hcl = (str(VECTORS / "azure_hcl/azure_snp_hcl_v2.bin"), "--certs", str(VECTORS / "snp/azure_milan_v2_hcl/vek.der"))
    code, verdict = said("verify", "hcl", *hcl, "--at", "2026-03-01T00:00:00Z")
    assert (code, [row["id"] for row in verdict["checks"] if row["outcome"] == "fail"]) == (1, ["snp.version"])


def test_mrtd_on_the_command_line(files: Path, said: Callable[..., tuple[int, Any]], td: TdxMachine) -> None:
    raw = bytearray(8192)
    raw[256:304] = struct.pack("<4sIIIIIQQII", b"TDVF", 48, 1, 1, 4096, 4096, 0x1000, 4096, 0, 1)
    table = struct.pack("<IH16s", 8192 - 256, 22, tdvf._METADATA)
    table += struct.pack("<H16s", len(table) + 18, tdvf._FOOTER)
    raw[8192 - 32 - len(table) : 8192 - 32] = table
    (files / "tdvf").write_bytes(raw)
    found = tdvf.measure(bytes(raw))
    assert said("measure", "tdx", "--tdvf", str(files / "tdvf"))[1]["mrtd_one_pass"] == found.one_pass.hex()
    for mrtd, code in ((found.two_pass, 0), (bytes(48), 1)):
        (files / "quote").write_bytes(td().quote(DATA, mrtd))
        assert said("measure", "tdx", "--tdvf", str(files / "tdvf"), "--quote", str(files / "quote"))[0] == code


# ---- fetching


class Server:
    """AMD KDS and Intel PCS on loopback, with the answers of the emulated vendors."""

    def __init__(self, answers: dict[str, tuple[int, bytes, dict[str, str]]]) -> None:
        self.answers, self.asked = answers, list[str]()

    @contextmanager
    def running(self) -> Iterator[str]:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                status, body, headers = server.answers.get(self.path, (404, b"", {}))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
            thread = threading.Thread(target=http_server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield f"http://127.0.0.1:{http_server.server_port}"
            finally:
                http_server.shutdown()
                thread.join()


def amd_answers(one: EmulatedSnp, now: datetime) -> dict[str, tuple[int, bytes, dict[str, str]]]:
    chain = b"".join(pem.encode("CERTIFICATE", der) for der in (one.ca, one.ark))
    report = snp.parse(one.report(DATA, MEASUREMENT, bytes(32)))
    role = "vlek" if one.kind == "VLEK" else "vcek"
    return {
        f"/{role}/v1/{one.line}/cert_chain": (200, chain, {}),
        f"/{role}/v1/{one.line}/crl": (200, one.crl([], now, now + timedelta(hours=6)), {}),
        fetch.vcek_url(report, one.line, ""): (200, one.leaf, {}),
    }


def intel_answers(one: EmulatedTdx) -> dict[str, tuple[int, bytes, dict[str, str]]]:
    texts = one.collateral()
    chain = {"TCB-Info-Issuer-Chain": quoted(texts["tcb_info_issuer_chain"])}
    qe_chain = {"SGX-Enclave-Identity-Issuer-Chain": quoted(texts["qe_identity_issuer_chain"])}
    crl_chain = {"SGX-PCK-CRL-Issuer-Chain": quoted(texts["tcb_info_issuer_chain"])}
    tcb = f'{{"tcbInfo":{texts["tcb_info"]},"signature":"{texts["tcb_info_signature"]}"}}'
    qe = f'{{"enclaveIdentity":{texts["qe_identity"]},"signature":"{texts["qe_identity_signature"]}"}}'
    return {
        f"/tdx/certification/v4/tcb?fmspc={pck.EMULATED_FMSPC.hex()}": (200, tcb.encode(), chain),
        "/tdx/certification/v4/qe/identity": (200, qe.encode(), qe_chain),
        "/sgx/certification/v4/pckcrl?ca=platform&encoding=der": (200, bytes.fromhex(texts["pck_crl"]), crl_chain),
        "/root.crl": (200, bytes.fromhex(texts["root_ca_crl"]), {}),
    }


class Clock:
    def __init__(self, now: datetime) -> None:
        self.now, self.slept = now, list[float]()

    def __call__(self) -> datetime:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += timedelta(seconds=seconds)


@pytest.mark.parametrize(("line", "kind"), [("Milan", "VCEK"), ("Turin", "VCEK"), ("Genoa", "VLEK")])
def test_fetched_certificates_verify_what_they_were_fetched_for(
    machine: Machine, now: datetime, tmp_path: Path, line: str, kind: str
) -> None:
    one, clock = machine(line, kind), Clock(now)
    report = one.report(DATA, MEASUREMENT, bytes(32))
    with Server(amd_answers(one, now)).running() as url:
        files = fetch.amd(snp.parse(report), Cache(tmp_path, clock, clock.sleep), url)
    leaf = (one.leaf,) if kind == "VLEK" else ()
    bundle = EvidenceBundle("snp", report, (*leaf, *files.certificates), files.crls)
    verdict = judged(bundle, Roots.of([one.ark]), now, allow_emulated=True)
    assert {c.id: c.outcome for c in verdict.checks}["snp.crl"] == "pass"
    assert verdict.passed


def test_one_server_is_asked_every_ten_seconds_and_answers_are_kept(
    machine: Machine, now: datetime, tmp_path: Path
) -> None:
    one, clock = machine(), Clock(now)
    report, server = snp.parse(one.report(DATA, MEASUREMENT, bytes(32))), Server(amd_answers(one, now))
    with server.running() as url:
        first = fetch.amd(report, Cache(tmp_path, clock, clock.sleep), url)
        assert (len(server.asked), clock.slept) == (3, [10.0, 10.0])
        assert fetch.amd(report, Cache(tmp_path, clock, clock.sleep), url) == first
        assert len(server.asked) == 3
        clock.now += timedelta(hours=7)  # past nextUpdate: the CRL is never kept longer
        assert fetch.amd(report, Cache(tmp_path, clock, clock.sleep), url) == first
        assert server.asked[3:] == ["/vcek/v1/Milan/crl"]
        clock.now += timedelta(days=2)
        fetch.amd(report, Cache(tmp_path, clock, clock.sleep), url)
        assert sorted(server.asked[4:]) == ["/vcek/v1/Milan/cert_chain", "/vcek/v1/Milan/crl"]


def test_callers_of_one_url_wait_for_each_other(now: datetime, tmp_path: Path) -> None:
    asked, gate = list[str](), threading.Event()

    def slow(url: str) -> Answer:
        asked.append(url)
        gate.wait(5)
        return Answer(b"x", {})

    cache = Cache(tmp_path, lambda: now, lambda _: None, slow)
    callers = [threading.Thread(target=cache.fetch, args=("http://x/", lambda _: None)) for _ in range(4)]
    for caller in callers:
        caller.start()
    gate.set()
    for caller in callers:
        caller.join()
    assert asked == ["http://x/"]


def test_a_broken_cache_entry_is_asked_for_again(now: datetime, tmp_path: Path) -> None:
    cache = Cache(tmp_path, lambda: now, lambda _: None, lambda _: Answer(b"x", {}))
    cache.fetch("http://x/", lambda _: now + timedelta(days=1))
    (path,) = tmp_path.glob("*.json")
    for broken in ("", "{}", "[]", '{"until": "2030-01-01T00:00:00+00:00", "body": "zz", "headers": {}}'):
        path.write_text(broken)
        assert cache.fetch("http://x/", lambda _: None).body == b"x"


def test_fetched_collateral_verifies_what_it_was_fetched_for(td: TdxMachine, now: datetime, tmp_path: Path) -> None:
    one, clock = td(), Clock(now)
    quote = tdx.parse(one.quote(DATA, MRTD))
    with Server(intel_answers(one)).running() as url:
        texts = fetch.intel(quote, Cache(tmp_path, clock, clock.sleep), url, f"{url}/root.crl")
    bundle = EvidenceBundle("tdx", quote.raw, collateral=texts)
    assert judged(bundle, Roots.of([one.root]), now, allow_emulated=True).passed


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/vcek/v1/Milan/cert_chain", (429, b"", {})),
        ("/vcek/v1/Milan/cert_chain", (404, b"", {})),
        ("/vcek/v1/Milan/cert_chain", (204, b"", {})),
        ("/vcek/v1/Milan/cert_chain", (200, b"hello", {})),
        ("/vcek/v1/Milan/crl", (200, b"hello", {})),
        ("/vcek/v1/Milan/crl", (200, bytes(fetch.MAX_ANSWER_BYTES + 1), {})),
        (None, (200, b"hello", {})),
    ],
)
def test_other_answers_of_amd(
    machine: Machine, now: datetime, tmp_path: Path, path: str | None, answer: tuple[int, bytes, dict[str, str]]
) -> None:
    one, clock = machine(), Clock(now)
    report = snp.parse(one.report(DATA, MEASUREMENT, bytes(32)))
    answers = amd_answers(one, now) | {path or fetch.vcek_url(report, "Milan", ""): answer}
    with Server(answers).running() as url, pytest.raises(FetchError):
        fetch.amd(report, Cache(tmp_path, clock, clock.sleep), url)
    assert not any("hello" in path.read_text() for path in tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("tcb", b"{}", {}),
        ("tcb", b'{"tcbInfo":{},"signature":5}', {}),
        ("tcb", b'{"tcbInfo":{},"signature":"00"}', {}),
        ("identity", b'{"enclaveIdentity":{"id":1},"signature":"00"}', {}),
        ("pckcrl", None, {}),
    ],
)
def test_other_answers_of_intel(
    td: TdxMachine, now: datetime, tmp_path: Path, path: str, body: bytes | None, headers: dict[str, str]
) -> None:
    one, clock = td(), Clock(now)
    answers = intel_answers(one)
    (name,) = [key for key in answers if path in key]
    answers[name] = (200, answers[name][1] if body is None else body, headers)
    with Server(answers).running() as url, pytest.raises(FetchError):
        fetch.intel(tdx.parse(one.quote(DATA, MRTD)), Cache(tmp_path, clock, clock.sleep), url, f"{url}/root.crl")


def test_servers_that_are_not_there(machine: Machine, now: datetime, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="cannot be reached"):
        fetch.http_get("http://127.0.0.1:1/")
    with pytest.raises(FetchError, match="not a web address"):
        fetch.http_get("file:///etc/passwd")
    old = {"version": 2, "cpuid_family": 0, "cpuid_model": 0, "cpuid_stepping": 0}
    report = snp.parse(machine().report(DATA, MEASUREMENT, bytes(32), **old))
    with pytest.raises(FetchError, match="does not name its product"):
        fetch.amd(report, Cache(tmp_path, lambda: now, lambda _: None))
    turin = snp.parse(machine("Turin").report(DATA, MEASUREMENT, bytes(32)))
    assert fetch.vcek_url(turin, "Turin", "").startswith("/vcek/v1/Turin/454d554c41544544?fmcSPL=00&blSPL=01&")


def test_fetch_on_the_command_line(
    files: Path, said: Callable[..., tuple[int, Any]], machine: Machine, td: TdxMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "SPACING", timedelta(0))
    monkeypatch.setattr(cli, "_cache", lambda args: Cache(files / "cache", fetch.utc_now, lambda _: None))
    now = datetime.now(UTC)
    (files / "quote").write_bytes(td().quote(DATA, MRTD))
    out = str(files / "out")
    with Server(amd_answers(machine(), now)).running() as url:
        assert said("fetch", "snp", str(files / "report.bin"), "--kds", url, "--out", out)[1]["certificates"] == 3
    words = ("verify", "snp", str(files / "report.bin"), "--certs", out, "--emulated-root", str(files / "root.der"))
    at = ("--at", "2026-11-21T00:00:00Z")
    assert said(*words, "--allow-emulated", *at)[0] in (0, 1)
    with Server(intel_answers(td())).running() as url:
        code, rows = said(
            "fetch", "tdx", str(files / "quote"), "--pcs", url, "--root-crl", f"{url}/root.crl", "--out", out
        )
    assert (code, rows["texts"]) == (0, 9)
    collateral.parse(json.loads(Path(out).read_text()))


def test_the_cache_of_the_command_line(tmp_path: Path) -> None:
    cache = cli._cache(argparse.Namespace(state_dir=str(tmp_path)))
    assert cache.folder == tmp_path / "cache" / "attest"
    assert cache.clock().tzinfo is UTC
    assert os.fspath(cache.folder)


def test_marks_of_emulation_are_in_every_certificate(machine: Machine) -> None:
    assert all(certs.parse(der).emulated for der in machine().certificates)
