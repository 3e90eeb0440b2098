"""Reports: what is counted, what is proved, and that each wrong thing is found by its own check."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from pointcall_attest import entry
from pointcall_attest.entry import Entry, parse_entry
from pointcall_attest.errors import MalformedError
from pointcall_attest.report import Known, Report, build, controls
from pointcall_attest.report.queries import QUERIES
from pointcall_attest.verdict import Verdict
from tests.unit.report.sample_log import CHECKED, SampleLog, digest


def appraised(log: SampleLog) -> Known:
    """As if the maker of the report had come to the same verdict as the node."""
    return Known(appraisals={e.index: log.verdict for e in log.log if e.kind == "epoch-open"})


def report(log: SampleLog, known: Known | None = None) -> Report:
    return build(log.log, log.checkpoint(), now=log.now, known=known or appraised(log))


def full_log() -> SampleLog:
    log = SampleLog()
    log.recover()
    log.refuse()
    log.append(entry.Access(role="agent", method="pointcall.v1.Runs/ListRuns", count=12))
    log.append(
        entry.ProposalBody(
            id="p-0", name="n", sha256=digest("s"), author="a", state="open", checks={"proposal.text": "pass"}
        )
    )
    log.next_epoch()
    log.recover()
    return log


def failed(made: Report) -> list[str]:
    return [c.id for c in made.verdict.failed]


def answer(made: Report, id: str) -> tuple[str, int, int]:
    (found,) = [a for a in made.answers if a.id == id]
    return found.standing, found.passing, found.population


def test_a_good_log_is_proved_complete() -> None:
    log = full_log()
    made = report(log)
    assert made.verdict.passed
    assert not made.verdict.not_checked
    assert made.complete
    assert made.population.tree_size == len(log.log) == sum(made.population.kinds.values())
    assert made.population.root == log.checkpoint().root.hex()


def test_what_was_written_after_the_checkpoint_is_counted_and_left_out() -> None:
    log = SampleLog()
    log.recover()
    head = log.checkpoint()
    log.recover()
    made = build(log.log, head, now=log.now)
    assert made.verdict.passed
    assert (len(made.runs), made.population.later) == (1, 3)


def test_without_a_checkpoint_nothing_is_proved_and_it_says_so() -> None:
    log = SampleLog()
    made = build(log.log, None, now=log.now)
    assert {c.id for c in made.verdict.not_checked} == {
        "report.population",
        "report.root",
        "report.checkpoint",
        "report.evidence",
    }
    assert not made.complete
    assert answer(made, "log.complete")[0] == "no-data"


def test_an_empty_log_is_a_report_too() -> None:
    log = SampleLog(open_epoch=False)
    made = build([], None, now=log.now)
    assert (made.runs, made.epochs, made.tier) == ((), (), "none")
    assert all(a.standing == "no-data" for a in made.answers)


def _without(index: int) -> Callable[[SampleLog], list[Entry]]:
    return lambda log: [e for e in log.log if e.index != index]


def _flipped(log: SampleLog) -> list[Entry]:
    """One entry with another signature of the same form."""
    other = SampleLog()
    last = log.log[-1]
    forged = dataclasses.replace(other.recover(), index=last.index, epoch=last.epoch)
    return [*log.log[:-1], forged]


def _swapped(log: SampleLog) -> list[Entry]:
    entries = list(log.log)
    entries[1], entries[2] = entries[2], entries[1]
    return entries


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_without(4), ["report.population", "report.root"]),
        (_swapped, ["report.population", "report.root"]),
        (_flipped, ["report.root", "report.signatures"]),
    ],
    ids=["one entry removed", "two entries swapped", "one entry forged"],
)
def test_each_change_is_found(change: Callable[[SampleLog], list[Entry]], found: list[str]) -> None:
    log = full_log()
    assert failed(build(change(log), log.checkpoint(), now=log.now)) == found


def test_entries_cut_off_at_the_end_are_missed() -> None:
    log = full_log()
    assert failed(build(log.log[:-1], log.checkpoint(), now=log.now)) == ["report.population", "report.root"]


def test_a_checkpoint_of_another_log_is_found() -> None:
    log, other = SampleLog(), SampleLog()
    made = build(log.log, other.checkpoint(), now=log.now)
    assert "report.checkpoint" in failed(made)


def test_a_body_that_is_not_what_the_subject_says_is_unsigned() -> None:
    log = full_log()
    wrong = dataclasses.replace(log.log[4], subject="0" * 64)
    made = build([*log.log[:4], wrong, *log.log[5:]], log.checkpoint(), now=log.now)
    assert failed(made) == ["report.signatures"]
    assert answer(made, "log.signed")[0] == "not-satisfied"


def test_a_key_that_nobody_vouched_for_is_found() -> None:
    log = SampleLog()
    log.open_epoch(previous=digest("some other key"))
    assert failed(report(log)) == ["report.epochs"]


def test_a_run_of_an_earlier_epoch_without_receipt_is_found() -> None:
    log = SampleLog()
    intent = log.append(entry.Intent(action="recreate", target="db", args={}, grant="g"), "0" * 26)
    assert failed(report(log)) == []  # it may still go on
    log.next_epoch()
    made = report(log)
    assert failed(made) == ["report.receipts"]
    assert str(intent.index) in made.verdict.failed[0].observed


@pytest.mark.parametrize(("outcome", "later", "found"), [
    ("unconfirmed", True, []), ("applied", True, ["report.receipts"]), ("unconfirmed", False, ["report.receipts"]),
])  # fmt: skip
def test_a_run_that_was_cut_off_is_closed_by_a_later_epoch(outcome: Any, later: bool, found: list[str]) -> None:
    log = SampleLog()
    run = "0" * 26
    log.append(entry.Intent(action="recreate", target="db", args={}, grant="g"), run)
    if later:
        log.next_epoch()
    body = entry.OutcomeBody(
        action="recreate", target="db", outcome=outcome, detail={}, postcondition="", undo=None
    )  # fmt: skip
    log.append(body, run)
    log.next_epoch()
    made = report(log)
    assert failed(made) == found
    if not found:
        (check,) = [c for c in made.verdict.checks if c.id == "report.receipts"]
        assert "1 cut off" in check.observed


@pytest.mark.parametrize(("grant", "found"), [("operator", []), ("manifest", []), ("recreate:db", ["report.receipts"])])
def test_only_what_a_runbook_decided_needs_a_receipt(grant: str, found: list[str]) -> None:
    log = SampleLog()
    log.append(entry.Intent(action="recreate", target="db", args={}, grant=grant), None)
    log.next_epoch()
    assert failed(report(log)) == found


def test_the_weakest_tier_is_shown() -> None:
    assert report(SampleLog(tier="hardware"), Known()).tier == "hardware"
    assert report(SampleLog(tier="emulated"), Known()).tier == "emulated"


def test_the_same_log_gives_the_same_report() -> None:
    log = full_log()
    one, other = report(log), report(log)
    assert one == other
    assert json.dumps(one.as_dict()) == json.dumps(other.as_dict())


def test_latencies_are_nearest_rank() -> None:
    log = SampleLog()
    for _ in range(4):
        log.recover()
    (decided,) = [x for x in report(log).latencies if x.name == "event to decided"]
    assert (decided.n, decided.p50_ns, decided.p99_ns) == (4, 48_000, 48_000)


def _lost(log: SampleLog) -> None:
    log.append(entry.Lost(sensor="breaker", count=3))


def _failing_run(log: SampleLog) -> None:
    log.recover(outcome="failed", confirmed=False)


def _unintended(log: SampleLog) -> None:
    log.recover(intent=False)


@pytest.mark.parametrize(
    ("query", "prepare", "standing"),
    [
        ("log.complete", None, "satisfied"),
        ("log.signed", None, "satisfied"),
        ("log.witnessed", None, "no-data"),
        ("epochs.vouched", None, "satisfied"),
        ("epochs.hardware", None, "not-satisfied"),
        ("runs.received", None, "satisfied"),
        ("runs.attested", None, "satisfied"),
        ("runs.signed", None, "satisfied"),
        ("runs.content", None, "satisfied"),
        ("runs.timed", None, "satisfied"),
        ("runs.replayed", None, "no-data"),
        ("actions.guarded", None, "satisfied"),
        ("actions.intended", None, "satisfied"),
        ("actions.intended", _unintended, "not-satisfied"),
        ("recovery.confirmed", None, "satisfied"),
        ("recovery.confirmed", _failing_run, "not-satisfied"),
        ("recovery.recreated", None, "satisfied"),
        ("recovery.recreated", _failing_run, "not-satisfied"),
        ("refusals.reasoned", None, "satisfied"),
        ("loss.none", None, "satisfied"),
        ("loss.none", _lost, "not-satisfied"),
        ("access.recorded", None, "satisfied"),
        ("proposals.checked", None, "satisfied"),
    ],
)
def test_each_question_has_its_answer(query: str, prepare: Callable[[SampleLog], None] | None, standing: str) -> None:
    log = full_log()
    if prepare is not None:
        prepare(log)
    assert answer(report(log), query)[0] == standing


def test_every_question_is_tested_above() -> None:
    marks = test_each_question_has_its_answer.pytestmark  # type: ignore[attr-defined]
    assert {row[0] for row in marks[0].args[1]} == set(QUERIES)


def test_replays_count_when_they_were_made() -> None:
    log = SampleLog()
    good, bad = log.recover(), log.recover()
    made = report(log, Known(replays={str(good.run): True, str(bad.run): False}))
    assert answer(made, "runs.replayed") == ("not-satisfied", 1, 2)
    assert [r.replayed for r in made.runs] == [True, False]


def test_runs_under_a_rejected_verdict_are_not_attested() -> None:
    rejected = Verdict((dataclasses.replace(CHECKED.checks[0], outcome="fail"),), "emulated", "snp")
    log = SampleLog(verdict=rejected)
    log.recover()
    made = report(log)
    assert answer(made, "runs.attested")[0] == "not-satisfied"
    assert failed(made) == ["report.evidence"]


def test_what_the_node_says_of_its_own_evidence_answers_nothing() -> None:
    log = SampleLog(tier="hardware", verdict=dataclasses.replace(CHECKED, tier="hardware"))
    log.recover()
    made = report(log, Known())
    assert not made.appraised
    assert [c.id for c in made.verdict.not_checked] == ["report.evidence"]
    assert {answer(made, q)[0] for q in ("runs.attested", "epochs.hardware")} == {"no-data"}


def test_a_tier_other_than_the_one_stated_is_found() -> None:
    log = SampleLog(tier="hardware", verdict=CHECKED)
    made = report(log)
    assert failed(made) == ["report.evidence"]
    assert made.tier == "emulated"


def test_hardware_evidence_answers_the_boot_control() -> None:
    log = SampleLog(tier="hardware", verdict=dataclasses.replace(CHECKED, tier="hardware"))
    log.recover()
    standing = {c.id: c.standing for f in report(log).frameworks for c in f.controls}
    assert standing["SI-7(9)"] == "satisfied"


def test_a_guard_refusal_is_in_its_run() -> None:
    log = SampleLog()
    log.recover(refused_by="guard.rate")
    made = report(log)
    (run,) = made.runs
    assert (run.result, run.actions[0].check, run.steps[3].since_event_ns) == ("refused", "guard.rate", None)
    assert answer(made, "actions.guarded")[0] == "satisfied"


class TestControls:
    def test_the_shipped_mapping_names_only_known_questions(self) -> None:
        frameworks = controls.shipped()
        assert len(frameworks) >= 5
        for framework in frameworks:
            ids = [c.id for c in framework.controls]
            assert len(ids) == len(set(ids))

    def test_nothing_unverified_is_shown_as_read(self) -> None:
        for framework in controls.shipped():
            if not framework.read:
                assert all(not c.read for c in framework.controls)

    @pytest.mark.parametrize(
        ("standings", "expected"),
        [
            ({"satisfied"}, "satisfied"),
            ({"satisfied", "no-data"}, "no-data"),
            ({"satisfied", "not-satisfied", "no-data"}, "not-satisfied"),
            (set(), "no-data"),
        ],
    )
    def test_the_weakest_answer_decides(self, standings: set[str], expected: str) -> None:
        assert controls._standing(standings) == expected  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "raw",
        [
            b"\xff",
            b"x = 1",
            b"[[framework]]\nname = 'a'",
            b"[[framework]]\nname='a'\nsource='s'\nread=true\ncontrols=[{id='x',title='t',queries=['no.such']}]",
            b"[[framework]]\nname='a'\nsource='s'\nread=1\ncontrols=[]",
            b"[" * 5_000,
            b"#" * (controls.MAX_MAPPING_BYTES + 1),
        ],
        ids=range(7),
    )
    def test_another_form_is_refused(self, raw: bytes) -> None:
        with pytest.raises(MalformedError) as refusal:
            controls.parse(raw)
        assert refusal.value.id == "report.mapping"

    def test_a_user_s_mapping_takes_the_place_of_ours(self) -> None:
        own = controls.parse(
            b"[[framework]]\nname='Ours'\nsource='s'\nread=true\ncontrols=[{id='1',title='t',queries=['log.signed']}]"
        )
        log = SampleLog()
        (framework,) = build(log.log, log.checkpoint(), now=log.now, frameworks=own).frameworks
        assert [(c.id, c.standing) for c in framework.controls] == [("1", "satisfied")]


def test_an_entry_survives_being_parsed_again() -> None:
    made = SampleLog().recover()
    assert parse_entry(made.index, made.raw) == made


def test_the_time_of_making_changes_nothing_else() -> None:
    log = full_log()
    one = report(log)
    other = build(log.log, log.checkpoint(), now=log.now + timedelta(days=1), known=appraised(log))
    assert dataclasses.replace(one, made="") == dataclasses.replace(other, made="")
