"""The verbs `log`, `verify` and `replay` as scripts call them: JSON lines and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.log.proof import Proof
from pointcall_executor.cli import main
from tests.unit.log import world


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    node = world.Node.boot(folder)
    for number in range(3):
        node.run(number)
    node.checkpoint()
    node.journal.close()
    (folder / "trust" / "emulated").mkdir(parents=True)
    (folder / "trust" / "policy.json").write_bytes(world.policy_bytes())
    (folder / "trust" / "trusted_root.json").write_bytes(b"{}")
    (folder / "trust" / "emulated" / "root.der").write_bytes(world.platform().root_der)
    return folder


@pytest.fixture
def call(state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_STATE_HOME", "/nonexistent")

    def go(*words: object, at: Path | None = state) -> tuple[int, list[dict[str, Any]], str]:
        code = main([*map(str, words), "--json", *(["--state-dir", str(at)] if at else [])])
        out = capsys.readouterr()
        return code, [json.loads(line) for line in out.out.splitlines() if line.startswith("{")], out.out

    return go


def first_run(call: Any) -> str:
    return str(call("log", "list")[1][0]["run"])


def test_list_prints_one_run_a_line(call: Any) -> None:
    code, rows, _ = call("log", "list")
    assert code == 0
    assert [r["runbook"] for r in rows] == ["web"] * 3
    assert all({"run", "index", "leaf_hash", "actions"} <= r.keys() for r in rows)
    assert len(call("log", "list", "--kind", "all")[1]) == 10
    assert [r["index"] for r in call("log", "list", "--kind", "intent", "--start", "2", "--limit", "1")[1]] == [4]
    assert call("log", "list", "--kind", "nonsense")[0] == 2


def test_show_and_prove(call: Any, tmp_path: Path) -> None:
    run = first_run(call)
    _, (row,), _ = call("log", "show", run)
    assert row["body"]["run"]["id"] == run
    assert call("log", "show", "0")[1][0]["kind"] == "epoch-open"
    assert call("log", "show", "99")[0] == 1
    assert call("log", "prove", run, "--out", tmp_path / "p")[0] == 0
    assert Proof.parse((tmp_path / "p").read_bytes()).index == row["index"]


def test_stream_and_check_of_a_copy(call: Any, tmp_path: Path) -> None:
    for form, count in (("otel", 10), ("ocsf", 3)):
        code, rows, text = call("log", "stream", "--format", form)
        assert (code, len(rows)) == (0, count)
        copy = tmp_path / form
        copy.write_text(text)
        assert call("log", "stream", "--format", form, "--check", copy)[0] == 0
        copy.write_text("\n".join(text.splitlines()[1:]))
        code, (found,), _ = call("log", "stream", "--format", form, "--check", copy)
        assert (code, len(found["wrong"])) == (1, 1)


def test_other_forms_of_an_entry(call: Any) -> None:
    run = first_run(call)
    assert json.loads(call("log", "show", run, "--raw")[2])["payloadType"] == "application/vnd.in-toto+json"
    assert json.loads(call("log", "show", run, "--bundle")[2])["dsseEnvelope"]
    assert call("log", "show", run, "--key")[2].startswith("-----BEGIN PUBLIC KEY-----")


def test_tiles(call: Any, tmp_path: Path) -> None:
    code, (row,), _ = call("log", "tiles", "--out", tmp_path / "t")
    assert (code, row["size"]) == (0, 10)
    assert call("verify", tmp_path / "t")[0] == 0


def test_check(call: Any) -> None:
    code, (verdict,), _ = call("log", "check")
    assert (code, verdict["verdict"], verdict["entries"]) == (0, "accept", 10)


def test_export_and_verify_with_each_kind_of_trust(call: Any, state: Path, tmp_path: Path) -> None:
    run, pack = first_run(call), tmp_path / "pack"
    assert call("log", "export", "--run", run, "--out", pack)[0] == 0
    assert call("verify", pack, "--allow-emulated")[0] == 0
    code, (verdict,), _ = call("verify", pack)
    assert (code, verdict["verdict"], verdict["tier"]) == (3, "accept", "emulated")
    assert call("verify", run, "--allow-emulated")[0] == 0
    assert call("verify", pack, "--trust", state / "trust", "--allow-emulated", at=None)[0] == 0
    code, (verdict,), _ = call("verify", pack, "--allow-emulated", at=None)
    assert (code, verdict["not_checked"][0]) == (0, "trust.source")
    assert call("verify", pack, at=None)[0] == 3
    assert call("verify", pack, "--allow-emulated", "--at", "2030-01-01T00:00:00Z")[0] == 1
    assert call("verify", pack, "--at", "yesterday")[0] == 2


def test_a_receipt_in_a_file_is_verified_as_it_is(call: Any, tmp_path: Path) -> None:
    run, pack, file = first_run(call), tmp_path / "pack", tmp_path / "receipt.json"
    call("log", "export", "--run", run, "--out", pack)
    index = call("log", "show", run)[1][0]["index"]
    raw = (pack / "entries" / f"{index}.json").read_bytes()
    file.write_bytes(raw)
    assert call("verify", file, "--allow-emulated")[0] == 0
    assert call("verify", pack / "entries" / f"{index}.json", "--allow-emulated", at=None)[0] == 0
    for at in range(0, len(raw), 97):
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        assert call("verify", file, "--allow-emulated")[0] in (1, 4), at


def test_replay(call: Any) -> None:
    code, rows, _ = call("replay", "--all")
    assert code == 0
    assert rows[-1] == {"runs": 3, "identical": 3, "different": 0}
    assert call("replay", first_run(call))[1][0]["identical"] is True
    assert call("replay")[0] == 2
    assert call("replay", "01ARZ3NDEKTSV4RRFFQ69G5FAV")[0] == 1


def test_without_a_journal(call: Any, tmp_path: Path) -> None:
    run = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
    for words in (["log", "list"], ["replay", "--all"], ["verify", run]):
        assert call(*words, at=tmp_path)[0] == 5


def test_the_tables_for_people(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["log", "list"], ["log", "check"], ["replay", "--all"]):
        assert main([*words, "--state-dir", str(state)]) == 0
    shown = capsys.readouterr().out
    assert "CircuitOpened" in shown
    assert "3 decisions made again, 0 different" in shown


def test_a_state_folder_is_verified_whole(call: Any, state: Path, tmp_path: Path) -> None:
    code, (verdict,), _ = call("verify", state)
    outcomes = {c["id"]: c["outcome"] for c in verdict["checks"]}
    assert (code, outcomes["log.consistency"], outcomes["log.witnesses"]) == (0, "not-checked", "not-checked")
    code, (verdict,), _ = call("verify", state, "--evidence")
    assert (code, verdict["tier"]) == (3, "emulated")
    assert call("verify", state, "--evidence", "--allow-emulated")[0] == 0
    assert "epoch.evidence" in {c["id"] for c in verdict["checks"]}
    assert call("verify", state, "--evidence", "--trust", tmp_path)[0] == 5


def test_growth_from_a_checkpoint_that_was_seen_before(call: Any, tmp_path: Path) -> None:
    """Of a run, of its pack, of tiles and of the whole journal; a checkpoint of another history is refused by all."""
    folder = tmp_path / "grown"
    folder.mkdir()
    world.provision(folder)
    node = world.Node.boot(folder)
    node.run(0)
    node.checkpoint()
    head = node.journal.head()
    assert head is not None
    kept, forged = tmp_path / "kept", tmp_path / "forged"
    kept.write_bytes(head.text)
    forged.write_bytes(node.keys.sign_checkpoint(world.ORIGIN, head.size, b"x" * 32))
    run = node.run(1)
    node.checkpoint()
    node.journal.close()
    for file, code in ((kept, 0), (forged, 1)):
        pack, tiles = tmp_path / f"pack-{code}", tmp_path / "tiles"
        assert call("log", "export", "--run", run, "--out", pack, "--since", file, at=folder)[0] == 0
        call("log", "tiles", "--out", tiles, at=folder)
        for what in (run, pack, tiles, folder):
            found = call("verify", what, "--allow-emulated", "--since", file, at=folder)
            assert found[0] == code, (what, found[2])
            failed = [c["id"] for c in found[1][0]["checks"] if c["outcome"] == "fail"]
            assert failed == ["log.consistency"] * code
    assert call("verify", tmp_path / "pack-0", "--allow-emulated", "--since", forged, at=folder)[0] == 1
    assert call("verify", tmp_path / "pack-1", "--allow-emulated", at=folder)[0] == 1
    plain = tmp_path / "plain"
    call("log", "export", "--run", run, "--out", plain, at=folder)
    assert call("verify", plain, "--allow-emulated", "--since", kept, at=folder)[0] == 1
    later = tmp_path / "later"
    later.write_bytes(node.keys.sign_checkpoint(world.ORIGIN, 99, b"x" * 32))
    code, (row,), _ = call("verify", run, "--since", later, at=folder)
    assert (code, row["error"]["id"]) == (1, "pack.consistency")


def test_the_evidence_of_a_run_is_shown(call: Any) -> None:
    _, (verdict,), _ = call("verify", first_run(call), "--allow-emulated", "--evidence")
    assert verdict["evidence"]["platform"] == "snp"


BASE_ONLY = """
import importlib.abc, sys
EXTRAS = {extras!r}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in EXTRAS:
            raise ModuleNotFoundError(f'{{name}} is of an extra', name=name)
sys.meta_path.insert(0, Absent())
from pointcall_executor.cli import main
sys.exit(main(sys.argv[1:]))
"""
EXTRAS = ("grpc", "grpc_health", "grpc_reflection", "yaml", "wasmtime", "mcp", "psycopg", "sevsnpmeasure", "pkcs11")


def test_a_pack_is_verified_with_the_base_install_on_another_machine(call: Any, tmp_path: Path) -> None:
    """No extra, no state folder, no network: as an auditor has it."""
    pack = tmp_path / "pack"
    call("log", "export", "--run", first_run(call), "--out", pack)
    command = [sys.executable, "-c", BASE_ONLY.format(extras=EXTRAS), "verify", str(pack), "--json"]
    path = ":".join(p for p in sys.path if p)
    unshared = {"PYTHONPATH": path, "HOME": str(tmp_path / "nobody")}
    for more, code in ((["--allow-emulated"], 0), ([], 3)):
        done = subprocess.run([*command, *more], check=False, capture_output=True, env=unshared)
        assert done.returncode == code, done.stderr
    (next(pack.glob("openings/*"))).unlink()
    assert (
        subprocess.run([*command, "--allow-emulated"], check=False, capture_output=True, env=unshared).returncode == 1
    )
