"""What an update grants, revokes or changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.manifest import Circuit, Guard, Limits, Manifest
from pointcall_attest.manifest_diff import CIRCUIT, LIMITS, differences
from pointcall_executor import cli
from tests.unit.signing.rb1 import module
from tests.unit.signing.world import DAY, NOW, World, declaration, files, runbook, service, sha256, statement, z


def diff(old: bytes, new: bytes) -> list[tuple[str, str]]:
    return [(c.effect, c.text) for c in differences(Manifest.parse(old), Manifest.parse(new))]


GRANTS = {"actions": ["recreate"], "services": ["db"]}


@pytest.mark.parametrize(
    ("over", "effect", "text"),
    [
        ({"runbooks": []}, "revokes", "runbook restart"),
        ({"runbooks": [runbook(), runbook(name="b")]}, "grants", "runbook b"),
        ({"runbooks": [runbook(grants=GRANTS | {"actions": ["recreate", "kill"]})]}, "grants", "restart: action kill"),
        ({"runbooks": [runbook(grants=GRANTS | {"actions": []})]}, "revokes", "restart: action recreate"),
        ({"runbooks": [runbook(grants=GRANTS | {"networks": ["10.0.0.0/8"]})]}, "grants", "network 10.0.0.0/8"),
        ({"runbooks": [runbook(mode="monitor")]}, "revokes", "mode enforce -> monitor"),
        ({"runbooks": [runbook(limits={"per_minute": 60})]}, "grants", "per_minute 6 -> 60"),
        ({"runbooks": [runbook(limits={"hold_off_seconds": 9})]}, "revokes", "hold_off_seconds 0 -> 9"),
        ({"runbooks": [runbook(limits={"approval": ["recreate"]})]}, "revokes", "approval of recreate"),
        ({"runbooks": [runbook(parameters={"least": 1})]}, "changes", "parameter least unset -> 1"),
        ({"guard": {"max_actions_per_minute": 9}}, "revokes", "guard: max_actions_per_minute 10 -> 9"),
        ({"guard": {"max_actions_per_minute": 10, "never_touch": ["dns"]}}, "revokes", "never touch dns"),
        ({"sensors": []}, "revokes", "sensor lifecycle"),
        ({"services": [service(listen=[])]}, "revokes", "listens on 127.0.0.1 port 5432/tcp"),
        ({"services": [service(digest="00" * 32)]}, "changes", "another declaration"),
        ({"expires": z(NOW + 91 * DAY)}, "grants", "expires"),
        ({"expires": z(NOW + 89 * DAY)}, "revokes", "expires"),
        ({"reference_values": {"snp": ["cd" * 48, "ef" * 48], "tdx": []}}, "grants", "SNP measurement ef"),
        ({"revoked": ["00" * 32]}, "revokes", "revocation of 00"),
        ({"sequence": 8}, "changes", "sequence 7 -> 8"),
        ({"min_executor": "0.2.0"}, "changes", "min_executor 0.1.0 -> 0.2.0"),
    ],
)
def test_one_difference(over: dict[str, Any], effect: str, text: str) -> None:
    found = diff(statement(), statement(**over))
    assert len(found) == 1
    assert found[0][0] == effect
    assert text in found[0][1]


def test_a_channel_of_another_kind_has_another_address() -> None:
    found = diff(statement(), statement(channels=[{"name": "oncall", "kind": "unix", "address": "/run/x"}]))
    assert [text for _, text in found] == ["channel oncall: kind log -> unix", "channel oncall: address  -> /run/x"]
    assert {effect for effect, _ in found} == {"changes"}


def circuit(**values: Any) -> bytes:
    return statement(services=[service(listen=[{"address": "127.0.0.1", "port": 5432, "circuit": values}])])


@pytest.mark.parametrize(
    ("old", "new", "effect", "text"),
    [
        ({"threshold": 5}, {"threshold": 4}, "grants", "threshold 5 -> 4"),
        ({"threshold": 5}, {"threshold": 6}, "revokes", "threshold 5 -> 6"),
        ({"window_ms": 1}, {"window_ms": 2}, "grants", "window_ms 1 -> 2"),
        ({"cooldown_ms": 2}, {"cooldown_ms": 1}, "revokes", "cooldown_ms 2 -> 1"),
        ({"percent": 50}, {"percent": 40}, "grants", "percent 50 -> 40"),
        ({"min_attempts": 9}, {"min_attempts": 10}, "revokes", "min_attempts 9 -> 10"),
        ({"abandoned": False}, {"abandoned": True}, "grants", "abandoned False -> True"),
        ({"abandoned": True}, {"abandoned": False}, "revokes", "abandoned True -> False"),
        ({"refuse_errno": "EPERM"}, {"refuse_errno": "ECONNREFUSED"}, "changes", "refuse_errno EPERM -> ECONNREFUSED"),
        ({"threshold": 5, "percent": 9}, {"threshold": 5}, "changes", "percent 9 -> unset"),
    ],
)
def test_a_circuit_of_its_own(old: dict[str, Any], new: dict[str, Any], effect: str, text: str) -> None:
    assert diff(circuit(**old), circuit(**new)) == [(effect, f"service db: circuit of 127.0.0.1 port 5432/tcp: {text}")]


def test_a_circuit_of_its_own_or_none() -> None:
    found = [("changes", "service db: circuit of 127.0.0.1 port 5432/tcp: threshold unset -> 3")]
    assert diff(statement(), circuit(threshold=3)) == found
    assert [effect for effect, _ in diff(circuit(threshold=3), statement())] == ["changes"]


def test_every_value_of_a_circuit_has_a_direction_or_has_none() -> None:
    assert set(Circuit.model_fields) - set(CIRCUIT) == {"refuse_errno"}


def test_the_other_way_round_grants_become_revocations() -> None:
    old, new = statement(), statement(runbooks=[runbook(grants=GRANTS | {"actions": ["recreate", "kill"]})])
    assert [e for e, _ in diff(old, new)] == ["grants"]
    assert [e for e, _ in diff(new, old)] == ["revokes"]
    less = statement(guard={"max_actions_per_minute": 10, "never_touch": ["dns"]})
    assert diff(less, old) == [("grants", "guard: never touch dns is dropped")]


def test_other_files() -> None:
    parts = files() | {"modules/restart.wasm": module("OomKilled"), "blobs/lifecycle.blob": b"other"}
    texts = [t for _, t in diff(statement(), statement(parts))]
    assert texts == ["runbook restart: another module, the same version", "sensor lifecycle: another BPF blob"]


def test_a_sequence_that_goes_back() -> None:
    assert ("revokes", "the sequence goes back: nodes that have armed the newer one refuse this") in diff(
        statement(), statement(sequence=6)
    )


def test_the_same_manifest() -> None:
    assert diff(statement(), statement()) == []


def test_every_limit_has_a_direction() -> None:
    numbers = [
        name for model in (Limits, Guard) for name, f in model.model_fields.items() if f.default.__class__ is int
    ]
    assert sorted(LIMITS) == sorted(numbers)


def test_the_verb(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.VERBS, "manifest", "manifest")
    new = statement(runbooks=[runbook(grants=GRANTS | {"actions": ["recreate", "kill"]})], sequence=8)
    (tmp_path / "old.json").write_bytes(statement())
    (tmp_path / "new.json").write_bytes(world.sign(new))
    words = ["manifest", "diff", str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("grants   runbook restart: action kill\n")
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["new"] == sha256(new)
    assert cli.main([*words[:3], str(tmp_path / "old.json")]) == 0
    assert "no difference" in capsys.readouterr().out
    assert cli.main(["manifest", "show", str(tmp_path / "new.json")]) == 0
    assert json.loads(capsys.readouterr().out)["sequence"] == 8
    (tmp_path / "new.json").write_bytes(declaration())
    assert cli.main(words) == 4
