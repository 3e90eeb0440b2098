"""The methods of the API: request message in, one call to the backend or the agent room, response message out.

No permission is decided here: a handler runs only after the interceptor let the call through. Spec: docs/spec/api.md.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from pointcall_attest.entry import MAX_ERASED
from pointcall_attest.printable import shown
from pointcall_executor.agent_api import proposal, recorded
from pointcall_executor.agent_api.errors import NotFoundError, QuotaError, RequestError
from pointcall_executor.agent_api.examination import examine
from pointcall_executor.api.backend import Backend, DrillRequest
from pointcall_executor.api.messages import message, pb
from pointcall_executor.api.quota import Bucket
from pointcall_runbook.vocabulary import Address

MAX_REASON_BYTES: Final = 500
DAY_S: Final = 86_400
HOUR_S: Final = 3_600
NONCE_BYTES: Final = 32
WAIT_FOR_EXAMINATION_S: Final = 5.0
SUBMISSIONS_AT_ONCE: Final = 60
SUBMISSION_EVERY_NS: Final = 36_000_000_000  # 100 an hour: refused ones fill the log with at most 5 MB a day

Handler = Callable[[Any], Any]


class Services:
    """All methods over one backend. `handlers` is what the server dispatches to."""

    def __init__(self, backend: Backend, clock_ns: Callable[[], int]) -> None:
        self._backend, self._clock_ns = backend, clock_ns
        self._submissions = Bucket(SUBMISSIONS_AT_ONCE, SUBMISSION_EVERY_NS, clock_ns())
        self._examining = threading.Lock()  # one at a time: an examination may take a whole core

    def handlers(self) -> Mapping[str, Mapping[str, Handler]]:
        """Service name -> method name -> handler, for every method of pointcall.proto."""
        return {
            "Runs": {"ListRuns": self._list_runs, "GetRun": self._get_run, "GetReceipt": self._get_receipt},
            "Status": {
                "GetStatus": self._get_status,
                "GetEvidence": self._get_evidence,
                "ListWaiting": self._list_waiting,
            },
            "Events": {"ListEvents": self._list_events},
            "Proposals": {
                "SubmitProposal": self._submit_proposal,
                "ListProposals": self._list_proposals,
                "GetProposal": self._get_proposal,
            },
            "Control": {
                "Arm": self._arm,
                "Disarm": self._disarm,
                "Pause": self._pause,
                "Resume": self._resume,
                "TripCircuit": self._trip_circuit,
                "ReleaseCircuit": self._release_circuit,
                "Approve": self._approve,
                "Acknowledge": self._acknowledge,
                "BeginDrill": self._begin_drill,
                "EndDrill": self._end_drill,
                "RecordProbe": self._record_probe,
                "PruneLog": self._prune_log,
                "EraseLog": self._erase_log,
            },
        }

    def _list_runs(self, request: Any) -> Any:
        page = recorded.page(self._backend.reader(), size=request.page_size, token=request.page_token)
        return pb.ListRunsResponse(runs=[message(r, "Run") for r in page.runs], next_page_token=page.next)

    def _get_run(self, request: Any) -> Any:
        return message(recorded.run(recorded.find(self._backend.reader(), request.run)), "Run")

    def _get_receipt(self, request: Any) -> Any:
        entry = recorded.find(self._backend.reader(), request.run)
        return pb.Receipt(
            run=request.run,
            index=entry.index,
            leaf_sha256=entry.leaf_hash,
            dsse=entry.raw,
            tlog_proof=recorded.proof(self._backend.reader(), entry),
        )

    def _get_status(self, _: Any) -> Any:
        return message(self._backend.status(), "NodeStatus")

    def _get_evidence(self, request: Any) -> Any:
        size = len(request.nonce)
        if size != NONCE_BYTES:
            raise RequestError(
                "a nonce has 32 bytes", id="api.nonce", want="32 fresh random bytes", got=f"{size} bytes"
            )
        return message(self._backend.evidence(bytes(request.nonce)), "Evidence")

    def _list_events(self, request: Any) -> Any:
        if request.last > recorded.MAX_PAGE:
            want = f"at most {recorded.MAX_PAGE}"
            raise RequestError("the page is too large", id="api.page", want=want, got=str(request.last))
        return message(self._backend.events(request.cursor, request.last), "ListEventsResponse")

    def _submit_proposal(self, request: Any) -> Any:
        submission = proposal.Submission.of(
            name=request.name, rationale=request.rationale, source=request.source, author=request.author
        )
        if not self._submissions.take(1, self._clock_ns()):
            raise QuotaError("too many proposals", id="proposal.rate", want="100 an hour", hint="try again in a minute")
        if not self._examining.acquire(timeout=WAIT_FOR_EXAMINATION_S):
            raise QuotaError("another proposal is being examined", id="proposal.busy", hint="try again in some seconds")
        names = [s.name for s in self._backend.status().services]
        try:
            done = proposal.submit(
                submission,
                inbox=self._backend.inbox(),
                cases=recorded.cases(self._backend.reader()),
                now=self._backend.now(),
                examine=lambda source, rationale, cases: examine(source, rationale, cases, names),
                journal=lambda p: self._backend.proposed(p.journal_body()),
            )
        finally:
            self._examining.release()
        return _proposal(done)

    def _list_proposals(self, request: Any) -> Any:
        size = request.page_size or recorded.DEFAULT_PAGE
        if size > recorded.MAX_PAGE:
            raise RequestError(
                "the page is too large", id="api.page", want=f"at most {recorded.MAX_PAGE}", got=str(size)
            )
        after = [p for p in self._backend.inbox().all() if p.id > request.page_token]
        rows = [
            _proposal(p.model_copy(update={"rationale": "", "source": "", "differences": ()})) for p in after[:size]
        ]
        return pb.ListProposalsResponse(proposals=rows, next_page_token=after[size - 1].id if len(after) > size else "")

    def _get_proposal(self, request: Any) -> Any:
        found = self._backend.inbox().find(request.id)
        if found is None:
            raise NotFoundError("no such proposal", got=request.id)
        return _proposal(found)

    def _arm(self, request: Any) -> Any:
        answer = self._backend.arm(tuple(request.bundles), dict(request.files))
        return pb.ArmResponse(
            armed=answer.armed,
            tier=answer.verdict.tier,
            manifest_sha256=answer.manifest_sha256,
            checks=[message(c, "Check") for c in answer.verdict.checks],
        )

    def _disarm(self, request: Any) -> Any:
        return message(self._backend.disarm(_reason(request)), "ControlResponse")

    def _pause(self, request: Any) -> Any:
        return message(self._backend.pause(_reason(request), _seconds(request, DAY_S)), "ControlResponse")

    def _resume(self, request: Any) -> Any:
        return message(self._backend.resume(_reason(request)), "ControlResponse")

    def _trip_circuit(self, request: Any) -> Any:
        address, port = _destination(request)
        answer = self._backend.trip_circuit(address, port, _seconds(request, HOUR_S), _reason(request))
        return message(answer, "ControlResponse")

    def _release_circuit(self, request: Any) -> Any:
        address, port = _destination(request)
        return message(self._backend.release_circuit(address, port, _reason(request)), "ControlResponse")

    def _approve(self, request: Any) -> Any:
        return message(self._backend.approve(bytes(request.bundle)), "ControlResponse")

    def _acknowledge(self, request: Any) -> Any:
        return message(self._backend.acknowledge(str(request.run), _reason(request)), "ControlResponse")

    def _list_waiting(self, _: Any) -> Any:
        return message(self._backend.waiting(), "Waiting")

    def _begin_drill(self, request: Any) -> Any:
        fields = {name: getattr(request, name) for name in DrillRequest.__dataclass_fields__}
        return message(self._backend.begin_drill(DrillRequest(**fields | {"reason": _reason(request)})), "Drill")

    def _end_drill(self, request: Any) -> Any:
        return message(self._backend.end_drill(str(request.id)), "Drill")

    def _record_probe(self, request: Any) -> Any:
        if request.what not in ("begins", "ended") or not _SHA256.fullmatch(request.sha256):
            raise RequestError(
                "a probe is named by its digest", id="api.probe", want="begins or ended, and a SHA-256 in hex",
                got=shown(f"{request.what} {request.sha256}", 100),
            )  # fmt: skip
        answer = self._backend.record_probe(shown(request.name, 200), request.sha256, request.what, _reason(request))
        return message(answer, "ControlResponse")

    def _prune_log(self, request: Any) -> Any:
        minimum = int(request.minimum) if request.HasField("minimum") else None
        days = int(request.retention_days) if request.HasField("retention_days") else None
        return message(self._backend.prune_log(minimum, days, _reason(request)), "RetentionResponse")

    def _erase_log(self, request: Any) -> Any:
        days = int(request.older_than_days) if request.HasField("older_than_days") else None
        if bool(request.what) == (days is not None) or len(request.what) > MAX_ERASED:
            raise RequestError(
                "name runs or entries, or an age",
                id="api.erase",
                want=f"1 to {MAX_ERASED} of `what`, or `older_than_days`",
                got=str(len(request.what)),
            )
        return message(self._backend.erase_log(tuple(request.what), days, _reason(request)), "RetentionResponse")


def _proposal(value: proposal.Proposal) -> Any:
    return pb.Proposal(**value.model_dump(exclude={"format": True, "differences": {"__all__": {"case"}}}))


_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


def _reason(request: Any) -> str:
    """Every change of the node says why; the reason goes into the log."""
    reason = str(request.reason)
    if not 0 < len(reason.encode()) <= MAX_REASON_BYTES or _CONTROL.search(reason):
        raise RequestError(
            "a change of the node needs a reason",
            id="api.reason",
            want=f"1 to {MAX_REASON_BYTES} bytes on one line",
            got=shown(reason, 60) or "nothing",
        )
    return reason


def _seconds(request: Any, most: int) -> int:
    seconds = int(request.seconds)
    if not 1 <= seconds <= most:
        raise RequestError("every lease ends", id="api.seconds", want=f"1 to {most} s", got=str(seconds))
    return seconds


def _destination(request: Any) -> tuple[str, int]:
    try:
        address = str(Address.parse(request.address))
    except ValueError:
        raise RequestError(
            "that is no address", id="api.address", want="an IPv4 or IPv6 address", got=shown(request.address, 60)
        ) from None
    if not 1 <= request.port <= 65_535:
        raise RequestError("that is no port", id="api.address", want="1 to 65535", got=str(request.port))
    return address, int(request.port)
