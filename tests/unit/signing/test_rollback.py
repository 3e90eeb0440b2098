"""A node that has armed a manifest refuses an older one, also after a restart: the journal remembers."""

from __future__ import annotations

from pathlib import Path

import pytest

from pointcall_attest.admission import Candidate
from pointcall_executor.journal import Journal
from pointcall_executor.journal_reader import JournalError
from tests.unit.signing.world import World, sha256, statement


def offered(world: World, path: Path, payload: bytes) -> Candidate:
    """What a freshly started node says of a manifest, with what its journal remembers."""
    with Journal.open(path, origin="node.example/log") as journal:
        highest = journal.highest_sequence("edge")
    return world.check([world.sign(payload)], highest_sequence=highest)


def arm(world: World, path: Path, payload: bytes) -> None:
    candidate = offered(world, path, payload)
    assert candidate.verdict.passed
    with Journal.open(path, origin="node.example/log") as journal:
        journal.raise_sequence("edge", candidate.manifest.sequence, candidate.manifest.sha256)


def failed(world: World, path: Path, payload: bytes) -> list[str]:
    return [check.id for check in offered(world, path, payload).verdict.failed]


def test_sequences_never_go_back(world: World, tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    first = statement(sequence=3)
    arm(world, path, first)
    second = statement(sequence=4, previous=sha256(first))
    arm(world, path, second)
    assert failed(world, path, first) == ["manifest.sequence"]
    arm(world, path, second)  # the same again, after a restart
    with pytest.raises(JournalError) as caught:
        arm(world, path, statement(sequence=4))  # another with this sequence
    assert caught.value.id == "journal.sequence"
    assert failed(world, path, statement(sequence=9, previous=None)) == []  # roll forward over what was missed
