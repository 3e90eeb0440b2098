"""`pointcall approve` and `acknowledge` as people use them, against an executor that serves on its socket."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.approval import parse_approval
from pointcall_attest.printable import hides
from pointcall_executor import cli
from pointcall_executor.api.server import serve
from pointcall_executor.backend import ExecutorBackend
from pointcall_executor.cli.output import Exit
from pointcall_executor.recorded import RecordedNode
from pointcall_keys.long_lived import FileKey, policy_row
from tests.lab import Lab
from tests.scenario.test_loop_story import Watched, declare, opened
from tests.scenario.test_people_story import broad, careful, failures

TWO = '''"""Recreate a service and what it needs."""
from pointcall_runbook import CircuitOpened, Decision, Recreate, runbook, service

@runbook
def opened(e: CircuitOpened) -> Decision:
    return [Recreate(service=e.service), Recreate(service=service("db"))]
'''


@dataclass(frozen=True)
class Desk:
    """Somebody at a terminal of a node, with a key of their own, and the executor that runs there."""

    watched: Watched
    capsys: pytest.CaptureFixture[str]
    key: Path

    def text(self, *words: object, code: int = Exit.OK) -> str:
        given = [*map(str, words), "--state-dir", str(self.watched.lab.state)]
        self.capsys.readouterr()
        assert cli.main(given) == code, self.capsys.readouterr()
        out, err = self.capsys.readouterr()
        assert not any(map(hides, out))  # a terminal shows all of it
        return out + err

    def ask(self, *words: object, code: int = Exit.OK) -> dict[str, Any]:
        (line,) = self.text(*words, "--json", code=code).splitlines()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def refusal(self, *words: object, code: int = Exit.REFUSED) -> str:
        return str(self.ask(*words, code=code)["error"]["id"])

    def configs(self, what: str) -> list[dict[str, Any]]:
        entries = self.watched.executor.journal.entries(kind="config")
        return [e.body["detail"] for e in entries if e.body["what"] == what]


@pytest.fixture
def desk(make_lab: Callable[..., Lab], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Desk]:
    lab, node, key = make_lab(), RecordedNode(), tmp_path / "anna.pem"
    lab.set_policy(approver_keys=[policy_row("anna", FileKey.make(key, None))])
    with lab.executor(node) as executor:
        server = serve(ExecutorBackend(executor), lab.state / "run")
        try:
            yield Desk(Watched(lab, executor, node), capsys, key)
        finally:
            server.stop(0)


def test_anna_approves(desk: Desk) -> None:
    watched = desk.watched
    assert desk.text("approve", "--list") == "nothing waits for a person\n"
    watched.arm(careful(watched.lab))
    held = watched.happen(opened())
    run = held.run.id
    (row,) = desk.ask("approve", "--list")["held_back"]
    assert (row["run"], row["index"], row["action"], row["target"]) == (run, 0, "recreate", "api")
    assert row["args"] == list(map(str, held.decision.calls[0].args))
    assert (row["manifest_sha256"], row["node"]) == (held.runbook.manifest, "lab")
    listed = desk.text("approve", "--list")
    assert f"{run} call 0: fix wants recreate api" in listed
    assert f"pointcall approve {run}" in listed
    assert f"approved: the runbook decides again about the event of {run}" in desk.text(
        "approve", run, "--key", desk.key, "--minutes", 1
    )
    done = watched.next_receipt()
    assert (done.trigger.sensor, done.actions[0].outcome) == ("approval", "applied")
    (approved,) = desk.configs("approved")
    assert approved["by"] == f"{hashlib.sha256(FileKey.load(desk.key, None).spki).hexdigest()} by key"
    assert desk.ask("approve", "--list") == {"held_back": [], "called": []}
    assert desk.refusal("approve", run, "--key", desk.key, code=Exit.USAGE) == "cli.usage"


def test_signed_elsewhere(desk: Desk, tmp_path: Path) -> None:
    """What is to be signed is carried to the key, and what was signed is carried back: three machines."""
    watched = desk.watched
    watched.arm(careful(watched.lab))
    run = watched.happen(opened()).run.id
    statement, bundle, other = (tmp_path / name for name in ("to-sign.json", "signed.json", "by-sign.json"))
    assert desk.ask("approve", run, "--statement", statement) == {"statement": str(statement)}
    body, manifest = parse_approval(statement.read_bytes())
    assert (body.run, body.action, manifest) == (run, "recreate", watched.executor.admitted.manifest.sha256)  # type: ignore[union-attr]
    assert (body.expires - body.issued).total_seconds() == 600
    assert desk.ask("approve", run, "--key", desk.key, "--out", bundle) == {"bundle": str(bundle)}
    assert desk.configs("approved") == []
    assert desk.ask("sign", statement, "--key", desk.key, "--out", other)["ok"]
    assert desk.ask("approve", "--hand-in", other)["ok"]
    assert watched.next_receipt().actions[0].outcome == "applied"
    assert desk.refusal("approve", "--hand-in", bundle) == "approval.unknown"  # another bundle, the same call
    assert desk.refusal("approve", "--hand-in", other) == "approval.unknown"
    assert len(desk.configs("approved")) == 1


def test_what_does_not_approve(desk: Desk, tmp_path: Path) -> None:
    watched = desk.watched
    watched.arm(careful(watched.lab))
    run = watched.happen(opened()).run.id
    stranger, junk, long = tmp_path / "stranger.pem", tmp_path / "junk", tmp_path / "long"
    FileKey.make(stranger, None)
    junk.write_bytes(b"{}")
    long.write_bytes(b" " * 300_000)
    for words, code, check in (
        (["approve"], Exit.USAGE, "cli.usage"),
        (["approve", run, "--key", desk.key, "--minutes", "61"], Exit.USAGE, "cli.usage"),
        (["approve", run, "--key", desk.key, "--minutes", "0"], Exit.USAGE, "cli.usage"),
        (["approve", run, "--key", desk.key, "--index", "1"], Exit.USAGE, "cli.usage"),
        (["approve", "01JAAAAAAAAAAAAAAAAAAAAAAA", "--key", desk.key], Exit.USAGE, "cli.usage"),
        (["approve", run, "--key", stranger], Exit.REFUSED, "manifest.signer"),
        (["approve", run, "--key", tmp_path / "none.pem"], Exit.REFUSED, "sign.key"),
        (["approve", "--hand-in", junk], Exit.REFUSED, "manifest.bundle"),
        (["approve", "--hand-in", long], Exit.REFUSED, "api.size"),
        (["approve", "--hand-in", tmp_path / "none"], Exit.ENVIRONMENT, "environment.os"),
    ):
        assert desk.refusal(*words, code=code) == check, words
    assert watched.executor.journal.count("receipt") == 1
    assert [h["run"] for h in desk.ask("approve", "--list")["held_back"]] == [run]


def test_which_of_two_calls(desk: Desk) -> None:
    """One run can have several calls held back: then the person says which."""
    watched = desk.watched
    body = careful(watched.lab)
    watched.lab.runbook("fix", TWO)
    body["services"].append({"name": "db", "declaration": declare(watched.lab, "db")})
    body["runbooks"][0]["grants"]["services"] = ["api", "db"]
    watched.arm(body)
    run = watched.happen(opened()).run.id
    assert [(h["index"], h["target"]) for h in desk.ask("approve", "--list")["held_back"]] == [(0, "api"), (1, "db")]
    assert "call 0: recreate api, call 1: recreate db" in desk.text("approve", run, "--key", desk.key, code=Exit.USAGE)
    desk.text("approve", run, "--key", desk.key, "--index", 1)
    done = watched.next_receipt()
    assert [(a.target, a.outcome, a.guard.check) for a in done.actions] == [
        ("api", "refused", "guard.approval"),
        ("db", "applied", ""),
    ]


def test_somebody_has_seen_it(desk: Desk) -> None:
    watched = desk.watched
    watched.arm(broad(watched.lab))
    run = watched.happen(failures(9)).run.id
    assert desk.ask("approve", "--list")["called"] == [{"run": run, "code": 9}]
    listed = desk.text("approve", "--list")
    assert f"{run}: a person was called, code 9; pointcall acknowledge {run}" in listed
    assert f"nobody is called again because of {run}" in desk.text("acknowledge", run, "--reason", "on my way")
    assert desk.configs("acknowledged") == [{"run": run, "reason": "on my way"}]
    assert desk.text("approve", "--list") == "nothing waits for a person\n"
    assert desk.refusal("acknowledge", run) == "escalation.unknown"


@pytest.mark.parametrize("words", [["approve", "--list"], ["approve", "R"], ["acknowledge", "R"]])
def test_no_executor_answers(desk: Desk, words: list[str], tmp_path: Path) -> None:
    code = cli.main([*words, "--json", "--state-dir", str(tmp_path / "elsewhere")])
    told = json.loads(desk.capsys.readouterr().out)
    assert (code, told["error"]["id"]) == (Exit.ENVIRONMENT, "api.unreachable")
