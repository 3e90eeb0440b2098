"""The specs name every field and every check, and every check that is raised is in the table."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from pointcall_attest.admission import CHECKS
from pointcall_attest.declaration import Container, Http, Kubernetes, Mount, Process, Ready, Stop, Systemd
from pointcall_attest.manifest import Guard, Limits, Predicate, Runbook, Sensor, Service
from pointcall_attest.policy import PinnedKey, Signer, TrustPolicy
from pointcall_attest.signature import CHECKS as SIGNATURE_CHECKS
from pointcall_attest.signature import UNANSWERED

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("model", [Process, Systemd, Container, Kubernetes, Mount, Ready, Http, Stop])
def test_every_field_of_a_declaration_is_in_the_spec_of_services(model: type[BaseModel]) -> None:
    text = (ROOT / "docs/spec/service.md").read_text()
    assert [name for name in model.model_fields if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("model", [Predicate, Runbook, Sensor, Service, Limits, Guard])
def test_every_field_is_in_the_spec_of_the_manifest(model: type[BaseModel]) -> None:
    text = (ROOT / "docs/spec/manifest.md").read_text()
    assert [name for name in model.model_fields if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("model", [TrustPolicy, Signer, PinnedKey])
def test_every_field_is_in_the_spec_of_the_policy(model: type[BaseModel]) -> None:
    text = (ROOT / "docs/spec/trust-policy.md").read_text()
    assert [name for name in model.model_fields if not re.search(rf"\b{name}\b", text)] == []


def test_every_check_is_in_the_specs() -> None:
    assert [i for i in CHECKS if f"`{i}`" not in (ROOT / "docs/spec/manifest.md").read_text()] == []
    assert [i for i in SIGNATURE_CHECKS if f"`{i}`" not in (ROOT / "docs/spec/trust-policy.md").read_text()] == []


@pytest.mark.parametrize(
    "module",
    [
        "pointcall_attest.admission",
        "pointcall_attest.file_signature",
        "pointcall_keys.signer",
        "pointcall_keys.assemble",
    ],
)
def test_the_library_is_imported_when_it_is_needed(module: str) -> None:
    program = f"import sys; sys.path[:] = {sys.path!r}; import {module}; print('sigstore' in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, check=True, timeout=60)
    assert done.stdout == b"False\n"


def test_the_verification_raises_no_other_id() -> None:
    text = (ROOT / "attest/pointcall_attest/signature.py").read_text()
    raised = set(re.findall(r'"(manifest\.[a-z_]+|trust\.[a-z_]+)"', text))
    assert raised - {UNANSWERED} <= {*SIGNATURE_CHECKS}
    assert UNANSWERED not in SIGNATURE_CHECKS  # a child that ended judged nothing: no check of it can pass
