"""OSCAL: every reference resolves, no data is no finding, the same report gives the same document."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.report import Report, build
from pointcall_attest.report.oscal import FRAMEWORK, assessment_results, control_id
from tests.unit.report.sample_log import SampleLog


@pytest.fixture
def report() -> Report:
    log = SampleLog()
    log.recover()
    log.recover(outcome="failed", confirmed=False)
    return build(log.log, log.checkpoint(), now=log.now)


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)


def test_every_reference_resolves(report: Report) -> None:
    document = assessment_results(report)
    made = [v for k, v in _walk(document) if k == "uuid"]
    used = [v for k, v in _walk(document) if k in ("observation-uuid", "subject-uuid")]
    used += [v.removeprefix("#") for k, v in _walk(document) if k == "href"]
    assert len(made) == len(set(made))
    assert set(used) <= set(made)
    assert {uuid.UUID(u).version for u in made} == {5}


def test_no_data_is_no_finding(report: Report) -> None:
    (framework,) = [f for f in report.frameworks if f.name == FRAMEWORK]
    (result,) = assessment_results(report)["assessment-results"]["results"]
    found = {f["target"]["target-id"]: f["target"]["status"]["state"] for f in result["findings"]}
    expected = {control_id(c.id) + "_obj": c.standing for c in framework.controls if c.standing != "no-data"}
    assert found == expected
    assert {"satisfied", "not-satisfied"} == set(found.values())
    assert len(result["observations"]) == len(framework.controls)


def test_the_same_report_gives_the_same_document(report: Report) -> None:
    assert json.dumps(assessment_results(report)) == json.dumps(assessment_results(report))


@pytest.mark.parametrize(("id", "oscal"), [("AU-9(3)", "au-9.3"), ("CM-14", "cm-14"), ("SI-7(15)", "si-7.15")])
def test_control_ids(id: str, oscal: str) -> None:
    assert control_id(id) == oscal


def test_trestle_reads_it(report: Report, tmp_path: Path) -> None:
    results = pytest.importorskip("trestle.oscal.assessment_results", reason="compliance-trestle is not installed")
    path = tmp_path / "assessment-results.json"
    path.write_text(json.dumps(assessment_results(report)))
    assert results.AssessmentResults.oscal_read(path).results[0].findings
