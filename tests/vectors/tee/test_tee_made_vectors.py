"""The vectors that only the emulated platforms can make, written, read back and judged as their expected.json says."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import pytest

from pointcall_attest.appraise import appraise_bundle
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.tee_policy import TcbStatus, TeePolicy
from pointcall_attest.trust import Roots
from tests.vectors.tee.make import write


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write(folder)
    return folder


def test_every_made_vector_gets_its_verdict(made: Path) -> None:
    expected: dict[str, Any] = json.loads((made / "expected.json").read_text())
    at, roots = datetime.fromisoformat(expected["at"]), Roots.open(made)
    for name, row in expected["cases"].items():
        bundle = EvidenceBundle.parse((made / f"{name}.json").read_bytes())
        verdict = appraise_bundle(
            bundle, policy=TeePolicy(allow_emulated=True), roots=roots, at=at, report_data=None, measurements=None
        )
        assert [check.id for check in verdict.failed] == row["failed"], name
        assert verdict.tier in ("emulated", "none")
        if row["tcb_status"]:
            assert verdict.claims["tcb_status"] == row["tcb_status"], name


def test_all_ten_statuses_are_among_them(made: Path) -> None:
    cases = json.loads((made / "expected.json").read_text())["cases"].values()
    assert {row["tcb_status"] for row in cases} - {None} == set(get_args(TcbStatus))
