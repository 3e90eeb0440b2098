"""A signed statement about a module that says something we do not know: named by its id, and no pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest import canonical
from pointcall_attest.manifest import Manifest
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.provenance_check import check_provenance
from pointcall_keys.long_lived import FileKey, policy_row, sign_with_key
from pointcall_keys.provenance import results_of_tests
from pointcall_runbook.module import verify_module
from tests.unit.signing.rb1 import module
from tests.unit.signing.world import NOW, statement

NAME = "modules/restart.wasm"


def good() -> bytes:
    return results_of_tests(NAME, module(), {"a.json": b"[]"}, passed=["cases/a"], failed=[])


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> FileKey:
    path: Path = tmp_path_factory.mktemp("key") / "key.pem"
    return FileKey.make(path, None)


def judged(key: FileKey, payload: bytes) -> dict[str, tuple[str, str]]:
    body = {"format": "pointcall-trust-policy/v1", "keys": [policy_row("release", key)]}
    verdict = check_provenance(
        [sign_with_key(payload, key)],
        Manifest.parse(statement()),
        {"restart": verify_module(module())},
        trusted_root=b"{}",
        policy=TrustPolicy.parse(json.dumps(body).encode()),
        at=NOW,
        in_process=True,
    )
    return {c.id: (c.outcome, c.observed) for c in verdict.checks}


def test_a_good_statement_counts(key: FileKey) -> None:
    found = judged(key, good())
    assert found["provenance.signature"][0] == "pass"
    assert found["provenance.tests"][0] == "pass"


@pytest.mark.parametrize(
    "over",
    [
        {"more": 1},
        {"subject": []},
        {"subject": json.loads(good())["subject"] * 2},
        {"predicate": {}},
        {"predicate": json.loads(good())["predicate"] | {"result": "GOOD"}},
        {"predicate": json.loads(good())["predicate"] | {"passedTests": [""]}},
    ],
)
def test_another_form_does_not_count(key: FileKey, over: dict[str, Any]) -> None:
    found = judged(key, canonical.dumps(json.loads(good()) | over))
    outcome, observed = found["provenance.signature"]
    assert outcome == "fail"
    assert "[provenance.form]" in observed
    assert found["provenance.tests"][0] != "pass"


def test_only_the_canonical_form_counts(key: FileKey) -> None:
    assert "[provenance.form]" in judged(key, good() + b"\n")["provenance.signature"][1]
