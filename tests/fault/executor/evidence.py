"""After a kill and a restart: the log against the truth. Nothing that was promised is lost, nothing was done twice.

The log is read as an auditor reads it (pointcall_attest and the journal's own check); the truth is what labels.py wrote
when something happened in the world.
"""

from __future__ import annotations

import collections
import contextlib
import json
from pathlib import Path
from typing import Any

from pointcall_attest.entry import Entry
from pointcall_executor.actions import KERNEL_LEASES, WITHOUT_INTENT
from pointcall_executor.journal import JournalReader
from pointcall_executor.journal_check import check_journal

RECREATE = "recreate"


def truth_of(state: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (state / "truth.jsonl").read_text().splitlines()]


def entries_of(state: Path) -> list[Entry]:
    with contextlib.closing(JournalReader.open(state / "journal.db")) as journal:
        return journal.entries(limit=10_000)


def objections(state: Path) -> list[str]:
    """What is wrong with the log of this folder; empty if nothing is."""
    with contextlib.closing(JournalReader.open(state / "journal.db")) as journal:
        found = [f"{check.id}: {check.observed}" for check in check_journal(journal).failed]
    entries, truth = entries_of(state), truth_of(state)
    return found + _balance(entries) + _receipts(entries, truth) + _begun(entries, truth)


def _balance(entries: list[Entry]) -> list[str]:
    """Every intent has exactly one outcome."""
    left: collections.Counter[tuple[str | None, str, str]] = collections.Counter()
    for entry in entries:
        if entry.kind in ("intent", "outcome") and entry.body["action"] not in WITHOUT_INTENT | {"remember", "again"}:
            key = (entry.run, str(entry.body["action"]), str(entry.body["target"]))
            left[key] += 1 if entry.kind == "intent" else -1
            if left[key] < 0:
                return [f"entry {entry.index}: an outcome of {key} without an intent"]
    return [f"{key}: {count} intents without outcome" for key, count in left.items() if count]


def _receipts(entries: list[Entry], truth: list[dict[str, Any]]) -> list[str]:
    """At most one of a run; whoever was told of one finds it; it says what the outcomes say."""
    wrong, by_run = [], collections.Counter(e.run for e in entries if e.kind == "receipt")
    wrong += [f"run {run} has {count} receipts" for run, count in by_run.items() if count > 1]
    for line in truth:
        if line["what"] == "told" and (entries[line["index"]].run, entries[line["index"]].kind) != (
            line["run"],
            "receipt",
        ):
            wrong.append(f"somebody was told of a receipt at {line['index']}, and it is not there")
    for entry in entries:
        if entry.kind != "receipt":
            continue
        said = sorted(
            (a.action, a.outcome) for a in entry.receipt().actions if a.outcome not in ("refused", "monitored")
        )
        kept = [e for e in entries if e.run == entry.run and e.kind == "outcome"]
        if sorted((str(e.body["action"]), str(e.body["outcome"])) for e in kept) != said:
            wrong.append(f"run {entry.run}: the receipt says {said}, the log something else")
    return wrong


def _begun(entries: list[Entry], truth: list[dict[str, Any]]) -> list[str]:
    """What needs a durable intent began after it, and once for each. A kernel lease ends by itself."""
    begun: collections.Counter[tuple[int, str]] = collections.Counter()
    wrong = []
    for line in truth:
        if line["what"] == "begin" and line["action"] not in WITHOUT_INTENT | KERNEL_LEASES:
            begun[line["pid"], line["action"]] += 1
            if begun[line["pid"], line["action"]] > line["intended"]:
                wrong.append(f"{line['action']} began before its intent was in the log")
    for name in {name for _, name in begun}:
        intents = sum(1 for e in entries if e.kind == "intent" and e.body["action"] == name and _by_runbook(e))
        total = sum(count for (_, other), count in begun.items() if other == name)
        if total > intents:
            wrong.append(f"{name} began {total} times, with {intents} intents")
    done = sum(1 for line in truth if line["what"] == "end" and line["action"] == RECREATE)
    applied = sum(
        1
        for e in entries
        if e.kind == "outcome" and e.run and (e.body["action"], e.body["outcome"]) == (RECREATE, "applied")
    )
    if applied > done:
        wrong.append(f"{applied} recreations are said to be applied, {done} were")
    return wrong


def _by_runbook(entry: Entry) -> bool:
    return entry.run is not None or entry.body["grant"] == "operator"
