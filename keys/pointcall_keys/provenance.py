"""Statements about single modules, beside the manifest: where one was built from, and which tests it passed.

They arm nothing; a node never reads them. They are for reviewers and for policy in CI. Unsigned here: sign them like
any statement; `pointcall_attest.provenance_check` verifies them. Spec: SLSA provenance v1; in-toto test-result v0.1;
docs/spec/provenance.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pointcall_attest import canonical
from pointcall_attest.manifest import STATEMENT_TYPE, Manifest
from pointcall_attest.provenance_check import BUILD_TYPE, PROVENANCE_TYPE, TEST_RESULT_TYPE
from pointcall_runbook.case import parse_cases
from pointcall_runbook.interpreter import Interpreter
from pointcall_runbook.module import verify_module


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


def run_cases(wasm: bytes, cases: Mapping[str, bytes]) -> tuple[list[str], list[str]]:
    """(passed, failed) of the cases in these files, each as `<file, no suffix>/<name>`. CaseError if one is none."""
    info, machine = verify_module(wasm), Interpreter(wasm)
    passed: list[str] = []
    failed: list[str] = []
    for file in sorted(cases):
        for case in parse_cases(cases[file], info):
            right = machine.run(case.event, case.args).calls == case.calls
            (passed if right else failed).append(f"{file.removesuffix('.json')}/{case.name}")
    return passed, failed


def results_of_tests(
    name: str, wasm: bytes, cases: Mapping[str, bytes], *, passed: Sequence[str], failed: Sequence[str]
) -> bytes:
    """A test-result statement about one module: its files of cases with their digests, and which passed and failed."""
    assert passed or failed, "no test is no result"
    files = [{"name": f"cases/{file}", "digest": _digest(cases[file])} for file in sorted(cases)]
    predicate = {
        "result": "FAILED" if failed else "PASSED",
        "configuration": files,
        "passedTests": sorted(passed),
        "failedTests": sorted(failed),
    }
    return _statement([(name, wasm)], TEST_RESULT_TYPE, predicate)


def _statement(subjects: Iterable[tuple[str, bytes]], kind: str, predicate: Mapping[str, Any]) -> bytes:
    listed = [{"name": name, "digest": _digest(content)} for name, content in subjects]
    return canonical.dumps(
        {"_type": STATEMENT_TYPE, "subject": listed, "predicateType": kind, "predicate": dict(predicate)}
    )


def _digest(content: bytes) -> dict[str, str]:
    return {"sha256": hashlib.sha256(content).hexdigest()}


def _some(values: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in values.items() if value is not None}
