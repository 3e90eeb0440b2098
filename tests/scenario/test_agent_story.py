"""The story of an agent: it reads what happened, proposes a runbook, cannot act, and people get a patch to review.

Everything is real but the executor behind the API: journal, keys, sockets, compiler, child process, git, report.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest import entry
from pointcall_executor.api.accesses import Access
from pointcall_executor.api.client import ApiError, Client
from pointcall_executor.api.roles import METHODS, Role
from pointcall_executor.api.server import Server, serve
from pointcall_executor.cli import main
from pointcall_executor.journal import Journal
from tests.unit.api.fake_backend import FakeBackend
from tests.unit.report.sample_log import ORIGIN

RUNBOOK = """\
from pointcall_runbook import CircuitOpened, Decision, Recreate, runbook, seconds


@runbook
def on_circuit_opened(e: CircuitOpened) -> Decision:
    if e.restarts < 3:
        return [Recreate(service=e.service, grace=seconds(2))]
    return []
"""
GIT = {
    "PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1", "GIT_COMMITTER_NAME": "Reviewer",
    "GIT_COMMITTER_EMAIL": "reviewer@example.org", "GIT_AUTHOR_NAME": "R", "GIT_AUTHOR_EMAIL": "r@example.org",
}  # fmt: skip


class Node(FakeBackend):
    """A node whose log lies in a real journal."""

    def __init__(self, state: Path) -> None:
        super().__init__(state)
        self.journal = Journal.open(state / "journal.db", origin=ORIGIN)
        self._copy()

    def _copy(self) -> None:
        for made in self.log.log[self.journal.size :]:
            self.journal.append(made.raw)

    def reader(self) -> Any:
        return self.journal

    def recover(self) -> str:
        run = self.log.recover().run
        self._copy()
        return str(run)

    def proposed(self, body: Mapping[str, Any]) -> None:
        self.log.append(entry.ProposalBody(**body))
        self._copy()

    def accessed(self, accesses: Sequence[Access]) -> None:
        for access in accesses:
            self.log.append(entry.Access(role=access.role, method=access.method, count=access.count))
        self._copy()

    def checkpoint(self) -> None:
        self.journal.checkpoint(lambda *_: self.log.checkpoint().text, time.time(), force=True)


@pytest.fixture
def state() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="pc-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def node(state: Path) -> Iterator[tuple[Node, Server]]:
    node = Node(state)
    server = serve(node, state / "run")
    yield node, server
    server.stop(0)
    node.journal.close()


def said(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """The JSON that a verb prints; asserts that it went well."""
    capsys.readouterr()
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_the_agent_proposes_and_people_decide(
    node: tuple[Node, Server], state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend, server = node
    runs = [backend.recover() for _ in range(2)]

    # The agent reads what happened.
    with Client(server.socket(Role.AGENT)) as agent:
        assert [r.id for r in agent.call("Runs/ListRuns").runs] == runs[::-1]
        assert agent.call("Runs/GetRun", run=runs[0]).actions[0].outcome == "applied"

        # It cannot act, whatever it calls.
        for method in [m for m, row in METHODS.items() if row.mutating]:
            with pytest.raises(ApiError) as refusal:
                agent.call(method.removeprefix("/pointcall.v1."))
            assert refusal.value.status == "PERMISSION_DENIED"
    assert backend.asked == []

    # It proposes a runbook, which is compiled, checked and simulated on both recorded events.
    source = tmp_path / "db-with-grace" / "runbook.py"
    source.parent.mkdir()
    source.write_text(RUNBOOK)
    words = ["propose", str(source), "--state-dir", str(state), "--author", "agent-1", "--rationale", "Stops cleanly."]
    made = said(capsys, *words)
    assert (made["state"], made["name"], made["simulated"]) == ("open", "db-with-grace", 2)
    assert [c["actions"] for c in made["capabilities"]] == [["recreate"]]

    # Nothing was armed by it, and the log says that it came.
    assert backend.asked == []
    (proposal,) = backend.journal.entries("proposal")
    assert proposal.body["author"] == "agent-1"
    assert proposal.body["state"] == "open"
    server.flush()
    denied = [e.body for e in backend.journal.entries("access") if e.body["method"].endswith("(denied)")]
    assert {b["role"] for b in denied} == {"agent"}

    # A person exports it; git takes it; the file is what was proposed.
    listed = said(capsys, "propose", "--list", "--state-dir", str(state))
    assert listed["id"] == made["id"]
    patch = tmp_path / "proposal.patch"
    said(capsys, "propose", "--export", made["id"], "--out", str(patch), "--state-dir", str(state))
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for git in (
        ["init", "-q", "-b", "main"],
        ["commit", "-q", "--allow-empty", "-m", "start"],
        ["am", "-q", str(patch)],
    ):
        subprocess.run(["git", *git], cwd=source.parent.parent, env=GIT, check=True, capture_output=True)
    assert (tmp_path / "runbooks/library/db-with-grace/runbook.py").read_text() == RUNBOOK

    # The report has it all, and proves that it is all.
    backend.checkpoint()
    report = said(capsys, "report", "--state-dir", str(state), "--at", "2026-11-23T12:00:00Z")
    assert report["complete"]
    assert report["entries"] == backend.journal.size
    body = json.loads(Path(report["json"]).read_text())
    standing = {a["id"]: a["standing"] for a in body["answers"]}
    assert standing["proposals.checked"] == "satisfied"
    assert standing["access.recorded"] == "satisfied"
    assert "EMULATED" in Path(report["html"]).read_text()
    sums = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=state / "report", capture_output=True, check=True)
    assert sums.stdout.count(b": OK") == 3

    # An auditor draws from everything.
    words = ["report", "sample", "--n", "1", "--seed", "of the auditor", "--state-dir", str(state)]
    drawn = said(capsys, *words)
    assert (drawn["population"], len(drawn["sample"])) == (2, 1)
    assert drawn == said(capsys, *words)


def test_a_bad_proposal_leaves_a_log_entry_and_nothing_else(
    node: tuple[Node, Server], state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend, _ = node
    source = tmp_path / "evil.py"
    source.write_text("import os\nos.system('reboot')\n")
    words = ["propose", str(source), "--state-dir", str(state), "--author", "a", "--rationale", "r"]
    assert main(words) == 1
    assert "FAIL  proposal.compiles" in capsys.readouterr().out
    assert [e.body["state"] for e in backend.journal.entries("proposal")] == ["refused"]
    assert not (state / "proposals").exists()


def test_status_says_what_is_armed(node: tuple[Node, Server], state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backend, _ = node
    run = backend.recover()
    status = said(capsys, "status", "--state-dir", str(state))
    assert (status["state"], status["tier"], status["last_runs"][0]["id"]) == ("armed", "emulated", run)
    assert main(["status", "--state-dir", str(state)]) == 0
    text = capsys.readouterr().out
    assert "EMULATED" in text
    assert "refusing-dependency" in text


def test_without_an_executor_the_environment_is_named(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["status"], ["propose", __file__, "--rationale", "r", "--name", "some-name"]):
        assert main([*words, "--state-dir", str(state)]) == 5
        assert "api.unreachable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "id"),
    [
        (["propose", "FILE"], 2, "cli.usage"),
        (["propose", "BYTES", "--rationale", "r"], 2, "proposal.malformed"),
        (["propose", "--export", "p-" + "0" * 24], 2, "api.not-found"),
        (["propose", "--export", "../x"], 1, "proposal.id"),
        (["propose", "FILE", "--rationale", "r", "--name", "No Name"], 1, "proposal.name"),
        (["propose", "FILE", "--rationale", "r", "--author", "a b"], 1, "proposal.author"),
        (["report", "sample"], 2, "cli.usage"),
        (["report", "sample", "--seed", "s", "--n", "0"], 2, "cli.usage"),
        (["report", "sample", "--seed", "s"], 5, "report.checkpoint"),
        (["report", "--at", "yesterday"], 2, "cli.usage"),
        (["report", "--at", "2026-11-23T00:00:00"], 2, "cli.usage"),
        (["report", "--controls", "FILE"], 4, "report.mapping"),
    ],
)
def test_each_wrong_word_has_its_exit_code(
    node: tuple[Node, Server],
    state: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    id: str,
) -> None:
    files = {"FILE": tmp_path / "a-runbook.py", "BYTES": tmp_path / "bytes.py"}
    files["FILE"].write_text(RUNBOOK)
    files["BYTES"].write_bytes(b"\xff\xfe")
    assert main([str(files.get(w, w)) for w in words] + ["--state-dir", str(state)]) == code
    assert f"[{id}]" in capsys.readouterr().err
