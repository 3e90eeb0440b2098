"""A report as OSCAL assessment results: plain data for the tools of auditors. Deterministic, no OSCAL library.

Only the NIST SP 800-53 controls are in it, since only they have a public catalogue. A control without data has an
observation and no finding: OSCAL knows "satisfied" and "not-satisfied", and no data is neither.
Spec: NIST OSCAL assessment-results 1.1.3; docs/spec/report.md section 8.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final

from pointcall_attest.report.model import Answer, ControlRow, Report

OSCAL_VERSION: Final = "1.1.3"
FRAMEWORK: Final = "NIST SP 800-53 rev. 5"
NAMESPACE: Final = "https://pointcall.dev/ns/oscal"
_ENHANCEMENT = re.compile(r"\((\d+)\)")

Uid = Callable[[str], str]


def assessment_results(report: Report) -> dict[str, Any]:
    """The document. The same report gives the same document; identifiers are UUIDv5 over the checkpoint's root."""
    controls = [c for f in report.frameworks if f.name == FRAMEWORK for c in f.controls]
    uid = _uids(report)
    return {
        "assessment-results": {
            "uuid": uid("document"),
            "metadata": {
                "title": f"Recovery controls, {report.node or 'unnamed node'}",
                "last-modified": report.made,
                "version": str(report.population.tree_size),
                "oscal-version": OSCAL_VERSION,
            },
            "import-ap": {"href": "#" + uid("plan")},
            "results": [_result(report, controls, uid)],
            "back-matter": {"resources": [_checkpoint(report, uid), {"uuid": uid("plan"), "title": "Control mapping"}]},
        }
    }


def _uids(report: Report) -> Uid:
    return lambda text: str(
        uuid.uuid5(uuid.NAMESPACE_URL, f"{NAMESPACE}/{report.population.root}/{report.made}/{text}")
    )


def control_id(id: str) -> str:
    """`AU-9(3)` as OSCAL writes it: `au-9.3`."""
    return _ENHANCEMENT.sub(r".\1", id).lower()


def _result(report: Report, controls: list[ControlRow], uid: Uid) -> dict[str, Any]:
    answers = {a.id: a for a in report.answers}
    found = [c for c in controls if c.standing != "no-data"]
    result: dict[str, Any] = {
        "uuid": uid("result"),
        "title": "Answers of the recovery log",
        "description": f"All {report.population.tree_size} entries of {report.population.origin}, tier {report.tier}",
        "start": report.first or report.made,
        "end": report.last or report.made,
        "props": [
            {"name": "tier", "ns": NAMESPACE, "value": report.tier},
            {"name": "log-verdict", "ns": NAMESPACE, "value": "reject" if report.verdict.failed else "accept"},
        ],
        "local-definitions": {"components": [_component(report, uid)]},
        "reviewed-controls": {
            "control-selections": [{"include-controls": [{"control-id": control_id(c.id)} for c in controls]}]
        },
        "observations": [_observation(report, c, answers, uid) for c in controls],
    }
    return result | ({"findings": [_finding(c, uid) for c in found]} if found else {})


def _component(report: Report, uid: Uid) -> dict[str, Any]:
    return {
        "uuid": uid("node"),
        "type": "service",
        "title": report.node or "unnamed node",
        "description": "A recovery executor and its log",
        "status": {"state": "operational"},
    }


def _observation(report: Report, control: ControlRow, answers: Mapping[str, Answer], uid: Uid) -> dict[str, Any]:
    asked = [answers[a] for a in control.answers]
    said = [f"{a.id}: {f'{a.passing} of {a.population}' if a.population else 'no data'} ({a.question})" for a in asked]
    return {
        "uuid": uid(f"observation/{control.id}"),
        "title": f"{control.id} {control.title}",
        "description": "; ".join(said) or f"no data: {control.note or 'no question of the log speaks to it'}",
        "methods": ["TEST"],
        "types": ["control-objective"],
        "collected": report.made,
        "subjects": [{"subject-uuid": uid("node"), "type": "component"}],
        "relevant-evidence": [
            {
                "href": "#" + uid("checkpoint"),
                "description": f"{report.population.tree_size} entries under this checkpoint",
            }
        ],
    }


def _finding(control: ControlRow, uid: Uid) -> dict[str, Any]:
    satisfied = control.standing == "satisfied"
    return {
        "uuid": uid(f"finding/{control.id}"),
        "title": f"{control.id} {control.title}",
        "description": "What the log answers to this control; it does not say that anybody complies",
        "target": {
            "type": "objective-id",
            "target-id": control_id(control.id) + "_obj",
            "status": {"state": control.standing, "reason": "pass" if satisfied else "fail"},
        },
        "related-observations": [{"observation-uuid": uid(f"observation/{control.id}")}],
    }


def _checkpoint(report: Report, uid: Uid) -> dict[str, Any]:
    return {
        "uuid": uid("checkpoint"),
        "title": "Signed checkpoint of the log",
        "props": [{"name": "root-sha256", "ns": NAMESPACE, "value": report.population.root or "none"}],
        "description": report.population.checkpoint or "none yet",
    }
