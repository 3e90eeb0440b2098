"""Erasing and pruning: the text is gone from the disk, and every proof that was given stays valid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pointcall_attest import entry
from pointcall_attest.commitment import commit, opens
from pointcall_attest.pack import export
from pointcall_attest.pack_check import verify_pack
from pointcall_executor.journal import DamagedError, Journal, JournalError
from pointcall_executor.journal_check import check_journal
from pointcall_executor.tile_folder import extend
from tests.unit.log import world
from tests.unit.log.test_log_journal import change

SECRET = "psql -h db -U alice --password=hunter2"
SALT = bytes(range(32))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[world.Node]:
    made = world.Node.boot(tmp_path)
    yield made
    made.journal.close()


def leaf(node: world.Node, body: entry.Body) -> bytes:
    return node.keys.sign(entry.payload(body, at=world.NOW, ktime_ns=9, epoch=node.keys.id))


def test_a_commitment_opens_with_its_text_and_salt_only() -> None:
    made = commit(SECRET, SALT)
    assert opens(made, SECRET, SALT)
    assert not opens(made, SECRET + " ", SALT)
    assert not opens(made, SECRET, bytes(32))
    assert not opens(made, SECRET, b"short")


def test_an_erased_text_is_gone_and_the_log_whole(node: world.Node) -> None:
    commitment = node.journal.put_side(SECRET, SALT)
    node.append(entry.Config(what="cmdline", detail={"commitment": commitment}))
    assert node.journal.side(commitment) == SECRET
    node.journal.erase(leaf(node, entry.Erase(commitments=(commitment,), reason="asked")))
    assert node.journal.side(commitment) is None
    node.checkpoint()
    assert check_journal(node.journal).passed
    files = node.journal.path.parent.glob("journal.db*")
    assert not any(b"hunter2" in f.read_bytes() or SALT in f.read_bytes() for f in files)


def test_a_changed_text_is_found(node: world.Node) -> None:
    commitment = node.journal.put_side(SECRET, SALT)
    node.journal.close()
    change(node.journal.path, "update side set text = 'another'")
    again = Journal.open(node.journal.path, origin=world.ORIGIN)
    with pytest.raises(DamagedError):
        again.side(commitment)
    again.close()


def test_pruning_keeps_hashes_and_proofs(node: world.Node, tmp_path: Path) -> None:
    early, late = node.run(0), node.run(1)
    node.checkpoint()
    kept = export(node.journal, early)
    extend(tmp_path / "tiles", node.journal)
    root = node.journal.tree().root(7)
    node.journal.prune(leaf(node, entry.Prune(minimum=4, reason="400 days")))
    node.checkpoint()
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
        node.journal.prune(leaf(node, entry.Prune(minimum=5, reason="too much")))
    assert error.value.id == "journal.prune"
    node.journal.prune(leaf(node, entry.Prune(minimum=4, reason="all")))
    with pytest.raises(JournalError) as error:
        node.journal.prune(leaf(node, entry.Prune(minimum=1, reason="back")))
    assert error.value.id == "journal.prune"
    assert check_journal(node.journal).passed


@pytest.mark.parametrize("index", [0, 4, 6])
def test_an_emptied_entry_is_no_pruned_one(index: int, node: world.Node) -> None:
    node.run(0)
    node.run(1)
    node.checkpoint()
    node.journal.prune(leaf(node, entry.Prune(minimum=4, reason="x")))
    node.journal.close()
    change(node.journal.path, f"update entry set raw = x'' where i = {index}")
    with pytest.raises(DamagedError) as error:
        Journal.open(node.journal.path, origin=world.ORIGIN)
    assert f"entry {index}" in error.value.message
