"""A proposal: a runbook source with a rationale, examined, and never armed from here.

`submit` is the whole way in: form, quota, examination, storage, one journal entry. The entry is appended by the caller
that it is given, since this room has no way to write to the journal. Spec: docs/spec/proposal.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

from pointcall_attest.printable import shown
from pointcall_executor.agent_api.errors import QuotaError, RequestError
from pointcall_executor.agent_api.examination import Capability, CheckRow, Difference, Examination
from pointcall_executor.agent_api.inbox import Inbox

MAX_SOURCE_BYTES: Final = 64 * 1024  # the largest runbook of the library has 3 kB
MAX_RATIONALE_BYTES: Final = 8 * 1024  # two pages for a reviewer
OPEN_PER_AUTHOR: Final = 10
OPEN_IN_ALL: Final = 100  # authors name themselves, so their quota alone bounds nothing

_NAME: Final = re.compile(r"(?=.{2,40}\Z)[a-z](?:-?[a-z0-9])+")
_AUTHOR: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/@:+-]{0,126}[A-Za-z0-9])?")

Examine = Callable[[str, str, Sequence[Mapping[str, Any]]], Examination]  # source, rationale, recorded events


class Proposal(BaseModel):
    """One proposal as it is stored in `proposals/<id>/proposal.json`. `author` is what the submitter wrote: nobody
    checked it. `state` is `open` (every check passed, people may review it) or `refused` (not stored)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    format: Literal["pointcall-proposal/v1"] = "pointcall-proposal/v1"
    id: str
    name: str
    author: str
    submitted: str
    state: Literal["open", "refused"]
    rationale: str
    source: str
    source_sha256: str
    module_sha256: str
    checks: tuple[CheckRow, ...]
    capabilities: tuple[Capability, ...]
    simulated: int
    differences: tuple[Difference, ...]

    def journal_body(self) -> dict[str, Any]:
        """The body of the `proposal` log entry: digests and check outcomes, none of the proposed text."""
        return {
            "id": self.id,
            "name": self.name,
            "sha256": self.source_sha256,
            "author": self.author,
            "state": self.state,
            "checks": {c.id: c.outcome for c in self.checks},
        }


class Submission(BaseModel):
    """What a caller sends. `Submission.of` is the way to make one from outside input."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: str
    rationale: str
    source: str
    author: str

    @classmethod
    def of(cls, *, name: str, rationale: str, source: str, author: str) -> Submission:
        """RequestError for a name, author or size outside the limits. The text itself is examined later."""
        _require(_NAME.fullmatch(name), "proposal.name", "a lower-case name like cache-breaker, 2 to 40 letters", name)
        _require(_AUTHOR.fullmatch(author), "proposal.author", "1 to 128 ASCII letters, digits and ._/@:+-", author)
        for what, value, most in (("source", source, MAX_SOURCE_BYTES), ("rationale", rationale, MAX_RATIONALE_BYTES)):
            size = len(value.encode(errors="surrogatepass"))
            _require(0 < size <= most, "proposal.size", f"{what} of 1 to {most} bytes", f"{size} bytes")
        return cls(name=name, rationale=rationale, source=source, author=author)

    @property
    def id(self) -> str:
        """Made from the content, so that the same submission twice is one proposal."""
        whole = hashlib.sha256(b"pointcall/proposal/v1\0")
        for part in (self.name, self.author, self.rationale, self.source):
            whole.update(hashlib.sha256(part.encode(errors="surrogatepass")).digest())
        return "p-" + whole.hexdigest()[:24]


def _require(held: object, id: str, want: str, got: str) -> None:
    if not held:
        raise RequestError("the proposal is not of the form asked for", id=id, want=want, got=shown(got, 60))


def submit(
    submission: Submission,
    *,
    inbox: Inbox,
    cases: Sequence[Mapping[str, Any]],
    now: datetime,
    examine: Examine,
    journal: Callable[[Proposal], object],
) -> Proposal:
    """Examine and store one proposal; a refused one is answered and logged, but not stored.

    `cases` are recorded events (recorded.cases). `journal` appends the log entry and returns once it is durable; only
    then is the proposal stored. QuotaError when too many are open.
    """
    known = inbox.find(submission.id)
    if known is not None:
        return known
    _within_quota(submission.author, inbox.all())
    proposal = _examined(submission, examine(submission.source, submission.rationale, cases), now)
    journal(proposal)
    if proposal.state == "open":
        inbox.put(proposal)
    return proposal


def _within_quota(author: str, stored: Sequence[Proposal]) -> None:
    own = sum(p.author == author for p in stored)
    if own >= OPEN_PER_AUTHOR:
        raise QuotaError("too many open proposals of this author", want=f"fewer than {OPEN_PER_AUTHOR}", got=str(own))
    if len(stored) >= OPEN_IN_ALL:
        raise QuotaError("the inbox is full", want=f"fewer than {OPEN_IN_ALL}", got=str(len(stored)))


def _examined(submission: Submission, found: Examination, now: datetime) -> Proposal:
    return Proposal(
        id=submission.id,
        name=submission.name,
        author=submission.author,
        submitted=now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        state="open" if found.passed else "refused",
        rationale=submission.rationale,
        source=submission.source,
        source_sha256=hashlib.sha256(submission.source.encode(errors="surrogatepass")).hexdigest(),
        **found.model_dump(),
    )
