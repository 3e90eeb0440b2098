"""Entries and receipts: what is written reads back, and each wrong part is refused."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_toto_attestation.v1.statement import Statement as InTotoStatement

from pointcall_attest import canonical, entry, run_id, statement
from pointcall_attest.errors import MalformedError
from pointcall_attest.log.tree import leaf_hash
from pointcall_attest.receipt import Receipt
from pointcall_keys.node import EpochKeys
from tests.unit.log import world

KEYS = EpochKeys.generate()
RUN = run_id.run_id(1, b"0123456789")
BODIES: list[entry.Body] = [
    entry.Intent(action="recreate", target="web", args={"grace": "1"}, grant="recreate:web"),
    entry.OutcomeBody(action="a", target="b", outcome="failed", detail={"n": 1}, postcondition="", undo=None),
    entry.Refusal(check="manifest.expires", what="manifest", want="x", got="y", hint=""),
    entry.Lost(sensor="breaker", count=3),
    entry.Config(what="mode", detail={"a": [1, None, True]}),
    entry.ProposalBody(id="1", name="n", sha256=world.HEX, author="a", state="open", checks={}),
    entry.Access(role="agent", method="ListRuns", count=1),
    entry.Prune(minimum=4, reason="400 days"),
    entry.Erase(commitments=(world.HEX,), reason="asked"),
    entry.EpochClose(reason="15 minutes", next=None),
]


def leaf(body: entry.Body, run: str | None = None, at: datetime = world.NOW) -> bytes:
    return KEYS.sign(entry.payload(body, at=at, ktime_ns=2**62, epoch=KEYS.id, run=run))


@pytest.mark.parametrize("body", BODIES, ids=lambda b: type(b).__name__)
def test_every_kind_reads_back(body: entry.Body) -> None:
    raw = leaf(body, RUN)
    found = entry.parse_entry(7, raw)
    assert found.typed() == body
    assert entry.outline(raw) == entry.outline_of(body, RUN) == (found.kind, found.run)
    assert (found.index, found.run, found.epoch, found.ktime_ns) == (7, RUN, KEYS.id, 2**62)
    assert found.leaf_hash == leaf_hash(raw)
    assert found.subject_holds


@pytest.mark.parametrize("run", [RUN, None])
@pytest.mark.parametrize("body", BODIES, ids=lambda b: type(b).__name__)
def test_the_quick_form_is_the_canonical_one(body: entry.Body, run: str | None) -> None:
    for payload in (
        entry.payload(body, at=world.NOW, ktime_ns=5, epoch=KEYS.id, run=run),
        entry.sealed(body, at=world.NOW, ktime_ns=5, epoch=KEYS.id, run=run, salt=bytes(32))[0],
    ):
        form = statement.parse(payload)
        assert statement.encode(form) == payload
        assert set(form.predicate) == {"at", "body", "epoch", "kind", "ktime_ns", "run"}


def test_what_no_reader_would_accept_is_not_written() -> None:
    deep: Any = "x"
    for _ in range(21):  # the deepest container stands at 24
        deep = [deep]
    for more in (0, 1):
        body = entry.Config(what="deep", detail={"a": deep if not more else [deep]})
        if more:
            with pytest.raises(ValueError, match="nested too deeply"):
                leaf(body)
        else:
            assert entry.parse_entry(0, leaf(body)).typed() == body
    with pytest.raises(AssertionError, match="no run id"):
        leaf(BODIES[0], 'x","more":"')


def test_every_kind_has_a_body() -> None:
    assert {type(b) for b in BODIES} | {entry.EpochOpen} == set(entry.BODIES.values())


def test_times_are_utc_with_microseconds() -> None:
    late = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=timezone(timedelta(hours=2)))
    found = entry.parse_entry(0, leaf(BODIES[0], at=late))
    assert found.at == late
    assert statement.rfc3339(late) == "2026-01-02T01:04:05.000006Z"


def spoiled(change: Any, payload: bytes | None = None) -> bytes:
    """A leaf whose statement was changed before it was signed."""
    value = json.loads(payload or entry.payload(BODIES[0], at=world.NOW, ktime_ns=1, epoch=KEYS.id, run=RUN))
    change(value)
    return KEYS.sign(canonical.dumps(value))


SPOILS = {
    "another statement type": lambda v: v.update(_type="x"),
    "another predicate type": lambda v: v.update(predicateType="x"),
    "an unknown key": lambda v: v["predicate"].update(more=1),
    "an unknown body key": lambda v: v["predicate"]["body"].update(more=1),
    "a missing body key": lambda v: v["predicate"]["body"].pop("grant"),
    "an unknown kind": lambda v: v["predicate"].update(kind="x"),
    "another kind's body": lambda v: v["predicate"].update(kind="lost"),
    "a time without zone": lambda v: v["predicate"].update(at="2026-01-01T00:00:00.000000"),
    "a day that is none": lambda v: v["predicate"].update(at="2026-02-30T00:00:00.000000Z"),
    "a number for a decimal string": lambda v: v["predicate"].update(ktime_ns=1),
    "65 bits": lambda v: v["predicate"].update(ktime_ns=str(2**64)),
    "a padded number": lambda v: v["predicate"].update(ktime_ns="01"),
    "a run id that is none": lambda v: v["predicate"].update(run="x"),
    "another epoch than the key": lambda v: v["predicate"].update(epoch="0" * 64),
    "another subject": lambda v: v["subject"][0].update(name="entry/lost"),
    "two subjects": lambda v: v["subject"].append(v["subject"][0]),
    "no subject": lambda v: v["subject"].clear(),
    "an upper-case digest": lambda v: v["subject"][0]["digest"].update(sha256="A" * 64),
}


@pytest.mark.parametrize("what", SPOILS)
def test_each_wrong_part_is_refused(what: str) -> None:
    with pytest.raises(MalformedError) as error:
        entry.parse_entry(0, spoiled(SPOILS[what]))
    assert error.value.id in ("entry.form", "statement.form")


def test_a_wrong_subject_digest_is_told_apart() -> None:
    raw = spoiled(lambda v: v["subject"][0]["digest"].update(sha256="0" * 64))
    assert not entry.parse_entry(0, raw).subject_holds


@given(st.integers(0, 2**48 - 1), st.binary(min_size=10, max_size=10))
def test_run_ids_sort_by_time_and_have_one_form(ms: int, chance: bytes) -> None:
    text = run_id.run_id(ms, chance)
    assert run_id.is_run_id(text)
    assert not run_id.is_run_id(text.lower() if text.lower() != text else text + "0")
    if ms:
        assert run_id.run_id(ms - 1, b"\xff" * 10) < text


@pytest.fixture(scope="module")
def receipt(tmp_path_factory: pytest.TempPathFactory) -> Receipt:
    node = world.Node.boot(tmp_path_factory.mktemp("node"))
    try:
        return node.journal.receipt(node.run()).receipt()
    finally:
        node.journal.close()


def test_a_receipt_reads_back(receipt: Receipt, tmp_path: Path) -> None:
    payload = receipt.payload()
    assert Receipt.parse(payload) == receipt
    assert json.loads(payload)["subject"][0]["digest"]["sha256"] == receipt.sha256()


def test_in_toto_accepts_the_statement(receipt: Receipt) -> None:
    value = json.loads(receipt.payload())
    form = InTotoStatement.copy_from_pb(_pb(value))
    form.validate()
    assert form.pb.predicate_type == "https://pointcall.dev/recovery-run/v1"


def _pb(value: dict[str, Any]) -> Any:
    from google.protobuf.json_format import ParseDict
    from in_toto_attestation.v1.statement_pb2 import Statement

    return ParseDict(value, Statement())


def test_the_subject_covers_inputs_and_decision_only(receipt: Receipt) -> None:
    later = receipt.model_copy(update={"time": receipt.time.model_copy(update={"started": datetime.now(UTC)})})
    assert later.sha256() == receipt.sha256()
    dearer = receipt.model_copy(update={"decision": receipt.decision.model_copy(update={"fuel_used": 1})})
    assert dearer.sha256() != receipt.sha256()


RECEIPT_SPOILS = {
    "an unknown key": lambda v: v["predicate"]["inputs"].update(hostcalls=0),
    "a missing key": lambda v: v["predicate"]["decision"].pop("trap"),
    "another run in the subject": lambda v: v["subject"][0].update(name="run/x"),
    "a value as a number": lambda v: v["predicate"]["inputs"].update(values=[1]),
    "a value of 65 bits": lambda v: v["predicate"]["inputs"].update(values=[str(2**63)]),
    "another abi": lambda v: v["predicate"]["inputs"].update(abi="rb2"),
    "an unknown outcome": lambda v: v["predicate"]["actions"][0].update(outcome="maybe"),
    "an unknown tier": lambda v: v["predicate"]["attestation"].update(tier="gold"),
    "nine calls": lambda v: v["predicate"]["decision"].update(calls=v["predicate"]["decision"]["calls"] * 9),
    "a true for a number": lambda v: v["predicate"]["run"].update(number=True),
}


@pytest.mark.parametrize("what", RECEIPT_SPOILS)
def test_each_wrong_part_of_a_receipt_is_refused(what: str, receipt: Receipt) -> None:
    raw = spoiled(RECEIPT_SPOILS[what], receipt.payload())
    with pytest.raises(MalformedError) as error:
        entry.parse_entry(0, raw)
    assert error.value.id == "receipt.form"
