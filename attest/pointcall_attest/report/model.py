"""The report as data: what a page and a JSON file both show. Frozen values, no behaviour beyond small sums.

Not here: how it is found out (build.py), checked (population.py), judged (controls.py) or drawn (page.py).
Spec: docs/spec/report.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from pointcall_attest.verdict import Tier, Verdict

COMPLETE: Final = frozenset({"report.population", "report.root", "report.checkpoint", "report.signatures"})
FORMAT: Final = "pointcall-report/v1"
Standing = Literal["satisfied", "not-satisfied", "no-data"]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run. `since_event_ns` is None where the step did not happen."""

    name: str
    since_event_ns: int | None


@dataclass(frozen=True, slots=True)
class ActionRow:
    """One action of a run: what was asked, whether the guard let it through, what became of it."""

    action: str
    target: str
    guard: str
    check: str
    why: str
    outcome: str
    intent: int | None
    took_ns: int | None


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run, as its receipt states it. `index` is the receipt's leaf in the log."""

    index: int
    id: str
    started: str
    mode: str
    runbook: str
    version: str
    event: str
    fields: Mapping[str, str]
    steps: tuple[Step, ...]
    actions: tuple[ActionRow, ...]
    fuel_used: int
    fuel_limit: int
    trap: str
    tier: str
    manifest: str
    replayed: bool | None

    @property
    def result(self) -> str:
        """The one word for the whole run: the worst outcome of its actions."""
        if self.trap:
            return "trapped"
        outcomes = [a.outcome for a in self.actions]
        order = ("failed", "unconfirmed", "refused", "monitored", "applied")
        return next((o for o in order if o in outcomes), "nothing to do")


@dataclass(frozen=True, slots=True)
class RefusalRow:
    """Something was not armed, not decided or not done, and why."""

    index: int
    at: str
    check: str
    what: str
    want: str
    got: str
    hint: str


@dataclass(frozen=True, slots=True)
class EpochRow:
    """One key: how long it worked, under which evidence, and the verdict over it. `appraised` is True where this report
    appraised the evidence itself, False where it repeats what the node recorded when the epoch opened."""

    index: int
    key: str
    opened: str
    closed: str
    entries: int
    platform: str
    tier: Tier
    appraised: bool
    verdict: str
    checks: tuple[Mapping[str, str], ...]
    evidence: str
    manifest: str
    policy: str
    trusted_root: str
    sequence: int
    executor: str


@dataclass(frozen=True, slots=True)
class ArmedRunbook:
    """One runbook of a manifest, with what it may do."""

    name: str
    version: str
    mode: str
    events: tuple[str, ...]
    actions: tuple[str, ...]
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ArmedRow:
    """One manifest that was armed. `signers_verified` is True where this report verified the signatures itself, False
    where it only repeats what the receipts state."""

    manifest: str
    name: str
    sequence: int
    not_before: str
    expires: str
    signers: tuple[str, ...]
    signers_verified: bool
    runbooks: tuple[ArmedRunbook, ...]
    services: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Latency:
    """Percentiles over the runs in which the step happened, nearest rank."""

    name: str
    n: int
    p50_ns: int
    p99_ns: int


@dataclass(frozen=True, slots=True)
class Answer:
    """One question put to the log: how many things it is about, how many held, and the leaves that did not."""

    id: str
    question: str
    population: int
    passing: int
    failing: tuple[int, ...]

    @property
    def standing(self) -> Standing:
        if not self.population:
            return "no-data"
        return "satisfied" if self.passing == self.population else "not-satisfied"


@dataclass(frozen=True, slots=True)
class ControlRow:
    """One control of a framework and what the log answers. `read` is False where the mapping was not compared with the
    framework's own text."""

    id: str
    title: str
    standing: Standing
    answers: tuple[str, ...]
    note: str
    read: bool


@dataclass(frozen=True, slots=True)
class FrameworkRow:
    """The controls of one framework."""

    name: str
    source: str
    controls: tuple[ControlRow, ...]


@dataclass(frozen=True, slots=True)
class Population:
    """How many entries there are, and what proves that there are no more. `later` were written after the checkpoint
    and are not in this report."""

    origin: str
    tree_size: int
    root: str
    kinds: Mapping[str, int]
    later: int
    checkpoint: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one page shows. The same entries, checkpoint and time give the same report."""

    node: str
    made: str
    first: str
    last: str
    tier: Tier
    verdict: Verdict
    population: Population
    epochs: tuple[EpochRow, ...]
    armed: tuple[ArmedRow, ...]
    runs: tuple[RunRow, ...]
    refusals: tuple[RefusalRow, ...]
    lost: Mapping[str, int]
    latencies: tuple[Latency, ...]
    answers: tuple[Answer, ...]
    frameworks: tuple[FrameworkRow, ...]
    format: str = field(default=FORMAT)

    @property
    def appraised(self) -> bool:
        """Whether the maker of the report appraised the evidence of every epoch."""
        return bool(self.epochs) and all(e.appraised for e in self.epochs)

    @property
    def complete(self) -> bool:
        """Whether it was proved that every entry of the log is here and none was changed."""
        held = {c.id for c in self.verdict.checks if c.outcome == "pass"}
        return held >= COMPLETE

    @property
    def outcomes(self) -> Mapping[str, int]:
        """How many actions ended in which way."""
        counts: dict[str, int] = {}
        for run in self.runs:
            for action in run.actions:
                counts[action.outcome] = counts.get(action.outcome, 0) + 1
        return dict(sorted(counts.items()))

    def as_dict(self) -> dict[str, Any]:
        """The JSON form: docs/spec/report.md."""
        body = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"format": body.pop("format"), **body, "complete": self.complete, "outcomes": self.outcomes}


def _plain(value: Any) -> Any:
    if isinstance(value, Verdict):
        return value.as_dict()
    if isinstance(value, Answer):
        return {**dataclasses.asdict(value), "standing": value.standing}
    if isinstance(value, RunRow):
        return {**dataclasses.asdict(value), "result": value.result}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
