"""Our values and the messages of pointcall.proto have the same fields; docs/spec/api.md has the same methods."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.verdict import Check
from pointcall_executor import feed
from pointcall_executor.agent_api import examination, proposal, recorded
from pointcall_executor.api import backend, generate
from pointcall_executor.api.messages import as_pairs, message, pb
from pointcall_executor.api.roles import METHODS, RATES, SOCKET_MODES, Role
from pointcall_executor.retention import Retained
from tests.unit.api.fake_backend import STATUS
from tests.unit.api.proposals import proposal as a_proposal
from tests.unit.report.sample_log import SampleLog

ROOT = Path(__file__).resolve().parents[3]
PAIRS: dict[str, tuple[Any, set[str]]] = {
    "NodeStatus": (backend.NodeStatus, set()),
    "LogCopy": (backend.LogCopy, set()),
    "ArmedRunbook": (backend.ArmedRunbook, set()),
    "ServiceState": (backend.ServiceState, set()),
    "CircuitState": (backend.CircuitState, set()),
    "Evidence": (backend.Evidence, set()),
    "Waiting": (backend.Waiting, set()),
    "HeldBack": (backend.HeldBack, set()),
    "Called": (backend.Called, set()),
    "FeedItem": (feed.FeedItem, set()),
    "ListEventsResponse": (feed.FeedPage, set()),
    "ControlResponse": (backend.ControlAnswer, set()),
    "BeginDrillRequest": (backend.DrillRequest, set()),
    "Drill": (backend.DrillReport, set()),
    "DrillRun": (backend.DrillRun, set()),
    "RetentionResponse": (Retained, set()),
    "Run": (recorded.Run, set()),
    "Action": (recorded.Action, set()),
    "Call": (recorded.Call, set()),
    "Check": (Check, set()),
    "Capability": (examination.Capability, set()),
    "Difference": (examination.Difference, {"case"}),  # for the patch only
    "Proposal": (proposal.Proposal, {"format"}),  # of the stored file
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_value_and_its_message_have_the_same_fields(name: str) -> None:
    value, left_out = PAIRS[name]
    fields = set(getattr(value, "model_fields", None) or value.__dataclass_fields__) - left_out
    assert fields == {f.name for f in pb.DESCRIPTOR.message_types_by_name[name].fields}


def test_every_answer_of_the_api_is_in_the_table_above() -> None:
    plain = {"Receipt", "ListRunsResponse", "ListProposalsResponse", "ArmResponse"}
    answers = {m.output_type.name for s in pb.DESCRIPTOR.services_by_name.values() for m in s.methods}
    assert answers - plain <= set(PAIRS)


def test_nested_values_arrive_whole() -> None:
    made = message(STATUS, "NodeStatus")
    assert made.runbooks[0].capabilities == ["recreate"]
    assert made.circuits[0].refused == 17
    assert (made.copies[0].name, made.copies[0].behind_ms) == ("mirror", 61_000)
    run = message(recorded.run(SampleLog().recover()), "Run")
    assert (run.decision[0].action, run.actions[0].outcome) == ("recreate", "applied")


def test_a_field_that_the_message_does_not_have_is_a_bug() -> None:
    with pytest.raises(ValueError, match="format"):
        message(a_proposal(), "Proposal")
    assert "format" in as_pairs(a_proposal())


def test_the_generated_classes_are_those_of_the_proto(tmp_path: Path) -> None:
    """Whoever edits pointcall.proto and forgets `make` finds out here."""
    out = tmp_path / "pointcall_executor" / "api" / "generated"
    out.mkdir(parents=True)
    generate.generate(out=out)
    made = (out / "pointcall_pb2.py").read_text()
    assert made == (ROOT / "executor/pointcall_executor/api/generated/pointcall_pb2.py").read_text()


def test_without_generated_classes_the_error_says_what_to_do() -> None:
    code = "import sys; sys.modules['pointcall_executor.api.generated'] = None\nimport pointcall_executor.api.messages"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "api.not-generated" in done.stderr
    assert "python -m pointcall_executor.api.generate" in done.stderr


def test_the_page_on_the_api_names_every_method_with_its_roles() -> None:
    page = (ROOT / "docs/spec/api.md").read_text()
    rows = re.findall(
        r"^\| (`(?:Runs|Status|Events|Proposals|Control)/.*?) \| (.*?) \| \d+ \| .*?\|$", page, re.MULTILINE
    )
    documented = {}
    for names, cells in rows:
        roles = {r for r, c in zip(Role, cells.split("|"), strict=True) if c.strip() == "yes"}
        service = names.strip("`").split("/")[0]
        for name in re.findall(r"`([^`]+)`", names):
            documented[f"/pointcall.v1.{service}/{name.split('/')[-1]}"] = roles
    assert documented == {m: set(row.roles) for m, row in METHODS.items() if m.startswith("/pointcall.")}


def test_every_role_has_a_mode_and_a_rate() -> None:
    assert set(SOCKET_MODES) == set(RATES) == set(Role)
