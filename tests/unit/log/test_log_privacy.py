"""Sealing, erasing, pruning: what is personal is in no leaf, its text can go from the disk, and every proof stays."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointcall_attest import dsse, entry, sealing
from pointcall_attest.commitment import commit, opens
from pointcall_attest.errors import MalformedError
from pointcall_attest.log.tree import leaf_hash
from pointcall_attest.pack import Pack, export
from pointcall_attest.pack_check import verify_pack
from pointcall_attest.receipt import Receipt
from pointcall_attest.replay import replay_all
from pointcall_attest.sealing import HIDDEN, Opening
from pointcall_executor.journal import _MIGRATIONS as MIGRATIONS
from pointcall_executor.journal import DamagedError, Journal, JournalError
from pointcall_executor.journal_check import check_journal
from pointcall_executor.journal_reader import APPLICATION_ID, JournalReader
from pointcall_executor.recorder import Recorder
from pointcall_executor.tile_folder import extend
from pointcall_runbook.vocabulary import ACTIONS
from tests.unit.log import world
from tests.unit.log.test_log_journal import change

SECRET = "psql -h db -U alice --password=hunter2"
ADDRESS = "192.0.2.77"
SALT = bytes(range(32))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[world.Node]:
    made = world.Node.boot(tmp_path)
    yield made
    made.journal.close()


def prune(node: world.Node, minimum: int, reason: str = "x") -> int:
    return node.journal.prune(*node.leaf(entry.Prune(minimum=minimum, reason=reason, retention_days=0)))


def erase(node: world.Node, *indices: int, reason: str = "asked") -> int:
    """Erase the clear texts of these entries."""
    named = tuple(str(node.journal.entry(i).commitment) for i in indices)
    leaf, opening = node.leaf(entry.Erase(commitments=named, reason=reason))
    index = node.journal.erase(leaf, opening, indices=indices)
    node.journal.forget()
    return index


def on_disk(node: world.Node) -> bytes:
    return b"".join(f.read_bytes() for f in node.journal.path.parent.glob("journal.db*"))


def with_secrets(receipt: Receipt) -> Receipt:
    """The receipt of somebody's command line and address."""
    action = receipt.actions[0].model_copy(update={"detail": {"cmdline": SECRET}, "args": {"host": ADDRESS}})
    inputs = receipt.inputs.model_copy(update={"fields": {"address": ADDRESS, "comm": SECRET}})
    return receipt.model_copy(update={"actions": (action,), "inputs": inputs})


def test_a_commitment_opens_with_its_text_and_salt_only() -> None:
    made = commit(SECRET, SALT)
    assert opens(made, SECRET, SALT)
    assert not opens(made, SECRET + " ", SALT)
    assert not opens(made, SECRET, bytes(32))
    assert not opens(made, SECRET, b"short")


BODIES: list[entry.Body] = [
    entry.Intent(action="open_circuit", target=ADDRESS, args={"address": ADDRESS}, grant=f"open_circuit:{ADDRESS}"),
    entry.Intent(action="recreate", target="api", args={"cmd": SECRET}, grant="recreate:api"),
    entry.Intent(action="open_circuit", target=ADDRESS, args={}, grant="operator"),
    entry.OutcomeBody(
        action="kill_connections",
        target=ADDRESS,
        outcome="applied",
        detail={"a": SECRET},
        postcondition=SECRET,
        undo="u",
    ),
    entry.OutcomeBody(action="nonsense", target=ADDRESS, outcome="failed", detail={}, postcondition="", undo=None),
    entry.Refusal(check="guard.never-touch", what=f"open_circuit {ADDRESS}", want=SECRET, got=ADDRESS, hint=SECRET),
    entry.Config(what="disarmed", detail={"reason": SECRET, "more": [ADDRESS, {"a": ADDRESS}]}),
    entry.ProposalBody(id="p-1", name="n", sha256="a" * 64, author=SECRET, state="submitted", checks={"a": "pass"}),
    entry.Prune(minimum=3, reason=SECRET, retention_days=400),
    entry.Erase(commitments=("b" * 64,), reason=SECRET, below=4),
]


def parts(body: entry.Body) -> tuple[bytes, Opening]:
    payload, opening = entry.sealed(body, at=world.NOW, ktime_ns=1, epoch=EPOCH.id, salt=SALT)
    assert opening is not None
    return EPOCH.sign(payload), opening


EPOCH = world.EpochKeys.generate()


@pytest.mark.parametrize("body", BODIES, ids=lambda b: type(b).__name__)
def test_nothing_personal_is_in_the_leaf_and_the_opening_gives_it_back(body: entry.Body) -> None:
    leaf, opening = parts(body)
    payload = dsse.parse(leaf).payload
    assert SECRET.encode() not in payload
    assert ADDRESS.encode() not in payload
    opened = entry.parse_entry(3, leaf, opening)
    assert opened.typed() == body
    assert opened.subject_holds
    assert not opened.closed
    closed = entry.parse_entry(3, leaf)
    assert closed.closed
    assert closed.subject_holds
    assert SECRET not in json.dumps(dict(closed.body))
    assert ADDRESS not in json.dumps(dict(closed.body))
    assert type(closed.typed()) is type(body)
    assert Opening.parse(opening.encode()) == opening


def test_the_entry_kinds_without_a_seal_hold_no_free_text() -> None:
    free = set(entry.BODIES) - sealing.SEALED_KINDS
    assert free == {"epoch-open", "lost", "access", "epoch-close"}


def test_a_service_is_public_and_an_address_is_not() -> None:
    assert [sealing.personal(action) for action in ("recreate", "isolate", "notify", "kill")] == [False] * 4
    assert {a for a in ACTIONS if sealing.personal(a)} == {"open_circuit", "close_circuit", "kill_connections"}
    assert sealing.personal("an action that a module invented")


def test_a_receipt_is_sealed_and_opens_whole(node: world.Node) -> None:
    run = node.run(0, with_secrets)
    found = node.journal.receipt(run)
    assert found.receipt().inputs.fields["comm"] == SECRET
    payload = dsse.parse(found.raw).payload
    values = [str(v).encode() for v in found.receipt().inputs.values if v > 100_000]
    assert values
    assert not any(word in payload for word in (SECRET.encode(), ADDRESS.encode(), *values))
    closed = found.without_opening().receipt()
    assert (closed.inputs.values, closed.inputs.fields, closed.runbook.signers) == ((), {}, ())
    assert [(a.action, a.target, a.detail, a.guard.why) for a in closed.actions] == [
        ("recreate", "service/web", {}, HIDDEN)
    ]


def test_whatever_the_recorder_writes_is_sealed(node: world.Node) -> None:
    recorder = Recorder(node.journal)
    recorder._keys = node.keys
    for body in BODIES:
        if not isinstance(body, entry.Prune | entry.Erase):  # these have calls of their own
            assert node.journal.entry(recorder.record(body)).typed() == body
    index = recorder.receipt(with_secrets(world.unsigned_receipt(node.keys.id)))
    assert node.journal.entry(index).receipt().inputs.fields["comm"] == SECRET
    recorder.checkpoint(force=True)
    erased = recorder.erase([node.journal.entry(index)], SECRET)
    pruned = recorder.prune(1, SECRET, 400)
    assert [node.journal.entry(i).body["reason"] for i in (erased, pruned)] == [SECRET, SECRET]
    leaves = b"".join(dsse.parse(e.raw).payload for e in node.journal.entries())
    assert SECRET.encode() not in leaves
    assert ADDRESS.encode() not in leaves


def test_the_recorder_files_each_entry_under_what_its_leaf_says(node: world.Node) -> None:
    recorder = Recorder(node.journal)
    recorder._keys = node.keys
    receipt = world.unsigned_receipt(node.keys.id)
    for body in BODIES:
        if not isinstance(body, entry.Prune | entry.Erase):
            recorder.record(body, receipt.run.id)
            recorder.record(body)
            recorder.submit(body, receipt.run.id)
    recorder.receipt(receipt)
    said = {e.index: entry.outline(e.raw) for e in node.journal.entries()}
    for kind in entry.KINDS:
        of_kind = [index for index, (found, _) in said.items() if found == kind]
        assert [e.index for e in node.journal.entries(kind=kind)] == of_kind
    of_run = [index for index, (_, run) in said.items() if run == receipt.run.id]
    assert [e.index for e in node.journal.entries(run=receipt.run.id)] == of_run
    assert len(of_run) > len(BODIES)


def test_the_same_text_has_another_commitment_each_time(node: world.Node) -> None:
    first, second = (node.append(entry.Config(what="w", detail={"t": SECRET})) for _ in range(2))
    assert node.journal.entry(first).commitment != node.journal.entry(second).commitment
    assert node.journal.entry(first).subject != node.journal.entry(second).subject


@pytest.mark.parametrize("body", BODIES, ids=lambda b: type(b).__name__)
def test_another_opening_is_refused(body: entry.Body) -> None:
    leaf, opening = parts(body)
    wrong = [replace(opening, salt=bytes(32)), replace(opening, text=opening.text + " "), replace(opening, text="{}")]
    for other in wrong:
        with pytest.raises(MalformedError) as error:
            entry.parse_entry(3, leaf, other)
        assert error.value.id == "entry.opening"


def signed(body: dict[str, Any], kind: str = "config") -> bytes:
    """An entry with any body, signed by its epoch."""
    predicate = {
        "kind": kind,
        "at": "2026-11-23T00:00:00.000000Z",
        "ktime_ns": "1",
        "epoch": EPOCH.id,
        "run": None,
        "body": body,
    }
    form = entry.Statement(entry.ENTRY_TYPE, f"entry/{kind}", "a" * 64, predicate)
    return EPOCH.sign(entry.statement.encode(form))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("config", {"what": "w", "detail": {}, "sealed": "a" * 64}),
        ("config", {"what": "w", "sealed": "A" * 64}),
        ("config", {"what": "w", "sealed": 7}),
        ("config", {"what": "w", "sealed": ["a"]}),
        ("config", {"sealed": "a" * 64}),
        ("lost", {"sensor": "s", "count": 1, "sealed": "a" * 64}),
        ("intent", {"action": "recreate", "grant": "g", "sealed": "a" * 64}),
        ("intent", {"action": "open_circuit", "target": ADDRESS, "grant": "operator", "sealed": "a" * 64}),
        ("intent", {"action": ["x"], "grant": "operator", "sealed": "a" * 64}),
        ("refusal", {"check": "c", "what": "", "sealed": "a" * 64}),
    ],
)
def test_a_leaf_that_is_half_in_clear_is_refused(kind: str, body: dict[str, Any]) -> None:
    with pytest.raises(MalformedError) as error:
        entry.parse_entry(0, signed(body, kind))
    assert error.value.id in ("entry.opening", "entry.form")


def test_an_entry_in_clear_takes_no_opening() -> None:
    body = entry.Config(what="w", detail={})
    leaf = EPOCH.sign(entry.payload(body, at=world.NOW, ktime_ns=1, epoch=EPOCH.id))
    assert entry.parse_entry(0, leaf).typed() == body
    with pytest.raises(MalformedError) as error:
        entry.parse_entry(0, leaf, Opening(SALT, "{}"))
    assert error.value.id == "entry.opening"


TREES = st.recursive(
    st.none() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["what", "detail", "sealed", "inputs", "actions"]), TREES, max_size=4))
def test_any_sealed_body_is_read_or_refused(body: dict[str, Any]) -> None:
    for kind in sealing.SEALED_KINDS:
        with contextlib.suppress(MalformedError):  # and nothing else
            assert HIDDEN in json.dumps(sealing.unseal(kind, {**body, "sealed": "a" * 64}, None)) or kind == "config"


@given(st.binary(max_size=120))
def test_any_bytes_are_an_opening_or_refused(raw: bytes) -> None:
    with pytest.raises(MalformedError) as error:
        Opening.parse(raw)
    assert error.value.id == "entry.opening"


def test_every_changed_bit_of_an_opening_is_refused() -> None:
    leaf, opening = parts(BODIES[0])
    raw = opening.encode()
    for bit in range(8 * len(raw)):
        spoiled = bytearray(raw)
        spoiled[bit // 8] ^= 1 << bit % 8
        with pytest.raises(MalformedError):
            entry.parse_entry(3, leaf, Opening.parse(bytes(spoiled)))


def test_an_erased_text_is_gone_and_the_log_whole(node: world.Node) -> None:
    run = node.run(0, with_secrets)
    members = [e.index for e in node.journal.entries(run=run)]
    salts = [e.opening.salt for e in node.journal.entries(run=run) if e.opening]
    node.checkpoint()
    before = node.journal.tree().root(4)
    kept = export(node.journal, run)
    assert b"hunter2" in on_disk(node)
    by = erase(node, *members, reason=SECRET)
    assert erase_reason(node, by) == SECRET
    erase(node, by)  # the reason of an erasure is personal too
    node.checkpoint()
    assert b"hunter2" not in on_disk(node)
    assert not any(salt in on_disk(node) for salt in salts)
    assert check_journal(node.journal).passed
    assert node.journal.tree().root(4) == before
    assert verify_pack(kept, trust=world.trust(), in_process=True).passed
    assert all(node.journal.entry(i).closed for i in members)
    assert node.journal.receipt(run).receipt().actions[0].outcome == "applied"


def erase_reason(node: world.Node, index: int) -> str:
    return str(node.journal.entry(index).body["reason"])


def test_a_pack_of_an_erased_run_verifies_and_says_so(node: world.Node) -> None:
    run = node.run(0, with_secrets)
    other = node.run(1)
    by = erase(node, *(e.index for e in node.journal.entries(run=run)))
    node.checkpoint()
    pack = Pack.of(export(node.journal, run).files())
    verdict = verify_pack(pack, trust=world.trust(), in_process=True)
    assert verdict.passed
    listed = {c.id: c for c in verdict.checks}
    assert f"by entry {by}" in listed["entry.erased"].observed
    assert {listed[i].outcome for i in ("entry.erased", "receipt.replay", "receipt.signers")} == {"not-checked"}
    entries = {i: raw for i, raw in pack.entries.items() if i != by}
    proofs, openings = ({i: raw for i, raw in m.items() if i != by} for m in (pack.proofs, pack.openings))
    without = replace(pack, entries=entries, proofs=proofs, openings=openings)
    failed = verify_pack(without, trust=world.trust(), in_process=True).failed
    assert [c.id for c in failed] == ["entry.opening"]
    assert "entry.erased" not in {c.id for c in verify_pack(export(node.journal, other), trust=world.trust()).checks}


def test_an_erased_run_is_neither_identical_nor_different(node: world.Node) -> None:
    runs = [node.run(n) for n in range(3)]
    erase(node, *(e.index for e in node.journal.entries(run=runs[1])))
    found = list(replay_all(node.journal.runs(), node.journal.blob))
    assert [(r.identical, r.different, r.erased) for r in found] == [
        (True, False, False),
        (False, False, True),
        (True, False, False),
    ]


def test_everything_below_an_index_is_erased_by_one_entry(node: world.Node) -> None:
    for number in range(3):
        node.run(number)
    leaf, opening = node.leaf(entry.Erase(commitments=(), reason="400 days", below=7))
    node.journal.erase(leaf, opening)
    node.checkpoint()
    assert [e.closed for e in node.journal.entries(start=1)] == [True] * 6 + [False] * 4
    assert check_journal(node.journal).passed


def test_a_text_that_vanishes_without_an_entry_is_found(node: world.Node) -> None:
    node.run(0)
    node.checkpoint()
    node.journal.close()
    change(node.journal.path, "update entry set salt = null, text = null where i = 2")
    again = Journal.open(node.journal.path, origin=world.ORIGIN)
    (failed,) = check_journal(again).failed
    assert (failed.id, "entry 2" in failed.observed) == ("journal.openings", True)
    again.close()


def test_a_changed_text_is_found(node: world.Node) -> None:
    index = node.append(entry.Config(what="cmdline", detail={"text": SECRET}))
    node.journal.close()
    change(node.journal.path, "update entry set text = '{\"detail\":{}}' where text is not null")
    again = Journal.open(node.journal.path, origin=world.ORIGIN)
    with pytest.raises(DamagedError) as error:
        again.entry(index)
    assert f"the clear text of entry {index}" in error.value.message
    assert not check_journal(again).passed
    again.close()


def test_a_text_beside_an_entry_without_a_seal_is_found(node: world.Node) -> None:
    node.checkpoint()
    node.journal.close()
    change(node.journal.path, f"update entry set salt = x'{'00' * 32}', text = '{{}}' where i = 0")
    again = Journal.open(node.journal.path, origin=world.ORIGIN)
    assert not check_journal(again).passed
    again.close()


def test_a_text_beside_a_pruned_entry_is_found(node: world.Node) -> None:
    node.run(0)
    node.checkpoint()
    prune(node, 4)
    node.journal.close()
    change(node.journal.path, f"update entry set salt = x'{'00' * 32}', text = '{{}}' where i = 2")
    again = Journal.open(node.journal.path, origin=world.ORIGIN)
    assert [c.id for c in check_journal(again).failed] == ["journal.openings"]
    again.close()


def test_a_journal_of_the_first_schema_is_migrated_and_its_entries_in_clear_stay_valid(tmp_path: Path) -> None:
    old = tmp_path / "old"
    with sqlite3.connect(old) as db:
        db.executescript(MIGRATIONS[0])
        db.execute("pragma user_version = 1")
        db.execute(f"pragma application_id = {APPLICATION_ID}")
        db.execute("insert into meta values ('origin', ?), ('minimum', '0')", (world.ORIGIN,))
        for i in range(3):
            body = entry.Config(what="w", detail={"n": i})
            leaf = EPOCH.sign(entry.payload(body, at=world.NOW, ktime_ns=i, epoch=EPOCH.id))
            db.execute("insert into entry values (?, ?, 'config', null, ?)", (i, leaf_hash(leaf), leaf))
    db.close()
    with pytest.raises(JournalError) as error:
        JournalReader.open(old)
    assert error.value.id == "journal.schema"
    migrated = Journal.open(old, origin=world.ORIGIN)
    assert [e.body["detail"]["n"] for e in migrated.entries()] == [0, 1, 2]
    assert not any(e.closed for e in migrated.entries())
    leaf, opening = parts(entry.Config(what="w", detail={"n": 3}))
    assert migrated.append(leaf, opening) == 3
    assert migrated.entry(3).body["detail"] == {"n": 3}
    migrated.close()


def test_a_reader_that_holds_old_pages_is_named_and_nothing_is_lost(
    node: world.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pointcall_executor.journal.FORGET_S", 0.2)
    node.run(0, with_secrets)
    holding = sqlite3.connect(node.journal.path, isolation_level=None)
    holding.execute("begin")
    holding.execute("select count(*) from entry").fetchone()
    with pytest.raises(JournalError) as error:
        erase(node, 3)
    assert error.value.id == "journal.readers"
    assert node.journal.entry(3).closed
    holding.close()
    node.journal.forget()
    assert ADDRESS.encode() not in on_disk(node)
    node.append(entry.Lost(sensor="s", count=1))


def test_pruning_keeps_hashes_and_proofs(node: world.Node, tmp_path: Path) -> None:
    early, late = node.run(0, with_secrets), node.run(1)
    node.checkpoint()
    kept = export(node.journal, early)
    extend(tmp_path / "tiles", node.journal)
    root = node.journal.tree().root(7)
    prune(node, 4)
    node.journal.forget()
    node.checkpoint()
    assert b"hunter2" not in on_disk(node)
    assert node.journal.minimum == 4
    assert node.journal.tree().root(7) == root
    assert [e.index for e in node.journal.entries()] == [0, 4, 5, 6, 7]
    for call in (lambda: node.journal.entry(2), lambda: extend(tmp_path / "new", node.journal)):
        with pytest.raises(JournalError) as error:
            call()
        assert error.value.id == "journal.pruned"
    assert check_journal(node.journal).passed
    for pack in (kept, export(node.journal, late)):
        assert verify_pack(pack, trust=world.trust(), in_process=True).passed
    node.journal.close()
    Journal.open(node.journal.path, origin=world.ORIGIN).close()


def test_everything_may_be_pruned_but_not_more(node: world.Node) -> None:
    node.run(0)
    node.checkpoint()
    with pytest.raises(JournalError) as error:
        prune(node, 5)
    assert error.value.id == "journal.prune"
    prune(node, 4)
    with pytest.raises(JournalError) as error:
        prune(node, 1)
    assert error.value.id == "journal.prune"
    assert check_journal(node.journal).passed


@pytest.mark.parametrize("index", [0, 4, 6])
def test_an_emptied_entry_is_no_pruned_one(index: int, node: world.Node) -> None:
    node.run(0)
    node.run(1)
    node.checkpoint()
    prune(node, 4)
    node.journal.close()
    change(node.journal.path, f"update entry set raw = x'' where i = {index}")
    with pytest.raises(DamagedError) as error:
        Journal.open(node.journal.path, origin=world.ORIGIN)
    assert f"entry {index}" in error.value.message
