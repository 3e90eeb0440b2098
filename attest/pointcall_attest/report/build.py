"""From the log to a report: entries, checkpoint and what is known about them in, one value out. No clock, no I/O.

It covers exactly the entries of the checkpoint; what was written later is counted and left out. Nothing here is
believed because it is in the log: population.py checks it first, and the verdict is part of the report.
Spec: docs/spec/report.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from pointcall_attest.entry import Entry, EpochOpen, Refusal
from pointcall_attest.log.checkpoint import Checkpoint, Verifier, cosigned_at
from pointcall_attest.manifest import Manifest
from pointcall_attest.printable import shown
from pointcall_attest.receipt import Acted, Receipt
from pointcall_attest.report.controls import Framework, judge, shipped
from pointcall_attest.report.model import (
    ActionRow,
    ArmedRow,
    ArmedRunbook,
    EpochRow,
    Latency,
    Population,
    RefusalRow,
    Report,
    RunRow,
    Step,
)
from pointcall_attest.report.population import Examined, examine
from pointcall_attest.report.queries import Facts, ask
from pointcall_attest.statement import rfc3339
from pointcall_attest.verdict import Tier, Verdict
from pointcall_runbook.vocabulary import service

NOTHING: Final = "0" * 64  # the manifest of an epoch in which nothing is armed
STEPS: Final = ("event", "received", "decided", "intent", "applied", "confirmed")


@dataclass(frozen=True)
class Known:
    """What the maker of a report knows beside the log. Everything is optional; what is missing is shown as not checked.

    `manifests`: payloads by their SHA-256, parsed. `signers`: of manifests whose signatures the maker verified.
    `appraisals`: leaf index of an epoch-open -> the maker's own verdict over its evidence. `replays`: run id -> whether
    the decision was identical. `witnesses`: whose cosignatures count.
    """

    manifests: Mapping[str, Manifest] = field(default_factory=dict)
    signers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    appraisals: Mapping[int, Verdict] = field(default_factory=dict)
    replays: Mapping[str, bool] = field(default_factory=dict)
    witnesses: tuple[Verifier, ...] = ()


def build(
    entries: Sequence[Entry],
    head: Checkpoint | None,
    *,
    now: datetime,
    known: Known | None = None,
    frameworks: Sequence[Framework] | None = None,
    pruned: Mapping[int, bytes] | None = None,
) -> Report:
    """The report over the entries that `head` covers (all of them where there is no checkpoint yet).

    `pruned` are the leaf hashes of entries that are not there any more, by index. `now` is only printed.
    The same arguments give an equal report. Never raises for what well-formed entries say.
    """
    known = known or Known()
    covered = entries if head is None else [e for e in entries if e.index < head.size]
    gone = {i: leaf for i, leaf in (pruned or {}).items() if head is not None and i < head.size}
    examined = examine(covered, head, known.appraisals, gone)
    receipts = {e.index: e.receipt() for e in covered if e.kind == "receipt"}
    facts = _facts(covered, receipts, examined, known, head)
    answers = ask(facts)
    names = {str(service(s.name).number): s.name for m in known.manifests.values() for s in m.services}
    runs = tuple(_run(i, r, known.replays, names) for i, r in receipts.items())
    epochs = tuple(_epochs(facts, known.appraisals))
    tier = _weakest(e.tier for e in epochs)
    return Report(
        node=shown(facts.of("epoch-open")[-1].body["node"]) if facts.of("epoch-open") else "",
        made=rfc3339(now),
        first=rfc3339(covered[0].at) if covered else "",
        last=rfc3339(covered[-1].at) if covered else "",
        tier=tier,
        verdict=Verdict(examined.checks, tier),
        population=_population(covered, entries, head),
        epochs=epochs,
        armed=tuple(_armed(facts, known)),
        runs=runs,
        refusals=tuple(map(_refusal, facts.of("refusal"))),
        lost=_lost(facts.of("lost")),
        latencies=tuple(_latencies(runs)),
        answers=answers,
        frameworks=judge(shipped() if frameworks is None else frameworks, answers),
    )


def _facts(
    covered: Sequence[Entry],
    receipts: Mapping[int, Receipt],
    examined: Examined,
    known: Known,
    head: Checkpoint | None,
) -> Facts:
    by_kind: dict[str, list[Entry]] = {}
    for entry in covered:
        by_kind.setdefault(entry.kind, []).append(entry)
    seen = sum(head is not None and cosigned_at(head, w) is not None for w in known.witnesses)
    accepted = {i: v.tier if v.passed else None for i, v in known.appraisals.items()}
    return Facts(covered, receipts, examined, known.replays, accepted, seen, by_kind)


def _weakest(tiers: Iterable[Tier]) -> Tier:
    """One emulated epoch makes an emulated report; without any epoch nothing is attested."""
    found = set(tiers) or {"none"}
    order: tuple[Tier, ...] = ("none", "emulated", "hardware")
    return next(t for t in order if t in found)


def _population(covered: Sequence[Entry], entries: Sequence[Entry], head: Checkpoint | None) -> Population:
    return Population(
        origin="" if head is None else head.origin,
        tree_size=0 if head is None else head.size,
        root="" if head is None else head.root.hex(),
        kinds=dict(sorted(Counter(e.kind for e in covered).items())),
        later=len(entries) - len(covered),
        checkpoint="" if head is None else head.text.decode(),
    )


def _epochs(facts: Facts, appraisals: Mapping[int, Verdict]) -> Iterable[EpochRow]:
    """Each epoch, under the maker's own verdict where there is one, else under the one that the node recorded."""
    sizes = Counter(e.epoch for e in facts.entries)
    closed = {e.epoch: rfc3339(e.at) for e in facts.of("epoch-close")}
    for entry in facts.of("epoch-open"):
        body = entry.typed()
        assert isinstance(body, EpochOpen)
        own = appraisals.get(entry.index)
        verdict = body.verdict if own is None else own.as_dict()
        yield EpochRow(
            index=entry.index,
            key=entry.epoch,
            opened=rfc3339(entry.at),
            closed=closed.get(entry.epoch, ""),
            entries=sizes[entry.epoch],
            platform=shown(body.platform),
            tier=body.tier if own is None else own.tier,
            appraised=own is not None,
            verdict=shown(str(verdict.get("verdict", "none recorded"))),
            checks=tuple(_check(c) for c in _rows(verdict.get("checks"))),
            evidence=body.evidence,
            manifest=body.manifest,
            policy=body.policy,
            trusted_root=body.trusted_root,
            sequence=body.sequence,
            executor=shown(body.executor),
        )


def _rows(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _check(row: Mapping[str, Any]) -> dict[str, str]:
    return {name: shown(str(row.get(name, ""))) for name in ("id", "outcome", "expected", "observed", "spec")}


def _armed(facts: Facts, known: Known) -> Iterable[ArmedRow]:
    """Each manifest once, in the order in which they were first armed."""
    sequences = {e.body["manifest"]: e.body["sequence"] for e in reversed(facts.of("epoch-open"))}
    for digest in dict.fromkeys(e.body["manifest"] for e in facts.of("epoch-open") if e.body["manifest"] != NOTHING):
        manifest = known.manifests.get(digest)
        stated = {
            f"{s.identity} ({s.issuer})"
            for r in facts.receipts.values()
            for s in r.runbook.signers
            if r.runbook.manifest == digest
        }
        yield ArmedRow(
            manifest=digest,
            name=manifest.name if manifest else "",
            sequence=sequences[digest],
            not_before=_instant(manifest.predicate.not_before) if manifest else "",
            expires=_instant(manifest.predicate.expires) if manifest else "",
            signers=tuple(map(shown, known.signers.get(digest) or sorted(stated))),
            signers_verified=digest in known.signers,
            runbooks=tuple(_armed_runbooks(manifest)) if manifest else tuple(_seen_runbooks(facts, digest)),
            services=tuple(s.name for s in manifest.services) if manifest else (),
        )


def _instant(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%SZ")


def _armed_runbooks(manifest: Manifest) -> Iterable[ArmedRunbook]:
    for book in manifest.runbooks:
        grants = book.grants
        targets = (*grants.services, *grants.networks, *grants.channels)
        yield ArmedRunbook(book.name, str(book.version), book.mode, book.events, grants.actions, targets)


def _seen_runbooks(facts: Facts, digest: str) -> Iterable[ArmedRunbook]:
    """Without the manifest's text, only what ran is known."""
    runs = [r for r in facts.receipts.values() if r.runbook.manifest == digest]
    for name, version in dict.fromkeys((r.runbook.name, r.runbook.version) for r in runs):
        own = [r for r in runs if (r.runbook.name, r.runbook.version) == (name, version)]
        events = tuple(dict.fromkeys(shown(r.trigger.event) for r in own))
        actions = tuple(dict.fromkeys(shown(a.action) for r in own for a in r.actions))
        yield ArmedRunbook(shown(name), shown(version), own[-1].run.mode, events, actions, ())


def _run(index: int, receipt: Receipt, replays: Mapping[str, bool], services: Mapping[str, str]) -> RunRow:
    began = receipt.timeline_ns.event
    fields = dict(receipt.inputs.fields) if receipt.inputs.values else {"inputs": "erased"}
    if fields.get("service") in services:
        fields["service"] = services[fields["service"]]
    times = ((step, getattr(receipt.timeline_ns, step)) for step in STEPS)
    return RunRow(
        index=index,
        id=receipt.run.id,
        started=rfc3339(receipt.time.started),
        mode=receipt.run.mode,
        runbook=shown(receipt.runbook.name),
        version=shown(receipt.runbook.version),
        event=shown(receipt.trigger.event),
        fields={shown(k, 64): shown(v) for k, v in fields.items()},
        steps=tuple(Step(step, None if at is None else at - began) for step, at in times),
        actions=tuple(map(_action, receipt.actions)),
        fuel_used=receipt.decision.fuel_used,
        fuel_limit=receipt.inputs.fuel_limit,
        trap=shown(receipt.decision.trap or ""),
        tier=receipt.attestation.tier,
        manifest=receipt.runbook.manifest,
        replayed=replays.get(receipt.run.id),
    )


def _action(acted: Acted) -> ActionRow:
    took = None if acted.started_ns is None or acted.ended_ns is None else acted.ended_ns - acted.started_ns
    return ActionRow(
        action=shown(acted.action),
        target=shown(acted.target),
        guard=acted.guard.outcome,
        check=shown(acted.guard.check),
        why=shown(acted.guard.why),
        outcome=acted.outcome,
        intent=acted.intent,
        took_ns=took,
    )


def _refusal(entry: Entry) -> RefusalRow:
    body = entry.typed()
    assert isinstance(body, Refusal)
    parts = (body.check, body.what, body.want, body.got, body.hint)
    return RefusalRow(entry.index, rfc3339(entry.at), *map(shown, parts))


def _lost(entries: Sequence[Entry]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for entry in entries:
        counts[shown(entry.body["sensor"])] += entry.body["count"]
    return dict(sorted(counts.items()))


def _latencies(runs: Sequence[RunRow]) -> Iterable[Latency]:
    for step in STEPS[1:]:
        times = sorted(
            s.since_event_ns for r in runs for s in r.steps if s.name == step and s.since_event_ns is not None
        )
        if times:
            yield Latency(f"event to {step}", len(times), _rank(times, 50), _rank(times, 99))


def _rank(ordered: Sequence[int], percent: int) -> int:
    """The nearest-rank percentile of ordered values."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]
