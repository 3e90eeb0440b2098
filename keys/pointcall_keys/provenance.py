"""Statements about single modules, beside the manifest: where one was built from, and which tests it passed.

They arm nothing; a node never reads them. They are for reviewers and for policy in CI. Unsigned here: sign them like
any statement. Spec: SLSA provenance v1; in-toto test-result v0.1; docs/spec/provenance.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pointcall_attest import canonical
from pointcall_attest.manifest import STATEMENT_TYPE, Manifest
from pointcall_runbook.module import verify_module

PROVENANCE_TYPE: Final = "https://slsa.dev/provenance/v1"
TEST_RESULT_TYPE: Final = "https://in-toto.io/attestation/test-result/v0.1"
BUILD_TYPE: Final = "https://pointcall.dev/build/rb1/v1"


@dataclass(frozen=True, slots=True)
class Builder:
    """Who built: `id` is the CI workflow's URI, `invocation` this run of it, `repository` and `commit` the source."""

    id: str
    invocation: str | None = None
    repository: str | None = None
    commit: str | None = None


def provenance(files: Mapping[str, bytes], manifest: Manifest, builder: Builder) -> dict[str, bytes]:
    """One SLSA provenance statement a module, by runbook name. Canonical JSON without times: reproducible too."""
    return {book.name: _provenance(book.module, files[book.module], book.name, builder) for book in manifest.runbooks}


def _provenance(name: str, wasm: bytes, runbook: str, builder: Builder) -> bytes:
    info = verify_module(wasm)
    parameters = {"runbook": runbook, "abi": f"rb{info.abi}"} | _some({"repository": builder.repository})
    source = [{"name": "runbook.py", "digest": {"sha256": info.source_sha256}}] if info.source_sha256 else []
    commit = [{"uri": f"git+{builder.repository}", "digest": {"gitCommit": builder.commit}}]
    definition = {
        "buildType": BUILD_TYPE,
        "externalParameters": parameters,
        "internalParameters": _some({"compiler": info.compiler}),
        "resolvedDependencies": source + (commit if builder.repository and builder.commit else []),
    }
    details = {"builder": {"id": builder.id}, "metadata": _some({"invocationId": builder.invocation})}
    return _statement([(name, wasm)], PROVENANCE_TYPE, {"buildDefinition": definition, "runDetails": details})


def results_of_tests(name: str, wasm: bytes, cases: bytes, *, passed: Sequence[str], failed: Sequence[str]) -> bytes:
    """A test-result statement about one module: the digest of its cases, and which passed and failed."""
    assert passed or failed, "no test is no result"
    predicate = {
        "result": "FAILED" if failed else "PASSED",
        "configuration": [{"name": "cases", "digest": {"sha256": hashlib.sha256(cases).hexdigest()}}],
        "passedTests": sorted(passed),
        "failedTests": sorted(failed),
    }
    return _statement([(name, wasm)], TEST_RESULT_TYPE, predicate)


def _statement(subjects: Iterable[tuple[str, bytes]], kind: str, predicate: Mapping[str, Any]) -> bytes:
    listed = [{"name": name, "digest": {"sha256": hashlib.sha256(content).hexdigest()}} for name, content in subjects]
    return canonical.dumps(
        {"_type": STATEMENT_TYPE, "subject": listed, "predicateType": kind, "predicate": dict(predicate)}
    )


def _some(values: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in values.items() if value is not None}
