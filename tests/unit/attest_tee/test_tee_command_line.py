"""`pointcall attest` as a stranger calls it: odd words, odd files. One JSON object, one exit code, no traceback."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest import pem, shown, tdx
from pointcall_attest.appraise import ParsedQuote, ParsedReport, appraise, parse, verify
from pointcall_attest.emulated import EmulatedSnp
from pointcall_attest.emulated_tdx import EmulatedTdx
from pointcall_attest.errors import MalformedError
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.snp_chain import Authentic
from pointcall_attest.tdx_chain import AuthenticQuote
from pointcall_attest.tee_policy import TeePolicy
from pointcall_attest.trust import Roots
from pointcall_executor.cli import main
from tests.fuzz.attest.mutants import mutate

Machine = Callable[..., EmulatedSnp]
TdxMachine = Callable[..., EmulatedTdx]
Said = Callable[..., tuple[int, Any]]
DATA, MEASUREMENT = b"\x11" * 64, b"\x22" * 48
KEYS = {"verdict", "tier", "platform", "checks", "not_checked", "claims"}
AT = ("--at", "2026-11-20T12:00:00Z")


def hcl_report(inner: bytes, runtime: bytes) -> bytes:
    """An HCL report around an SNP report, in the form of Azure's paravisor."""
    head = struct.pack("<4sIIII12s", b"HCLA", 2, 1236 + len(runtime), 2, 0, bytes(12))
    return head + inner + struct.pack("<IIIII", 20 + len(runtime), 1, 2, 1, len(runtime)) + runtime


RUNTIME = b'{"keys":[{"kid":"HCLAkPub"}]}'


@pytest.fixture
def files(tmp_path: Path, machine: Machine, td: TdxMachine) -> Path:
    one, other = machine(), td()
    bound = hashlib.sha256(RUNTIME).digest().ljust(64, b"\0")
    for name, raw in (
        ("report", one.report(DATA, MEASUREMENT, bytes(32))),
        ("chain.pem", b"".join(pem.encode("CERTIFICATE", der) for der in one.certificates)),
        ("root", one.ark),
        ("quote", other.quote(DATA, MEASUREMENT)),
        ("collateral", json.dumps(other.collateral()).encode()),
        ("td-root", other.root),
        ("hcl", hcl_report(one.report(bound, MEASUREMENT, bytes(32)), RUNTIME)),
    ):
        (tmp_path / name).write_bytes(raw)
    return tmp_path


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], files: Path) -> Said:
    def call(*words: str | Path) -> tuple[int, Any]:
        roots = ("--emulated-root", files / "root", "--emulated-root", files / "td-root")
        more = roots if words[0] == "verify" else ()
        code = main(["attest", *map(str, words), *map(str, more), "--state-dir", str(files / "state"), "--json"])
        said = capsys.readouterr()
        assert said.err == ""
        assert said.out.count("\n") == 1
        return code, json.loads(said.out)

    return call


def snp_words(files: Path, report: str = "report") -> tuple[str | Path, ...]:
    return ("verify", "snp", files / report, "--certs", files / "chain.pem", "--allow-emulated")


def failed(verdict: Any) -> list[str]:
    assert set(verdict) == KEYS
    return [check["id"] for check in verdict["checks"] if check["outcome"] == "fail"]


@pytest.mark.parametrize(
    ("more", "code", "check"),
    [
        (("--certs", "."), 4, "evidence.file.malformed"),
        (("--policy", "."), 4, "evidence.file.malformed"),
        (("--certs", "absent"), 5, "environment.os"),
        (("--policy", "absent"), 5, "environment.os"),
        (("--policy", "report"), 4, "tee.policy.malformed"),
        (("--certs", "report"), 4, "cert.file.malformed"),
    ],
)
def test_files_that_are_none(
    files: Path, said: Said, monkeypatch: pytest.MonkeyPatch, more: tuple[str, str], code: int, check: str
) -> None:
    monkeypatch.chdir(files)
    got, verdict = said(*snp_words(files), *AT, *more)
    assert (got, verdict["verdict"], failed(verdict)) == (code, "reject", [check])
    bare = ("verify", "hcl", files / "hcl", "--certs", files / "chain.pem", *AT)
    got, verdict = said(*bare, *more)
    assert (got, verdict["verdict"], failed(verdict)) == (code, "reject", [check])


@pytest.mark.parametrize("form", ["snp", "tdx", "hcl", "bundle"])
def test_a_folder_and_a_missing_file_as_evidence(files: Path, said: Said, form: str) -> None:
    more = ("--collateral", files / "collateral") if form == "tdx" else ()
    for name, code, check in ((".", 4, "evidence.file.malformed"), ("absent", 5, "environment.os")):
        got, verdict = said("verify", form, files / name, *more, *AT)
        assert (got, verdict["verdict"], failed(verdict)) == (code, "reject", [check])


@pytest.mark.parametrize(
    "policy",
    [
        b"",
        b"[]",
        b"{",
        b"null",
        b'{"unknown": 1}',
        b'{"snp": {"unknown": 1}}',
        b'{"allow_debug": true, "allow_debug": false}',
        b'{"vmpl": [true]}',
        b'{"tdx": {"statuses": ["Fine"]}}',
        b"\xff",
        b"[" * 60_000,
        b" " * 65_537,
    ],
)
def test_policies_that_are_no_policy(files: Path, said: Said, policy: bytes) -> None:
    (files / "policy").write_bytes(policy)
    code, verdict = said(*snp_words(files), *AT, "--policy", files / "policy")
    assert (code, failed(verdict)) == (4, ["tee.policy.malformed"])


@pytest.mark.parametrize(
    "words",
    [
        ("--report-data", ""),
        ("--report-data", "11" * 63),
        ("--report-data", "0x" + "11" * 63),
        ("--measurement", ""),
        ("--measurement", "22" * 47),
        ("--measurement", "no hex"),
        ("--at", ""),
        ("--at", "now"),
        ("--at", "2026-11-20"),
        ("--at", "2026-11-20T12:00:00"),
        ("--at", "2026-11-20T12Z"),
        ("--at", "20261120T120000Z"),
        ("--at", "2026-W47-5T12:00:00Z"),
        ("--at", "2026-02-30T12:00:00Z"),
        ("--at", "2026-11-20T23:59:60Z"),
        ("--at", "2026-11-20T12:00:00+24:00"),
        ("--at", "0001-01-01T00:00:00+14:00"),
        ("--at", "9999-12-31T23:59:59-14:00"),
    ],
)
def test_words_that_say_nothing_are_refused(files: Path, said: Said, words: tuple[str, str]) -> None:
    """Above all an empty --report-data, as an unset variable of a shell gives: it must not mean "any"."""
    for start in (snp_words(files), ("verify", "hcl", files / "hcl", "--certs", files / "chain.pem")):
        code, verdict = said(*start, *words)
        assert (code, verdict["verdict"], failed(verdict)) == (2, "reject", ["cli.usage"])


@pytest.mark.parametrize(
    "at",
    [
        "2026-11-20T12:00:00Z",
        "2026-11-20t12:00:00z",
        "2026-11-20 12:00:00Z",
        "2026-11-20T12:00:00.123456789Z",
        "2026-11-20T14:00:00+02:00",
        "2026-11-20T11:30:00-00:30",
    ],
)
def test_every_form_of_rfc_3339_is_a_time(files: Path, said: Said, at: str) -> None:
    assert said(*snp_words(files), "--at", at)[0] == 0
    assert said(*snp_words(files), "--at", at.replace("2026", "2027"))[0] == 1


def test_hcl_reports_and_their_expectations(files: Path, said: Said) -> None:
    words = ("verify", "hcl", files / "hcl", "--certs", files / "chain.pem", *AT)
    assert said(*words)[0] == 3
    allowed = (*words, "--allow-emulated")
    code, verdict = said(*allowed)
    assert (code, verdict["verdict"], verdict["tier"], failed(verdict)) == (0, "accept", "emulated", [])
    bound = hashlib.sha256(RUNTIME).hexdigest() + "00" * 32
    assert said(*allowed, "--report-data", bound, "--measurement", MEASUREMENT.hex())[0] == 0
    code, verdict = said(*allowed, "--report-data", "11" * 64, "--measurement", "33" * 48)
    assert (code, failed(verdict)) == (1, ["tee.report_data", "tee.measurement"])


@pytest.mark.parametrize(
    ("platform", "product", "version", "seen"),
    [
        ("snp", "Milan", None, 3),
        ("snp", "Genoa", 5, 5),
        ("snp", "Turin", 3, 3),
        ("tdx", "Milan", None, 5),
        ("tdx", "Milan", 4, 4),
    ],
)
def test_emulated_evidence_as_files_of_their_own(
    files: Path, said: Said, platform: str, product: str, version: int | None, seen: int
) -> None:
    words = ("bundle", "emulated", "--platform", platform, "--product", product, "--report-data", DATA.hex())
    more = () if version is None else ("--version", str(version))
    assert said(*words, *more, "--out", files / "bundle")[0] == 0
    code, row = said("bundle", "unpack", files / "bundle", "--out", files / "parts" / "here")
    assert (code, row["platform"]) == (0, platform)
    evidence, *rest = map(Path, row["files"])
    names = ("--certs",) if platform == "snp" else ("--collateral",)
    given = [word for pair in zip(names, rest, strict=True) for word in pair]
    code, verdict = said("verify", platform, evidence, *given, "--allow-emulated", "--report-data", DATA.hex())
    assert (code, verdict["tier"], verdict["claims"]["version"]) == (0, "emulated", seen)
    assert said("verify", platform, evidence, *given)[0] == 3


def test_unpacking_keeps_every_part(files: Path, said: Said, machine: Machine, now: datetime) -> None:
    one = machine()
    crl = one.crl([], now, now)
    whole = EvidenceBundle("snp", (files / "report").read_bytes(), one.certificates, (crl,), None, b"log")
    (files / "bundle").write_bytes(whole.encode())
    _, row = said("bundle", "unpack", files / "bundle", "--out", files / "parts")
    parts = {Path(name).name: Path(name).read_bytes() for name in row["files"]}
    assert [label for label, _ in pem.blocks(parts["certs.pem"])] == ["CERTIFICATE"] * 3 + ["X509 CRL"]
    assert (parts["report.bin"], parts["ccel.bin"]) == (whole.evidence, b"log")
    bare = EvidenceBundle("tdx", b"quote")
    (files / "bundle").write_bytes(bare.encode())
    assert [
        Path(name).name for name in said("bundle", "unpack", files / "bundle", "--out", files / "p")[1]["files"]
    ] == ["quote.bin"]


def test_a_version_that_the_platform_does_not_have(files: Path, said: Said) -> None:
    for platform, version in (("snp", "4"), ("tdx", "3")):
        words = ("bundle", "emulated", "--platform", platform, "--version", version, "--out", files / "b")
        assert said(*words)[0] == 2


def test_names_and_texts_cannot_paint_the_terminal(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = files / "[red]\x1b[31m[bold"
    odd.write_bytes((files / "report").read_bytes())
    words = ["attest", "verify", "snp", str(odd), "--certs", str(files / "chain.pem"), *AT]
    assert main([*words, "--emulated-root", str(files / "root"), "--allow-emulated"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[red]" in out
    inner = (files / "hcl").read_bytes()[32:1216]
    (files / "painted").write_bytes(hcl_report(inner, b'{"keys":"\\u001b[31m\\ud800"}'))
    assert main(["attest", "show", str(files / "painted")]) == 0
    assert "\\u{1b}[31m\\u{d800}" in capsys.readouterr().out
    assert main(["attest", "show", str(files / "painted"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runtime_data"] == {"keys": "\x1b[31m\ud800"}


@pytest.mark.parametrize(
    "runtime",
    [
        b'{"keys":NaN}',
        b'{"keys":1e999}',
        b'{"keys":-Infinity}',
        b'{"keys":1,"keys":2}',
        b'{"keys":' + b'{"a":' * 128 + b"1" + b"}" * 129,
        b'{"keys":' + b"[" * 1000 + b"]" * 1000 + b"}",
        b'{"other":1}',
        b"[]",
        b"\xff",
    ],
)
def test_runtime_data_is_read_in_one_way(files: Path, said: Said, runtime: bytes) -> None:
    inner = (files / "hcl").read_bytes()[32:1216]
    (files / "odd").write_bytes(hcl_report(inner, runtime))
    code, verdict = said("verify", "hcl", files / "odd", "--certs", files / "chain.pem", *AT)
    assert (code, failed(verdict)) == (4, ["hcl.malformed"])
    assert said("show", files / "odd")[0] == 4


def test_runtime_data_may_be_nested_up_to_the_limit(files: Path, said: Said) -> None:
    inner = (files / "hcl").read_bytes()[32:1216]
    deep = b'{"keys":0.5,"a":' + b"[" * 127 + b"]" * 127 + b"}"
    (files / "odd").write_bytes(hcl_report(inner, deep))
    assert said("show", files / "odd")[1]["runtime_data"]["keys"] == 0.5


def test_every_file_of_intel_is_shown(files: Path, said: Said, td: TdxMachine) -> None:
    other = td()
    leaf = tdx.pck_certificates(other.chain_pem)[0]
    root_crl = bytes.fromhex(other.collateral(revoked=[5])["root_ca_crl"])
    found = {raw: shown.described(raw) for raw in (leaf, root_crl, (files / "collateral").read_bytes())}
    assert found[leaf]["form"] == "Intel certificate"
    assert (found[leaf]["role"], found[leaf]["sgx"]["fmspc"]) == ("pck", "e5" * 6)
    assert shown.described(other.root)["sgx"] is None
    assert found[root_crl]["form"] == "certificate revocation list"
    tables = found[(files / "collateral").read_bytes()]
    assert tables["form"] == "Intel collateral"
    assert tables["tcb_info"]["levels"][0]["status"] == "UpToDate"
    assert tables["signers"] == ["EMULATED Intel SGX TCB Signing"] * 2
    assert json.loads(json.dumps(found[leaf])) == found[leaf]
    code, row = said("show", files / "chain.pem")
    assert (code, row["form"], [one["kind"] for one in row["blocks"]]) == (
        0,
        "certificates in PEM",
        ["VCEK", "ASK", "ARK"],
    )
    for bad in (b"", b"\x30\x03abc", pem.encode("CERTIFICATE", b"x")):
        with pytest.raises(MalformedError):
            shown.described(bad)


def test_three_steps_of_three_types(machine: Machine, td: TdxMachine, now: datetime) -> None:
    """The interface for Python: docs/spec/evidence.md, From Python."""
    one, other = machine(), td()
    roots, policy = Roots.of([one.ark, other.root]), TeePolicy(allow_emulated=True)
    parsed = parse(one.bundle(one.report(DATA, MEASUREMENT, bytes(32))))
    quoted = parse(other.bundle(other.quote(DATA, MEASUREMENT)))
    assert (type(parsed), type(quoted)) == (ParsedReport, ParsedQuote)
    for step, kind in ((parsed, Authentic), (quoted, AuthenticQuote)):
        evidence = verify(step, roots=roots, at=now)
        assert type(evidence) is kind
        verdict = appraise(evidence, policy, report_data=DATA, measurements=[MEASUREMENT.hex()])
        assert verdict.require().tier == "emulated"
        assert [c.id for c in appraise(evidence, policy, report_data=bytes(64), measurements=None).failed] == [
            "tee.report_data"
        ]


def test_any_change_of_any_file_ends_in_a_verdict(files: Path, said: Said) -> None:
    """Changed files through the whole command: the exit code is one of four, the object has its form."""
    chance = random.Random(0x5EED)
    good = {name: (files / name).read_bytes() for name in ("report", "chain.pem", "quote", "collateral", "hcl")}
    for round_ in range(250):
        name = list(good)[round_ % len(good)]
        (files / name).write_bytes(mutate(good[name], chance))
        form = "tdx" if name in ("quote", "collateral") else "hcl" if name == "hcl" else "snp"
        more = ("--collateral", files / "collateral") if form == "tdx" else ("--certs", files / "chain.pem")
        evidence = {"tdx": "quote", "hcl": "hcl", "snp": "report"}[form]
        code, verdict = said("verify", form, files / evidence, *more, *AT, "--allow-emulated")
        (files / name).write_bytes(good[name])
        assert (code, set(verdict)) == ({"accept": 0}.get(verdict["verdict"], code), KEYS)
        assert code in (0, 1, 4)
        assert (code == 4) == any(id_.endswith(".malformed") for id_ in failed(verdict))
