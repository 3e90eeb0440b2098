"""Admission: whether this node may arm this manifest. Every check is made and listed; only success makes an `Admitted`.

  check_manifest   signature, dates, order, revocation, every file, every module against its grants   -> Candidate
  admit            the candidate and the node's own evidence together                                 -> Admitted

`Admitted` is the only type that the executor arms, and nothing but `admit` makes one. Between the two steps the caller
makes its epoch key, gets evidence that binds manifest and policy, and appraises it against the reference values.
No I/O: files, time and the highest sequence come in as values. Spec: docs/spec/manifest.md, section Admission.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from pointcall_attest.declaration import ServiceDeclaration
from pointcall_attest.errors import AttestError, MalformedError, RefusedError
from pointcall_attest.manifest import Manifest, Runbook, Service
from pointcall_attest.model import instant
from pointcall_attest.notice import Notices, holds
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.signature import CHECKS as SIGNATURE_CHECKS
from pointcall_attest.signature import UNANSWERED, SignedStatement, verify_bundles
from pointcall_attest.verdict import Check, Verdict
from pointcall_runbook import vocabulary
from pointcall_runbook.errors import PointcallError
from pointcall_runbook.module import ModuleInfo, verify_module

SPEC: Final = "docs/spec/manifest.md"
MAX_SHOWN: Final = 4  # of many wrong things, a message names the first few

EVIDENCE_CHECKS: Final = ("tee.report_data", "tee.measurement")  # without these, evidence says nothing of this manifest

# Every check of this module after the signature, in order, with what passing means.
CHECKS: Final[Mapping[str, str]] = {
    "manifest.form": "the payload is a manifest in canonical form",
    "manifest.not_before": "it is valid already",
    "manifest.expires": "it is still valid",
    "manifest.age": "it was signed within the policy's max_age_days",
    "manifest.sequence": "no newer manifest was armed here before",
    "manifest.floor": "its sequence reaches the policy's min_sequence",
    "manifest.fork": "no other manifest with this sequence was armed here",
    "manifest.previous": "it follows the one armed before",
    "manifest.notices": "every notice that reached this node verifies",
    "manifest.newest": "a signed pointer that holds now names it",
    "manifest.revoked": "neither it nor one of its files is revoked",
    "manifest.policy": "it was made for this trust policy",
    "manifest.trusted_root": "it was made for this trusted root",
    "manifest.vocabulary": "it speaks of the events and actions of this executor",
    "manifest.executor": "this executor is new enough",
    "manifest.references": "every name in it is declared in it",
    "subject.missing": "every listed file is here",
    "subject.digest": "every file has the digest that was signed",
    "subject.unexpected": "there is no file that was not signed",
    "module.form": "every module is a verified rb1 module",
    "module.events": "every module handles the events that start it",
    "module.grants": "no module can call an action that it was not granted",
    "module.names": "no module names a service or channel that it was not granted",
    "module.parameters": "every parameter exists and is within its range",
    "service.form": "every declaration is well-formed",
    "service.match": "every declaration is of the service that lists it",
    "service.digest": "the digest of every service is that of its declaration",
    "service.number": "no two services have the same number",
    "channel.number": "no two channels have the same number",
    "admission.evidence": "the evidence of this node binds this manifest and was measured against it",
    "admission.tier": "the policy allows evidence of this tier",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A signed, well-formed manifest with its files and everything that was checked of them. Maybe never armed."""

    manifest: Manifest
    signed: SignedStatement
    policy: TrustPolicy
    files: Mapping[str, bytes]  # those that have the digest that was signed
    modules: Mapping[str, ModuleInfo]  # runbook name to its verified module
    declarations: Mapping[str, ServiceDeclaration]  # service name to its declaration
    verdict: Verdict


_SEAL: Final = object()


@dataclass(frozen=True, slots=True)
class Admitted:
    """What may be armed, as exactly the bytes that were checked. Made by `admit` only."""

    manifest: Manifest
    signed: SignedStatement
    policy: TrustPolicy
    files: Mapping[str, bytes]
    modules: Mapping[str, ModuleInfo]
    declarations: Mapping[str, ServiceDeclaration]
    verdict: Verdict
    seal: dataclasses.InitVar[object] = None

    def __post_init__(self, seal: object) -> None:
        assert seal is _SEAL, "an Admitted is made by admit()"

    def module(self, runbook: str) -> bytes:
        """The verified Wasm of a runbook. KeyError if the manifest has no such runbook."""
        return self.files[self.manifest.runbook(runbook).module]


def check_manifest(
    bundles: Sequence[bytes],
    files: Mapping[str, bytes],
    *,
    policy: TrustPolicy,
    trusted_root: bytes,
    at: dt.datetime,
    highest_sequence: int | None,
    executor_version: str,
    highest_digest: str | None = None,
    notices: Notices | None = None,
    in_process: bool = False,
) -> Candidate:
    """Every check that needs no evidence.

    `files` are the subjects by name; `highest_sequence` and `highest_digest` (SHA-256 hex of the payload) are those of
    the newest manifest that this node has armed, None if it has armed none. `notices` are the pointers and revocations
    that reached this node. RefusedError where there is no authentic manifest to speak of; otherwise a Candidate, whose
    verdict may have failed: `admit` then refuses it.
    """
    known = notices or Notices()
    signed, manifest = _authentic(bundles, trusted_root, policy, at, in_process)
    good = {n: files[n] for n, want in manifest.subjects.items() if n in files and _sha256(files[n]) == want}
    modules = _modules(manifest, good)
    declarations = _declarations(manifest, good)
    checks = [
        *_signature_passed(signed),
        _check("manifest.form", True, manifest.sha256),
        *_life(manifest, signed, policy, at),
        *_order(manifest, policy, highest_sequence, highest_digest),
        _notices(notices),
        _newest(manifest, policy, known, at),
        _revoked(manifest, policy, known.revoked),
        *_made_for(manifest, policy, executor_version),
        _none("manifest.references", _dangling(manifest)),
        *_files(manifest, files),
        *modules.checks,
        *declarations.checks,
        _none("service.number", _collisions(vocabulary.service, [s.name for s in manifest.services])),
        _none("channel.number", _collisions(vocabulary.channel, [c.name for c in manifest.channels])),
    ]
    return Candidate(
        manifest,
        signed,
        policy,
        MappingProxyType(good),
        MappingProxyType(modules.found),
        MappingProxyType(declarations.found),
        Verdict(tuple(checks)),
    )


def admit(candidate: Candidate, tee: Verdict) -> Admitted:
    """What may be armed: the candidate passed, and so did this node's evidence. RefusedError lists every check."""
    verdict = candidate.verdict.joined([tee, Verdict(tuple(_evidence(candidate.policy, tee)))]).require()
    return Admitted(
        candidate.manifest,
        candidate.signed,
        candidate.policy,
        candidate.files,
        candidate.modules,
        candidate.declarations,
        verdict,
        _SEAL,
    )


def _evidence(policy: TrustPolicy, tee: Verdict) -> Iterable[Check]:
    """Nothing where the evidence's own checks failed: they say why, and saying it twice would hide them."""
    if tee.failed:
        return
    passed = {c.id for c in tee.checks if c.outcome == "pass"}
    missing = [name for name in EVIDENCE_CHECKS if name not in passed]
    yield _none("admission.evidence", [f"{name} was not checked" for name in missing])
    allowed = ("hardware", "emulated") if policy.tee.allow_emulated else ("hardware",)
    hint = "the policy's tee.allow_emulated decides" if tee.tier == "emulated" else ""
    yield _check("admission.tier", tee.tier in allowed, tee.tier, expected=" or ".join(allowed), hint=hint)


def _check(id: str, passed: bool, observed: object = "", *, expected: object = "", hint: str = "") -> Check:
    return Check.of(id, passed, expected=expected or CHECKS[id], observed=observed, spec=SPEC, hint=hint)


def _none(id: str, wrong: Sequence[str], *, hint: str = "") -> Check:
    """A check that passes when nothing is wrong."""
    more = f" and {len(wrong) - MAX_SHOWN} more" if len(wrong) > MAX_SHOWN else ""
    return _check(id, not wrong, "; ".join(wrong[:MAX_SHOWN]) + more, hint=hint if wrong else "")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Signature and form


def _authentic(
    bundles: Sequence[bytes], trusted_root: bytes, policy: TrustPolicy, at: dt.datetime, in_process: bool
) -> tuple[SignedStatement, Manifest]:
    try:
        signed = verify_bundles(bundles, trusted_root=trusted_root, policy=policy, at=at, in_process=in_process)
    except AttestError as refusal:
        raise _nothing_to_check([], refusal) from None
    try:
        return signed, Manifest.parse(signed.payload)
    except MalformedError as refusal:
        raise _nothing_to_check(_signature_passed(signed), refusal) from None


def _nothing_to_check(before: Sequence[Check], refusal: AttestError) -> RefusedError:
    """The verdict when there is no authentic manifest: what failed, and everything else as not checked."""
    failed = Check(refusal.id, "fail", refusal.want, refusal.got or refusal.message, SPEC, refusal.hint)
    known = {c.id for c in before} | {refusal.id}
    rest = [name for name in (*SIGNATURE_CHECKS, *CHECKS) if name not in known]
    skipped = [Check.skipped(name, "there is no authentic manifest", spec=SPEC) for name in rest]
    return RefusedError(Verdict((*before, failed, *skipped)))


def _signature_passed(signed: SignedStatement) -> list[Check]:
    seen = {
        "manifest.signer": ", ".join(f"{s.identity} by {s.issuer}" for s in signed.signers),
        "manifest.threshold": f"{len(signed.signers)} distinct",
        "manifest.clock": instant(signed.signed_at) if signed.signed_at else "a long-lived key states no time",
    }
    return [Check(name, "pass", observed=seen.get(name, ""), spec=SPEC) for name in SIGNATURE_CHECKS]


# Dates, order, revocation, expectations


def _life(manifest: Manifest, signed: SignedStatement, policy: TrustPolicy, at: dt.datetime) -> Iterable[Check]:
    body = manifest.predicate
    yield _check("manifest.not_before", body.not_before <= at, instant(at), expected=f">= {instant(body.not_before)}")
    yield _check("manifest.expires", at < body.expires, instant(at), expected=f"< {instant(body.expires)}")
    if policy.max_age_days is None or signed.signed_at is None:
        yield Check.skipped("manifest.age", "no limit, or no time of signing", spec=SPEC)
        return
    oldest = at - dt.timedelta(days=policy.max_age_days)
    yield _check(
        "manifest.age",
        signed.signed_at >= oldest,
        instant(signed.signed_at),
        expected=f"signed after {instant(oldest)}",
        hint="sign it again, or a newer one",
    )


def _order(manifest: Manifest, policy: TrustPolicy, highest: int | None, highest_digest: str | None) -> Iterable[Check]:
    own, least = manifest.sequence, highest or 0
    yield _check(
        "manifest.sequence", own >= least, own, expected=f">= {least}", hint="an older manifest is never armed again"
    )
    yield _check("manifest.floor", own >= policy.min_sequence, own, expected=f">= {policy.min_sequence}")
    known = highest is not None and highest_digest is not None
    if known and own == highest:
        same = manifest.sha256 == highest_digest
        yield _check("manifest.fork", same, manifest.sha256, expected=highest_digest, hint="raise the sequence")
    else:
        yield Check.skipped("manifest.fork", "the sequence is new here", spec=SPEC)
    if known and own == least + 1:
        previous = manifest.predicate.previous
        yield _check("manifest.previous", previous == highest_digest, previous or "null", expected=highest_digest)
    else:
        yield Check.skipped("manifest.previous", "the one before is not known here", spec=SPEC)


def _notices(notices: Notices | None) -> Check:
    if notices is None or notices == Notices():
        return Check.skipped("manifest.notices", "no notice reached this node", spec=SPEC)
    if notices.unanswered:
        hint = "the node lacks memory, processes or time for the child that verifies"
        said = "; ".join(notices.wrong[:MAX_SHOWN])
        return _check(UNANSWERED, False, said, expected="an answer about every notice", hint=hint)
    return _none("manifest.notices", notices.wrong, hint="remove what is no notice, or let its signers into the policy")


def _newest(manifest: Manifest, policy: TrustPolicy, notices: Notices, at: dt.datetime) -> Check:
    """Whether the newest signed pointer of this series and ring names this manifest. One that does not hold says
    nothing, except to a policy that demands one."""
    pointer = notices.newest(manifest.name, policy.ring, at)
    if not policy.require_pointer and (pointer is None or not holds(pointer, at)):
        return Check.skipped("manifest.newest", "no pointer holds now, and the policy demands none", spec=SPEC)
    if pointer is None:
        hint = "the policy demands one: `pointcall manifest accept` takes it"
        return _check("manifest.newest", False, f"no pointer for {manifest.name}", hint=hint)
    body, wrong = pointer.body, []
    if not holds(pointer, at):
        wrong.append(f"the pointer held from {instant(body.issued)} to {instant(body.expires)}")
    if (body.sequence, body.manifest) != (manifest.sequence, manifest.sha256):
        wrong.append(f"the newest is sequence {body.sequence}, {body.manifest}")
    return _none("manifest.newest", wrong)


def _revoked(manifest: Manifest, policy: TrustPolicy, noticed: frozenset[str]) -> Check:
    revoked = {*policy.revoked, *manifest.predicate.revoked, *noticed}
    wrong = [name for name, digest in manifest.subjects.items() if digest in revoked]
    return _none("manifest.revoked", (["the manifest itself"] if manifest.sha256 in revoked else []) + wrong)


def _made_for(manifest: Manifest, policy: TrustPolicy, executor_version: str) -> Iterable[Check]:
    body = manifest.predicate
    for name, want, got in (
        ("manifest.policy", body.policy_sha256, policy.sha256),
        ("manifest.trusted_root", body.trusted_root_sha256, policy.trusted_root_sha256),
    ):
        yield Check.skipped(name, "any", spec=SPEC) if want is None else _check(name, want == got, got, expected=want)
    own = vocabulary.digest()
    yield _check("manifest.vocabulary", body.vocabulary == own, body.vocabulary, expected=own, hint="build it again")
    new_enough = _version(executor_version) >= _version(body.min_executor)
    yield _check("manifest.executor", new_enough, executor_version, expected=f">= {body.min_executor}")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


# Names and files


def _dangling(manifest: Manifest) -> list[str]:
    """Names that are used and not declared, and files that are listed and not used."""
    services, channels = {s.name for s in manifest.services}, {c.name for c in manifest.channels}
    wrong = []
    for book in manifest.runbooks:
        grants = book.grants
        wrong += [f"{book.name}: service {n}" for n in grants.services if n not in services]
        wrong += [f"{book.name}: channel {n}" for n in grants.channels if n not in channels]
        wrong += [f"{book.name}: approval of {n}" for n in book.limits.approval if n not in grants.actions]
    used = {
        *(b.module for b in manifest.runbooks),
        *(s.blob for s in manifest.sensors if s.blob is not None),
        *(s.declaration for s in manifest.services),
    }
    wrong += [f"file {n} is not listed" for n in sorted(used - set(manifest.subjects))]
    return wrong + [f"file {n} is not used" for n in sorted(set(manifest.subjects) - used)]


def _files(manifest: Manifest, files: Mapping[str, bytes]) -> Iterable[Check]:
    yield _none("subject.missing", [n for n in manifest.subjects if n not in files])
    wrong = [
        f"{n}: want {want}, got {_sha256(files[n])}"
        for n, want in manifest.subjects.items()
        if n in files and _sha256(files[n]) != want
    ]
    yield _none("subject.digest", wrong, hint="the file is not the one that was signed: fetch or build it again")
    yield _none("subject.unexpected", sorted(set(files) - set(manifest.subjects)))


# Modules


@dataclass(frozen=True, slots=True)
class _Modules:
    found: dict[str, ModuleInfo]
    checks: list[Check]


def _modules(manifest: Manifest, files: Mapping[str, bytes]) -> _Modules:
    """Verify every module whose bytes are those that were signed, and compare it with what the manifest says of it."""
    found: dict[str, ModuleInfo] = {}
    unformed: list[str] = []
    for book in manifest.runbooks:
        if book.module not in files:
            continue  # subject.missing or subject.digest says so
        try:
            found[book.name] = verify_module(files[book.module])
        except PointcallError as refusal:
            unformed.append(f"{book.name}: {refusal.message} [{refusal.id}]")
    books = [(book, found[book.name]) for book in manifest.runbooks if book.name in found]
    judges: tuple[tuple[str, Callable[[Runbook, ModuleInfo], Iterable[str]]], ...] = (
        ("module.events", _unhandled),
        ("module.grants", _beyond_grants),
        ("module.names", _beyond_names),
        ("module.parameters", _wrong_parameters),
    )
    checks = [_none("module.form", unformed)]
    for name, judge in judges:
        checks.append(_none(name, [f"{book.name}: {what}" for book, info in books for what in judge(book, info)]))
    return _Modules(found, checks)


def _unhandled(book: Runbook, info: ModuleInfo) -> Iterable[str]:
    return (f"no handler for {event}" for event in book.events if event not in info.handlers)


def _beyond_grants(book: Runbook, info: ModuleInfo) -> Iterable[str]:
    return (f"can call {name}" for name in info.capabilities if name not in book.grants.actions)


def _beyond_names(book: Runbook, info: ModuleInfo) -> Iterable[str]:
    yield from (f"names service {name}" for name in info.services if name not in book.grants.services)
    yield from (f"names channel {name}" for name in info.channels if name not in book.grants.channels)


def _wrong_parameters(book: Runbook, info: ModuleInfo) -> Iterable[str]:
    known = {p.name: p for p in info.parameters}
    for name, value in book.parameters.items():
        if name not in known:
            yield f"has no parameter {name}"
        elif not known[name].lo <= value <= known[name].hi:
            yield f"{name} is {value}, outside {known[name].lo}..{known[name].hi}"


# Services


@dataclass(frozen=True, slots=True)
class _Declarations:
    found: dict[str, ServiceDeclaration]
    checks: list[Check]


def _declarations(manifest: Manifest, files: Mapping[str, bytes]) -> _Declarations:
    found: dict[str, ServiceDeclaration] = {}
    unformed: list[str] = []
    for service in manifest.services:
        if service.declaration not in files:
            continue
        try:
            found[service.name] = ServiceDeclaration.parse(files[service.declaration])
        except MalformedError as refusal:
            unformed.append(f"{service.name}: {refusal.message}")
    listed = [s for s in manifest.services if s.declaration in manifest.subjects]
    wrong = [f"{s.name}: {s.digest}" for s in listed if s.digest != manifest.subjects[s.declaration]]
    checks = [
        _none("service.form", unformed),
        _none("service.match", [w for s in manifest.services if s.name in found for w in _mismatch(s, found[s.name])]),
        _none("service.digest", wrong),
    ]
    return _Declarations(found, checks)


def _mismatch(service: Service, declared: ServiceDeclaration) -> Iterable[str]:
    if declared.name != service.name:
        yield f"{service.name} is declared as {declared.name}"
    if declared.kind != service.kind:
        yield f"{service.name} is {service.kind}, and declared as {declared.kind}"


def _collisions(number: Callable[[str], vocabulary.Service | vocabulary.Channel], names: Sequence[str]) -> list[str]:
    """Pairs of names that a module could not tell apart, since it sees numbers only."""
    first: dict[int, str] = {}
    pairs = ((first.setdefault(number(name).number, name), name) for name in names)
    return [f"{one} and {other}" for one, other in pairs if one != other]
