"""What the API asks of the executor: one protocol, and the values that travel through it.

The daemon implements `Backend`; so do tests and the demo on recorded events. The names of the fields here are the names
of the fields in pointcall.proto (test_messages.py holds them together).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from pointcall_attest.verdict import Verdict
from pointcall_executor.agent_api.inbox import Inbox
from pointcall_executor.agent_api.recorded import Reader
from pointcall_executor.api.accesses import Access
from pointcall_executor.feed import FeedPage
from pointcall_executor.retention import Retained


@dataclass(frozen=True, slots=True)
class ArmedRunbook:
    """One runbook that is armed now. `fuel_bound` is the proven worst case of its handlers; `state` is armed, or
    quarantined after a trap; `mode` is the one in force, not the manifest's."""

    name: str
    version: str
    mode: str
    events: tuple[str, ...]
    capabilities: tuple[str, ...]
    fuel_bound: int
    state: str = "armed"


@dataclass(frozen=True, slots=True)
class ServiceState:
    """One declared service; `state` is running, stopped, or elsewhere: a cluster's, which is not asked. `health`:
    whether its declared addresses accept, as the kernel's table of listening sockets says."""

    name: str
    kind: str
    state: str
    restarts: int
    pid: int = 0
    health: str = ""


@dataclass(frozen=True, slots=True)
class CircuitState:
    """One armed destination; `refused` counts the connects that the gate turned away, with `watch_only` those that it
    would have. `left_ms`: until a forced one ends by itself, or until the next connect to an open one is a probe."""

    address: str
    port: int
    state: str
    refused: int
    service: str = ""
    left_ms: int = 0
    failures: int = 0
    opened: int = 0
    watch_only: bool = False
    protocol: str = "tcp"


@dataclass(frozen=True, slots=True)
class LogCopy:
    """How far the log has got to `name`, which is witnesses or mirror. `behind` entries are not there yet; `behind_ms`:
    since when that is so; `failures` of tries since the start; `error` of the last one, empty if it did not fail."""

    name: str
    covered: int
    behind: int
    behind_ms: int = 0
    failures: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class HeldBack:
    """A call that needs the approval of a second person; `args` are its raw arguments in decimal."""

    run: str
    index: int
    runbook: str
    action: str
    args: tuple[str, ...]
    target: str
    event: str
    age_seconds: int
    manifest_sha256: str
    node: str


@dataclass(frozen=True, slots=True)
class Called:
    """A person was called because of this run, and has not answered."""

    run: str
    code: int


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """What is armed and what happened, in one look. Times are milliseconds; ages count from the past until now."""

    node: str
    state: str
    reason: str
    executor: str
    boot_id: str
    epoch: str
    platform: str
    tier: str
    manifest: str
    sequence: int
    manifest_sha256: str
    policy_sha256: str
    expires: str
    signers: tuple[str, ...]
    runbooks: tuple[ArmedRunbook, ...]
    services: tuple[ServiceState, ...]
    circuits: tuple[CircuitState, ...]
    tree_size: int
    runs: int
    refusals: int
    lost_events: int
    ready: bool = False
    paused_left_ms: int = 0
    storm_left_ms: int = 0
    in_flight: tuple[str, ...] = ()
    epoch_age_ms: int = 0
    journal_bytes: int = 0
    signed_size: int = 0
    programs: int = 0
    checked_age_ms: int = 0
    beats: int = 0
    uptime_ms: int = 0
    copies: tuple[LogCopy, ...] = ()
    mode: str = "enforce"
    epoch_life_ms: int = 0
    evidence_left_ms: int = 0
    held_back: tuple[HeldBack, ...] = ()
    called: tuple[Called, ...] = ()


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits for a person."""

    held_back: tuple[HeldBack, ...]
    called: tuple[Called, ...]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Fresh evidence: REPORT_DATA binds manifest, policy, epoch key and the caller's nonce (docs/spec/evidence.md)."""

    bundle: bytes
    nonce: bytes
    epoch_spki: bytes
    manifest_sha256: bytes
    policy_sha256: bytes
    tier: str
    sequence: int
    checkpoint: str


@dataclass(frozen=True, slots=True)
class ArmAnswer:
    """The verdict over the offered manifest. `armed` only where it passed; otherwise the old manifest stays armed."""

    armed: bool
    manifest_sha256: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class ControlAnswer:
    """The state after a control call, and one sentence."""

    state: str
    detail: str


@dataclass(frozen=True, slots=True)
class DrillRequest:
    """A fault to rehearse. Chances are parts in a million; `service` empty means the clients behind the gate."""

    service: str
    address: str
    port: int
    protocol: str
    first: int
    refuse_ppm: int
    refuse_errno: int
    lose_ppm: int
    delay_us: int
    seed: int
    seconds: int
    kill: bool
    slow_file: str
    slow_ms: int
    reason: str


@dataclass(frozen=True, slots=True)
class DrillRun:
    """A run that happened during a drill."""

    run: str
    event: str
    runbook: str


@dataclass(frozen=True, slots=True)
class DrillReport:
    """A drill: running, or ended with what was due and what was seen."""

    id: str
    state: str
    ended_by: str = ""
    as_expected: bool = False
    expected: Mapping[str, int] = field(default_factory=dict)
    observed: Mapping[str, int] = field(default_factory=dict)
    runs: tuple[DrillRun, ...] = ()


class Backend(Protocol):
    """The executor as the API sees it. Every method may be called from several threads at once.

    Errors: a subclass of PointcallError for what the caller asked wrongly; anything else is a bug and reaches the
    caller only as INTERNAL without its text.
    """

    def reader(self) -> Reader:
        """Read access to the journal, for this thread."""

    def inbox(self) -> Inbox:
        """Where proposals lie."""

    def now(self) -> datetime:
        """Wall-clock time, UTC."""

    def status(self) -> NodeStatus:
        """What is armed now."""

    def events(self, cursor: str, last: int) -> FeedPage:
        """What happened since `cursor`; with an empty one, the last so many and a cursor for what comes."""

    def evidence(self, nonce: bytes) -> Evidence:
        """Fresh evidence over a nonce of 32 bytes."""

    def arm(self, bundles: Sequence[bytes], files: Mapping[str, bytes]) -> ArmAnswer:
        """Check a manifest and its files against this node's own policy, and arm it if everything passes."""

    def disarm(self, reason: str) -> ControlAnswer:
        """Stop acting and detach; logged with the reason."""

    def pause(self, reason: str, seconds: int) -> ControlAnswer:
        """Decide but do not act for so many seconds."""

    def resume(self, reason: str) -> ControlAnswer:
        """End a pause."""

    def trip_circuit(self, address: str, port: int, seconds: int, reason: str) -> ControlAnswer:
        """Refuse connects to a destination for so many seconds."""

    def release_circuit(self, address: str, port: int, reason: str) -> ControlAnswer:
        """Close a circuit now."""

    def approve(self, bundle: bytes) -> ControlAnswer:
        """Let one call through that the guard held back, if this signed approval says so."""

    def acknowledge(self, run: str, reason: str) -> ControlAnswer:
        """A person has seen the escalation of this run."""

    def waiting(self) -> Waiting:
        """What waits for a person."""

    def begin_drill(self, request: DrillRequest) -> DrillReport:
        """Begin a drill that the armed manifest allows."""

    def end_drill(self, id: str) -> DrillReport:
        """End it now if it runs; what was due and what was seen."""

    def record_probe(self, name: str, sha256: str, what: str, reason: str) -> ControlAnswer:
        """Write down that a probe which nobody measured begins or ended."""

    def prune_log(self, minimum: int | None, retention_days: int | None, reason: str) -> Retained:
        """Drop entries below an index, by default all that are older than the retention; logged with the reason."""

    def erase_log(self, what: Sequence[str], older_than_days: int | None, reason: str) -> Retained:
        """Delete the clear texts of runs or entries, or of all that are older; logged with the reason."""

    def proposed(self, body: Mapping[str, Any]) -> None:
        """Append a `proposal` entry; returns once it is durable."""

    def accessed(self, accesses: Sequence[Access]) -> None:
        """Append `access` entries: who read what since the last time."""
