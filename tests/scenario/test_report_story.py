"""A report over the log of a real executor, without a kernel: what it verifies itself, what another trust changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pointcall_executor.api.client import ApiError, Client
from pointcall_executor.api.roles import Role
from pointcall_executor.api.server import serve
from pointcall_executor.backend import ExecutorBackend
from pointcall_executor.cli import main
from pointcall_executor.recorded import RecordedNode
from pointcall_executor.shipping import Gauge
from tests.lab import Lab
from tests.scenario.test_loop_story import Watched, opened

PROPOSAL = """\
from pointcall_runbook import CircuitOpened, Decision, Recreate, runbook


@runbook
def opened(e: CircuitOpened) -> Decision:
    return [Recreate(service=e.service)]
"""


@pytest.fixture
def finished(lab: Lab) -> Lab:
    """An executor that recovered a service twice, and was stopped."""
    node = RecordedNode()
    with lab.executor(node) as executor:
        watched = Watched(lab, executor, node)
        watched.arm()
        for _ in range(2):
            watched.happen(opened())
    return lab


def report(lab: Lab, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["report", "--json", "--state-dir", str(lab.state), *words])
    said = json.loads(capsys.readouterr().out)
    return code, json.loads(Path(said["json"]).read_text())


def outcomes(made: dict[str, Any]) -> dict[str, str]:
    return {c["id"]: c["outcome"] for c in made["verdict"]["checks"]}


def test_everything_is_verified_with_the_node_s_own_trust(finished: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    code, made = report(finished, capsys)
    assert code == 0
    assert made["complete"]
    assert set(outcomes(made).values()) == {"pass"}
    assert made["tier"] == "emulated"
    assert all(e["appraised"] and e["verdict"] == "accept" for e in made["epochs"])
    (armed,) = made["armed"]
    assert armed["signers_verified"]
    assert [r["replayed"] for r in made["runs"]] == [True] * len(made["runs"])
    assert len(made["runs"]) >= 2
    standing = {a["id"]: a["standing"] for a in made["answers"]}
    assert [q for q, s in standing.items() if s == "not-satisfied"] == ["epochs.hardware"]


@pytest.mark.parametrize(
    ("over", "evidence", "verified"),
    [
        ({"tee": {"allow_emulated": False}}, "fail", True),
        ({"signers": [{"issuer": "https://other.example", "identity": "somebody"}]}, "pass", False),
    ],
    ids=["a reader who allows no emulation", "a reader who trusts another signer"],
)
def test_the_reader_s_trust_decides(
    finished: Lab, capsys: pytest.CaptureFixture[str], over: dict[str, Any], evidence: str, verified: bool
) -> None:
    finished.set_policy(**over)
    _, made = report(finished, capsys)
    assert outcomes(made)["report.evidence"] == evidence
    assert made["armed"][0]["signers_verified"] is verified


def test_a_reader_without_the_emulated_root_accepts_nothing(finished: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(finished.trust / "emulated")
    code, made = report(finished, capsys)
    assert code == 1
    assert outcomes(made)["report.evidence"] == "fail"
    assert made["tier"] == "none"
    assert made["complete"]


def test_a_reader_without_trust_is_told_what_was_not_checked(
    finished: Lab, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, made = report(finished, capsys, "--trust", str(tmp_path))
    assert code == 0
    assert [i for i, o in outcomes(made).items() if o == "not-checked"] == ["report.evidence"]
    assert not made["armed"][0]["signers_verified"]
    assert not any(e["appraised"] for e in made["epochs"])


def test_an_agent_over_a_real_executor(lab: Lab) -> None:
    """The same sockets over the daemon itself: read, propose, and be refused."""
    node = RecordedNode()
    with lab.executor(node) as executor:
        watched = Watched(lab, executor, node)
        watched.arm()
        done = watched.happen(opened())
        backend = ExecutorBackend(executor)
        backend.shipped = lambda: {"witnesses": Gauge(), "mirror": Gauge(True, 5, 2, 1.5, 3, "no route")}
        server = serve(backend, lab.state.parent / "run")
        with Client(server.socket(Role.AGENT)) as agent:
            status = agent.call("Status/GetStatus")
            assert status.state == "armed"
            assert [(c.name, c.behind_ms, c.failures) for c in status.copies] == [("mirror", 1500, 3)]
            assert done.run.id in [r.id for r in agent.call("Runs/ListRuns").runs]
            made = agent.call(
                "Proposals/SubmitProposal", name="always", rationale="Because.", source=PROPOSAL, author="agent-1"
            )
            assert made.state == "open", made
            assert made.simulated >= 1
            with pytest.raises(ApiError) as refusal:
                agent.call("Control/Disarm", reason="please")
            assert refusal.value.status == "PERMISSION_DENIED"
        with Client(server.socket(Role.OPERATOR)) as operator:
            assert operator.call("Control/Pause", reason="maintenance", seconds=60).state == "paused"
            assert operator.call("Control/Resume", reason="over").state == "armed"
        with Client(server.socket(Role.RELYING_PARTY)) as relying:
            evidence = relying.call("Status/GetEvidence", nonce=b"n" * 32)
            assert evidence.nonce == b"n" * 32
        server.stop(0)
        kinds = [e.kind for e in executor.journal.entries()]
        assert "proposal" in kinds
        assert "access" in kinds
