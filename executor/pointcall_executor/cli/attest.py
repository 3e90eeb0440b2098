"""`pointcall attest`: verify, show, bundle, measure and probe TEE evidence. Thin: the attest room does the work.

Verification is offline and at an explicit time. Roots: the pinned ones, and the emulated ones of the trust folder.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pointcall_attest.errors import MalformedError
from pointcall_attest.printable import shown
from pointcall_executor.cli import output
from pointcall_executor.cli.output import Exit, UsageRefusal
from pointcall_runbook.errors import PointcallError

MAX_SHOWN_CHARS: Final = 65536  # of one field; an event log in one line has some 10,000
MAX_FILE_BYTES: Final = 4 * 1024 * 1024  # certificate files; every other form is smaller

_EMULATED_VERSIONS: Final = {"snp": (3, 5), "tdx": (4, 5)}
_RFC3339: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)  # section 5.6

if TYPE_CHECKING:
    from pointcall_attest.certificate_file import CertificateFile
    from pointcall_attest.evidence import EvidenceBundle
    from pointcall_attest.measure import Explanation
    from pointcall_attest.tee_policy import TeePolicy
    from pointcall_attest.trust import Roots
    from pointcall_attest.verdict import Verdict
    from pointcall_executor.tee.fetch import Cache


def configure(parser: argparse.ArgumentParser) -> None:
    """The words after `pointcall attest`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = actions.add_parser("verify", help="check evidence offline and say every check")
    forms = verify.add_subparsers(dest="form", required=True, metavar="FORM")
    _configure_verify(_leaf(forms, "snp", "an SNP report of 1184 bytes", _verify_snp))
    tdx = _leaf(forms, "tdx", "a TDX quote", _verify_tdx)
    _configure_verify(tdx)
    _add_tdx(tdx)
    _configure_verify(_leaf(forms, "hcl", "an Azure HCL report", _verify_hcl))
    _configure_verify(_leaf(forms, "bundle", "an evidence bundle", _verify_bundle))
    show = _leaf(actions, "show", "print every field of any evidence file", _show)
    show.add_argument("file", type=Path, metavar="FILE")
    _leaf(actions, "probe", "say which TEE this machine offers, and why not", _probe)
    _configure_fetch(actions.add_parser("fetch", help="get certificates or collateral (network); never verifies"))
    _configure_measure(actions.add_parser("measure", help="compute expected measurements and explain a mismatch"))
    _configure_bundle(actions)


def _configure_bundle(actions: Any) -> None:
    bundle = actions.add_parser("bundle", help="make one file that carries all that a verification needs")
    sources = bundle.add_subparsers(dest="form", required=True, metavar="FORM")
    snp = _leaf(sources, "snp", "from a report and its certificates", _bundle_snp)
    snp.add_argument("file", type=Path, metavar="REPORT")
    _add_certs(snp)
    tdx = _leaf(sources, "tdx", "from a quote and its collateral", _bundle_tdx)
    tdx.add_argument("file", type=Path, metavar="QUOTE")
    _add_tdx(tdx)
    emulated = _leaf(sources, "emulated", "new evidence of this installation's emulated platform", _bundle_emulated)
    emulated.add_argument("--platform", choices=tuple(_EMULATED_VERSIONS), default="snp")
    emulated.add_argument("--product", choices=("Milan", "Genoa", "Turin"), default="Milan", help="of SNP")
    emulated.add_argument("--version", type=int, help="of the report (3, 5) or quote (4, 5)")
    emulated.add_argument("--report-data", metavar="HEX", default="00" * 64, help="64 bytes (default: zero)")
    for source in (snp, tdx, emulated):
        source.add_argument("--out", type=Path, required=True, metavar="FILE")
    unpack = _leaf(sources, "unpack", "the parts of a bundle as files of their own", _unpack)
    unpack.add_argument("file", type=Path, metavar="BUNDLE")
    unpack.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="made where it is not there")


def _configure_fetch(parser: argparse.ArgumentParser) -> None:
    forms = parser.add_subparsers(dest="form", required=True, metavar="FORM")
    snp = _leaf(forms, "snp", "VCEK, chain and CRL from AMD, as PEM", _fetch_snp)
    snp.add_argument("--kds", metavar="URL", help="another server than AMD's")
    snp.add_argument("--product", choices=("Milan", "Genoa", "Turin"), help="needed for version 2 reports only")
    tdx = _leaf(forms, "tdx", "collateral from Intel, as JSON", _fetch_tdx)
    tdx.add_argument("--pcs", metavar="URL", help="another server than Intel's")
    tdx.add_argument("--root-crl", metavar="URL", help="another place of the root's CRL")
    for form in (snp, tdx):
        form.add_argument("file", type=Path, metavar="EVIDENCE")
        form.add_argument("--out", type=Path, required=True, metavar="FILE")


def _configure_measure(parser: argparse.ArgumentParser) -> None:
    forms = parser.add_subparsers(dest="form", required=True, metavar="FORM")
    snp = _leaf(forms, "snp", "the launch digest of an SNP guest under QEMU", _measure_snp)
    for name in ("ovmf", "kernel", "initrd"):
        snp.add_argument(f"--{name}", type=Path, required=name == "ovmf", metavar="FILE")
    snp.add_argument("--append", metavar="TEXT", help="kernel command line, exactly")
    snp.add_argument("--vcpus", type=int, default=1)
    snp.add_argument("--vcpu-type", default="EPYC-v4")
    snp.add_argument("--guest-features", type=lambda text: int(text, 0), default=1, metavar="N")
    snp.add_argument("--vmm", default="QEMU", help="QEMU, ec2 or gce")
    snp.add_argument("--report", type=Path, metavar="FILE", help="compare with this SNP report")
    tdx = _leaf(forms, "tdx", "the MRTD of a TDX firmware image", _measure_tdx)
    tdx.add_argument("--tdvf", type=Path, required=True, metavar="FILE")
    tdx.add_argument("--quote", type=Path, metavar="FILE", help="compare with this TDX quote")
    ccel = _leaf(forms, "ccel", "the RTMRs that an event log leads to", _measure_ccel)
    ccel.add_argument("file", type=Path, metavar="LOG")
    ccel.add_argument("--quote", type=Path, metavar="FILE", help="compare with this TDX quote")
    ccel.add_argument("--reference", type=Path, metavar="LOG", help="say where this boot and another part")


def run(args: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = args.do
    try:
        return action(args)
    except (PointcallError, OSError) as error:
        if not (args.json and "form_out" in args):
            raise
        return _refused(args, error)


def _refused(args: argparse.Namespace, error: PointcallError | OSError) -> int:
    """What keeps a verification from starting, as a verdict too: who reads JSON always gets one object of one form."""
    from pointcall_attest.verdict import Check, Verdict

    if isinstance(error, PointcallError):
        check = Check(
            error.id, "fail", error.want, ": ".join(filter(None, (error.message, error.got))), hint=error.hint
        )
    else:
        check = Check("environment.os", "fail", "a file that can be read", str(error))
    output.print_json(Verdict((check,), platform=args.form).as_dict())
    return output.exit_of(error)


def _leaf(parent: Any, name: str, help: str, do: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    """A last word, with the options that every verb has in either place."""
    parser: argparse.ArgumentParser = parent.add_parser(name, help=help)
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="machine-readable output")
    parser.add_argument("--state-dir", metavar="DIR", default=argparse.SUPPRESS, help="where all state lives")
    parser.set_defaults(do=do)
    return parser


def _add_certs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--certs",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="DER, PEM or a GHCB certificate table, in any order; missing AMD CAs come from the shipped, pinned set",
    )


def _add_tdx(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--collateral", type=Path, required=True, metavar="FILE", help="Intel collateral in JSON")
    parser.add_argument("--ccel", type=Path, metavar="FILE", help="the event log, to be replayed to the RTMRs")


def _configure_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE")
    _add_certs(parser)
    parser.add_argument(
        "--policy", type=Path, metavar="FILE", help="a TEE policy (docs/spec/trust.md); default: strict"
    )
    parser.add_argument("--at", metavar="RFC3339", help="time of verification (default: now)")
    parser.add_argument("--report-data", metavar="HEX", help="the 64 bytes that the evidence must bind")
    parser.add_argument("--measurement", action="append", metavar="HEX", help="a reference value; may be repeated")
    parser.add_argument(
        "--as", dest="form_out", choices=("verdict", "ear", "in-toto"), default="verdict", help="what --json prints"
    )
    parser.add_argument("--allow-emulated", action="store_true", help="accept software-emulated evidence")
    parser.add_argument(
        "--emulated-root", action="append", type=Path, default=[], metavar="FILE", help="an emulated root (DER)"
    )


def _verify_snp(args: argparse.Namespace) -> int:
    from pointcall_attest.evidence import EvidenceBundle

    def bundle() -> EvidenceBundle:
        files = _certificates(args.certs)
        return EvidenceBundle("snp", _read(args.file), files.certificates, files.crls)

    return _verify(args, "snp", bundle)


def _verify_tdx(args: argparse.Namespace) -> int:
    return _verify(args, "tdx", lambda: _tdx_evidence(args))


def _tdx_evidence(args: argparse.Namespace) -> EvidenceBundle:
    from pointcall_attest import collateral
    from pointcall_attest.evidence import EvidenceBundle

    texts = collateral.parse_json(_read(args.collateral))
    log = _read(args.ccel) if args.ccel else None
    return EvidenceBundle("tdx", _read(args.file), collateral=texts, event_log=log)


def _verify_hcl(args: argparse.Namespace) -> int:
    from pointcall_attest import appraise

    roots, at = _roots(args), _time(args.at)
    report_data, measurements = _report_data(args), _measurements(args)
    try:
        policy, files = _policy(args), _certificates(args.certs)
        raw = _read(args.file)
    except MalformedError as error:
        return _print(args, appraise.malformed(error, "hcl"))
    verdict = appraise.appraise_hcl(
        raw,
        files.certificates,
        policy=policy,
        roots=roots,
        at=at,
        report_data=report_data,
        measurements=measurements,
        crls=files.crls,
    )
    return _print(args, verdict)


def _verify_bundle(args: argparse.Namespace) -> int:
    from pointcall_attest.evidence import EvidenceBundle

    return _verify(args, "", lambda: EvidenceBundle.parse(_read(args.file)))


def _verify(args: argparse.Namespace, platform: str, make: Callable[[], EvidenceBundle]) -> int:
    """Parse the evidence, appraise it, print the verdict, return its exit code."""
    from pointcall_attest import appraise

    roots, at = _roots(args), _time(args.at)
    report_data, measurements = _report_data(args), _measurements(args)
    try:
        policy, bundle = _policy(args), make()
    except MalformedError as error:
        return _print(args, appraise.malformed(error, platform))
    verdict = appraise.appraise_bundle(
        bundle, policy=policy, roots=roots, at=at, report_data=report_data, measurements=measurements
    )
    return _print(args, verdict)


def _report_data(args: argparse.Namespace) -> bytes | None:
    """None only where the word is not there: an empty one, as an unset shell variable gives, is a mistake."""
    return None if args.report_data is None else _hex(args.report_data, 64)


def _measurements(args: argparse.Namespace) -> list[str] | None:
    return None if args.measurement is None else [_hex(value, 48).hex() for value in args.measurement]


def _print(args: argparse.Namespace, verdict: Verdict) -> int:
    if args.json:
        output.print_json(_formed(args, verdict))
    else:
        output.print_verdict(verdict, title=f"{verdict.platform} evidence {args.file.name}")
    return _exit(verdict, allow_emulated=args.allow_emulated)


def _formed(args: argparse.Namespace, verdict: Verdict) -> dict[str, Any]:
    """The verdict in the words that were asked for; EAR and in-toto name evidence and policy by digest."""
    import hashlib
    import json

    from pointcall_attest import tee_statement
    from pointcall_executor import VERSION

    if args.form_out == "verdict":
        return verdict.as_dict()
    policy = hashlib.sha256(_read(args.policy) if args.policy else b"{}").hexdigest()
    at = _time(args.at)
    if args.form_out == "ear":
        return tee_statement.ear(verdict, at=at, policy_sha256=policy, version=VERSION)
    evidence = hashlib.sha256(_read(args.file)).hexdigest()
    raw = tee_statement.statement(verdict, at=at, evidence_sha256=evidence, policy_sha256=policy, version=VERSION)
    statement: dict[str, Any] = json.loads(raw)
    return statement


def _read(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """The file up to one byte more than any format takes: what is longer is refused by its parser."""
    if path.is_dir():
        raise MalformedError("a folder, not a file", id="evidence.file.malformed", want="a file", got=str(path))
    with path.open("rb") as file:
        return file.read(limit + 1)


def _exit(verdict: Verdict, *, allow_emulated: bool) -> Exit:
    failed = {check.id for check in verdict.failed}
    if any(name.endswith(".malformed") for name in failed):
        return Exit.MALFORMED
    if failed == {"tee.emulated"}:
        return Exit.EMULATED
    return output.verdict_exit(verdict, allow_emulated=allow_emulated)


def _policy(args: argparse.Namespace) -> TeePolicy:
    from pointcall_attest.tee_policy import TeePolicy

    policy = TeePolicy.parse(_read(args.policy)) if args.policy else TeePolicy()
    return policy.model_copy(update={"allow_emulated": True}) if args.allow_emulated else policy


def _roots(args: argparse.Namespace) -> Roots:
    from pointcall_attest.trust import Roots

    registered = Roots.open(output.state_dir(args) / "trust")
    return Roots.of([*registered.emulated.values(), *(_read(path) for path in args.emulated_root)])


def _certificates(paths: list[Path]) -> CertificateFile:
    from pointcall_attest import certificate_file

    return sum((certificate_file.read(_read(path)) for path in paths), start=certificate_file.CertificateFile())


def _time(text: str | None) -> datetime:
    """RFC 3339 with a zone, or now. A second 60 is refused: no certificate begins or ends there."""
    if text is None:
        return datetime.now(UTC)
    try:
        return datetime.fromisoformat(_RFC3339.fullmatch(text)[0].upper()).astimezone(UTC)  # type: ignore[index]
    except (TypeError, ValueError, OverflowError):
        raise UsageRefusal(
            "--at is not a time", want="RFC 3339 with a zone, as 2026-03-01T00:00:00Z", got=text
        ) from None


def _hex(text: str, size: int) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != size:
        raise UsageRefusal("not hex of the right length", want=f"{size} bytes in hex", got=text[:160])
    return value


def _show(args: argparse.Namespace) -> int:
    from pointcall_attest.shown import described

    rows = described(_read(args.file))
    return _say(args, rows)


def _flat(rows: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in rows.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return found


def _probe(args: argparse.Namespace) -> int:
    from pointcall_executor.tee import probe

    findings = probe()
    if args.json:
        output.print_json({"findings": [finding.as_dict() for finding in findings]})
        return Exit.OK
    for finding in findings:
        print(f"{'yes' if finding.available else 'no ':3} {finding.what:26} {finding.why}")
    return Exit.OK


def _bundle_snp(args: argparse.Namespace) -> int:
    from pointcall_attest import snp
    from pointcall_attest.evidence import EvidenceBundle

    files = _certificates(args.certs)
    report = snp.parse(_read(args.file))
    return _write(args, EvidenceBundle("snp", report.raw, files.certificates, files.crls))


def _bundle_tdx(args: argparse.Namespace) -> int:
    return _write(args, _tdx_evidence(args))


def _bundle_emulated(args: argparse.Namespace) -> int:
    """New emulated evidence; its root is registered in the trust folder of the same state directory."""
    from pointcall_executor.tee.emulated import EmulatedPlatform
    from pointcall_executor.tee.emulated_tdx import EmulatedTdxPlatform

    state, report_data = output.state_dir(args), _hex(args.report_data, 64)
    if args.version not in (None, *_EMULATED_VERSIONS[args.platform]):
        raise UsageRefusal(
            "no such version", want=f"one of {_EMULATED_VERSIONS[args.platform]}", got=f"{args.platform} {args.version}"
        )

    def clock() -> datetime:
        return datetime.now(UTC)

    platform: EmulatedPlatform | EmulatedTdxPlatform
    if args.platform == "tdx":
        platform = EmulatedTdxPlatform.open(state / "tee", clock=clock)
    else:
        platform = EmulatedPlatform.open(state / "tee", clock=clock, product=args.product)
    platform.register(state / "trust")
    return _write(args, platform.evidence(report_data, args.version))


def _unpack(args: argparse.Namespace) -> int:
    """The parts under the names that `verify snp` and `verify tdx` take them by."""
    import json

    from pointcall_attest import pem
    from pointcall_attest.evidence import EvidenceBundle

    bundle = EvidenceBundle.parse(_read(args.file))
    parts = {"report.bin" if bundle.platform == "snp" else "quote.bin": bundle.evidence}
    certificates = [pem.encode("CERTIFICATE", der) for der in bundle.certificates]
    if blocks := certificates + [pem.encode("X509 CRL", der) for der in bundle.crls]:
        parts["certs.pem"] = b"".join(blocks)
    if bundle.collateral is not None:
        parts["collateral.json"] = json.dumps(dict(bundle.collateral)).encode()
    if bundle.event_log is not None:
        parts["ccel.bin"] = bundle.event_log
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        (args.out / name).write_bytes(part)
    return _say(args, {"platform": bundle.platform, "files": [str(args.out / name) for name in parts]})


def _write(args: argparse.Namespace, bundle: EvidenceBundle) -> int:
    args.out.write_bytes(bundle.encode())
    row = {"ok": True, "platform": bundle.platform, "sha256": bundle.sha256, "file": str(args.out)}
    if args.json:
        output.print_json(row)
    else:
        print(f"{args.out}: {bundle.platform} evidence, sha256 {bundle.sha256}")
    return Exit.OK


def _measure_snp(args: argparse.Namespace) -> int:
    from pointcall_attest import measure, snp

    launch = measure.Launch(
        args.ovmf, args.vcpus, args.vcpu_type, args.guest_features, args.kernel, args.initrd, args.append, args.vmm
    )
    if args.report is None:
        return _say(args, {"launch_digest": measure.launch_digest(launch).hex()})
    observed = snp.parse(_read(args.report)).measurement
    return _explained(args, {"launch_digest": measure.explain_launch(launch, observed)})


def _measure_tdx(args: argparse.Namespace) -> int:
    from pointcall_attest import measure, tdvf, tdx

    found = tdvf.measure(_read(args.tdvf, tdvf.MAX_IMAGE_BYTES))
    values = {"mrtd_one_pass": found.one_pass, "mrtd_two_pass": found.two_pass}
    if args.quote is None:
        return _say(args, {name: value.hex() for name, value in values.items()})
    seen = tdx.parse(_read(args.quote)).body.mrtd
    best = seen if seen in values.values() else found.one_pass
    why = () if best == seen else ("another firmware image, or another page order than the two of QEMU",)
    return _explained(args, {"mrtd": measure.Explanation(best.hex(), seen.hex(), best == seen, why)})


def _measure_ccel(args: argparse.Namespace) -> int:
    from pointcall_attest import eventlog, measure, tdx

    log = eventlog.parse(_read(args.file))
    if args.reference is not None:
        parts = measure.explain_logs(eventlog.parse(_read(args.reference)), log)
        _say(args, {"same": not parts, "differences": list(parts)})
        return Exit.OK if not parts else Exit.REFUSED
    if args.quote is None:
        return _say(args, {f"rtmr{index}": value.hex() for index, value in enumerate(log.replay())})
    body = tdx.parse(_read(args.quote)).body
    explained = measure.explain_registers(log, (body.rtmr0, body.rtmr1, body.rtmr2, body.rtmr3))
    return _explained(args, {f"rtmr{index}": one for index, one in enumerate(explained)})


def _explained(args: argparse.Namespace, rows: dict[str, Explanation]) -> int:
    """Each value with what was expected and seen; exit 1 where one does not match."""
    from dataclasses import asdict

    _say(args, {name: asdict(one) for name, one in rows.items()})
    return Exit.OK if all(one.matches for one in rows.values()) else Exit.REFUSED


def _say(args: argparse.Namespace, rows: dict[str, Any]) -> int:
    if args.json:
        output.print_json(rows)
    else:
        for name, value in _flat(rows):
            print(f"{shown(name):32} {shown(str(value), MAX_SHOWN_CHARS)}")
    return Exit.OK


def _cache(args: argparse.Namespace) -> Cache:
    import time

    from pointcall_executor.tee.fetch import Cache, utc_now

    return Cache(output.state_dir(args) / "cache" / "attest", utc_now, time.sleep)


def _fetch_snp(args: argparse.Namespace) -> int:
    from pointcall_attest import pem, snp
    from pointcall_executor.tee import fetch

    files = fetch.amd(snp.parse(_read(args.file)), _cache(args), args.kds or fetch.KDS, args.product)
    blocks = [pem.encode("CERTIFICATE", der) for der in files.certificates]
    args.out.write_bytes(b"".join([*blocks, *(pem.encode("X509 CRL", der) for der in files.crls)]))
    return _say(args, {"certificates": len(files.certificates), "crls": len(files.crls), "file": str(args.out)})


def _fetch_tdx(args: argparse.Namespace) -> int:
    import json

    from pointcall_attest import tdx
    from pointcall_executor.tee import fetch

    quote = tdx.parse(_read(args.file))
    texts = fetch.intel(quote, _cache(args), args.pcs or fetch.PCS, args.root_crl or fetch.INTEL_ROOT_CRL)
    args.out.write_text(json.dumps(texts))
    return _say(args, {"texts": len(texts), "file": str(args.out)})
