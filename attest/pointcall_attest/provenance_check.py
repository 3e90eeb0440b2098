"""Statements about single modules beside a manifest: by whom was each built, from what, and did its cases pass?

For reviewers and for policy in CI; a node never asks. They count if one signer of the trust policy signed them: the
threshold is for what arms. Only our own forms are read. Spec: docs/spec/provenance.md; SLSA provenance v1; in-toto
test-result v0.1.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from pointcall_attest import canonical
from pointcall_attest.errors import AttestError, MalformedError
from pointcall_attest.manifest import Manifest, Runbook
from pointcall_attest.model import Digest, Name, Strict, Subject, Text, validated
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.signature import MAX_BUNDLE_BYTES, unverified_payload, verify_each
from pointcall_attest.verdict import Check, Verdict
from pointcall_runbook.module import ModuleInfo

SPEC: Final = "docs/spec/provenance.md"
PROVENANCE_TYPE: Final = "https://slsa.dev/provenance/v1"
TEST_RESULT_TYPE: Final = "https://in-toto.io/attestation/test-result/v0.1"
BUILD_TYPE: Final = "https://pointcall.dev/build/rb1/v1"
MAX_STATEMENTS: Final = 256  # two a runbook, 128 runbooks

# Every check, in order, with what passing means.
CHECKS: Final[Mapping[str, str]] = {
    "provenance.signature": "every statement is of its form and signed by a signer of the policy",
    "provenance.module": "every statement is about a module of this manifest",
    "provenance.source": "every module was built from the source and by the compiler that it names itself",
    "provenance.builder": "every module was built by the builder that was asked for",
    "provenance.tests": "every module passed its cases",
}


class _GitCommit(Strict):
    gitCommit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}([0-9a-f]{24})?$")]  # noqa: N815 - the name in the format


class _Source(Strict):
    name: Text | None = None
    uri: Text | None = None
    digest: Digest | _GitCommit


class _External(Strict):
    runbook: Name
    abi: Text
    repository: Text | None = None


class _Internal(Strict):
    compiler: Text | None = None


class _Definition(Strict):
    buildType: Literal["https://pointcall.dev/build/rb1/v1"]  # noqa: N815 - as above, and below
    externalParameters: _External  # noqa: N815
    internalParameters: _Internal  # noqa: N815
    resolvedDependencies: Annotated[tuple[_Source, ...], Field(max_length=8)]  # noqa: N815


class _Builder(Strict):
    id: Text


class _Metadata(Strict):
    invocationId: Text | None = None  # noqa: N815


class _Details(Strict):
    builder: _Builder
    metadata: _Metadata


class _Provenance(Strict):
    buildDefinition: _Definition  # noqa: N815
    runDetails: _Details  # noqa: N815


TestName = Annotated[str, Field(min_length=1, max_length=1024)]


class _TestResult(Strict):
    result: Literal["PASSED", "WARNED", "FAILED"]
    configuration: Annotated[tuple[Subject, ...], Field(min_length=1, max_length=256)]
    passedTests: Annotated[tuple[TestName, ...], Field(max_length=4096)]  # noqa: N815
    failedTests: Annotated[tuple[TestName, ...], Field(max_length=4096)]  # noqa: N815


class _Statement(Strict):
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: Annotated[tuple[Subject], Field()]
    predicateType: Literal["https://slsa.dev/provenance/v1", "https://in-toto.io/attestation/test-result/v0.1"]  # noqa: N815
    predicate: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Read:
    """One statement whose signature holds."""

    module: str
    sha256: str
    said: _Provenance | _TestResult


def check_provenance(
    bundles: Iterable[bytes],
    manifest: Manifest,
    modules: Mapping[str, ModuleInfo],
    *,
    trusted_root: bytes,
    policy: TrustPolicy,
    at: dt.datetime,
    builder: str | None = None,
    demanded: bool = False,
    in_process: bool = False,
) -> Verdict:
    """A verdict on the signed statements that lie beside a manifest.

    `modules` are the verified modules by runbook name; `builder` is the only builder that counts, None for any.
    `demanded`: a module without provenance or test result fails; otherwise it is named and not checked.
    """
    read, wrong = _read_all(bundles, trusted_root, policy.for_one_signature(), at, in_process)
    own = [r for r in read if manifest.subjects.get(r.module) == r.sha256]
    strange = [f"{r.module} {r.sha256[:16]}" for r in read if r not in own]
    built = {r.module: r.said for r in own if isinstance(r.said, _Provenance)}
    tested = {r.module: r.said for r in own if isinstance(r.said, _TestResult)}
    books = {b.name: b for b in manifest.runbooks}
    checks = [
        _check("provenance.signature", wrong, f"{len(read)} statements"),
        _check("provenance.module", strange, f"{len(own)} statements"),
        _asked("provenance.source", _unlike(books, built, modules), _missing(books, built), demanded),
        _asked("provenance.builder", _elsewhere(built, builder), _missing(books, built), demanded),
        _asked("provenance.tests", _untested(tested), _missing(books, tested), demanded),
    ]
    return Verdict(tuple(checks))


def _read_all(
    bundles: Iterable[bytes], trusted_root: bytes, policy: TrustPolicy, at: dt.datetime, in_process: bool
) -> tuple[list[_Read], list[str]]:
    given, read, wrong = list(bundles), [], []
    if len(given) > MAX_STATEMENTS:
        return [], [f"{len(given)} statements, at most {MAX_STATEMENTS}"]
    asked = [([raw], _kind(unverified_payload(raw) or b"")) for raw in given]
    for answer in verify_each(asked, trusted_root=trusted_root, policy=policy, at=at, in_process=in_process):
        try:
            if isinstance(answer, AttestError):
                raise answer
            read.append(_parse(answer.payload))
        except AttestError as error:
            wrong.append(f"{error.message} [{error.id}] {error.got}"[:200])
    return read, wrong


def _kind(payload: bytes) -> str:
    """Which of the two a statement is likely to be; only `verify_each` makes that true."""
    return TEST_RESULT_TYPE if TEST_RESULT_TYPE.encode() in payload else PROVENANCE_TYPE


def _parse(payload: bytes) -> _Read:
    try:
        canonical.loads(payload, max_bytes=MAX_BUNDLE_BYTES, what="the statement")
    except MalformedError as error:
        raise MalformedError(error.message, id="provenance.form", want=error.want, got=error.got) from None
    statement = validated(_Statement, payload, id="provenance.form", what="a statement about a module")
    model = _Provenance if statement.predicateType == PROVENANCE_TYPE else _TestResult
    said = validated(model, json.dumps(statement.predicate).encode(), id="provenance.form", what="a predicate of ours")
    (subject,) = statement.subject
    assert isinstance(said, _Provenance | _TestResult), "one of the two models"
    return _Read(subject.name, subject.digest.sha256, said)


def _missing(books: Mapping[str, Runbook], said: Mapping[str, object]) -> list[str]:
    return [name for name, book in books.items() if book.module not in said]


def _unlike(
    books: Mapping[str, Runbook], built: Mapping[str, _Provenance], modules: Mapping[str, ModuleInfo]
) -> list[str]:
    """Modules whose statement says another source, compiler or ABI than the module itself does."""
    wrong = []
    for name, book in books.items():
        said, info = built.get(book.module), modules.get(name)
        if said is None or info is None:
            continue
        definition = said.buildDefinition
        sources = [d.digest.sha256 for d in definition.resolvedDependencies if isinstance(d.digest, Digest)]
        want = ([info.source_sha256] if info.source_sha256 else [], info.compiler, f"rb{info.abi}", name)
        external = definition.externalParameters
        if (sources, definition.internalParameters.compiler, external.abi, external.runbook) != want:
            wrong.append(name)
    return wrong


def _elsewhere(built: Mapping[str, _Provenance], builder: str | None) -> list[str]:
    return [
        f"{m}: {p.runDetails.builder.id}" for m, p in built.items() if builder not in (None, p.runDetails.builder.id)
    ]


def _untested(tested: Mapping[str, _TestResult]) -> list[str]:
    """Modules whose cases did not all pass; a result without a passed case says nothing."""
    good = {m for m, t in tested.items() if t.result == "PASSED" and t.passedTests and not t.failedTests}
    return [f"{m}: {', '.join(tested[m].failedTests)[:80] or tested[m].result}" for m in tested if m not in good]


def _check(id: str, wrong: Sequence[str], seen: str) -> Check:
    return Check.of(id, not wrong, expected=CHECKS[id], observed="; ".join(wrong[:4]) or seen, spec=SPEC)


def _asked(id: str, wrong: Sequence[str], missing: Sequence[str], demanded: bool) -> Check:
    nothing = [f"nothing about {name}" for name in missing]
    if wrong or (demanded and missing):
        return _check(id, [*wrong, *nothing], "")
    return Check.skipped(id, "; ".join(nothing[:4]), spec=SPEC) if missing else _check(id, [], "every module")
