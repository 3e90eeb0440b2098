"""A proposal as a patch: the mbox form of `git format-patch`, for `git am` or a mail to the reviewers.

It adds regular files below `runbooks/library/<name>/` and nothing else. Text of the submitter stands only inside the
hunks, where each line begins with `+`: in the message, a line such as `diff --git` would be applied as part of the
patch. The submitter is not the mail's sender either: git would make a claimed address the author of the commit.
Spec: docs/spec/proposal.md section 5; git's own form is `git help format-patch`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from email.utils import format_datetime
from typing import Final

from pointcall_executor import VERSION
from pointcall_executor.agent_api.proposal import Proposal

MAX_CASES: Final = 20  # examples for the reviewer and the tests; the proposal itself holds all of them
_NO_COMMIT: Final = "0" * 40


def files(proposal: Proposal) -> dict[str, str]:
    """The files that the patch adds: path -> text. Every path is below `runbooks/library/<name>/`."""
    folder = f"runbooks/library/{proposal.name}"
    cases = [d.case for d in proposal.differences if d.case is not None][:MAX_CASES]
    added = {f"{folder}/README.md": readme(proposal)}
    if cases:
        added[f"{folder}/cases/cases.json"] = json.dumps(cases, indent=1, ensure_ascii=False) + "\n"
    return added | {f"{folder}/runbook.py": proposal.source}


def readme(proposal: Proposal) -> str:
    """What a reviewer reads first. Submitted text is an indented block, so that no page renders it."""
    rationale = "\n".join(f"    {line}" for line in proposal.rationale.strip("\n").split("\n"))
    grants = "\n".join(
        f"- on `{c.event}`: {', '.join(f'`{a}`' for a in c.actions) or 'nothing'}, at most {c.fuel_bound} fuel"
        for c in proposal.capabilities
    )
    changed = sum(not d.same for d in proposal.differences)
    return (
        f"# {proposal.name}\n\n"
        f"Proposed by `{proposal.author}` (as the submitter wrote it; not verified), {proposal.submitted}.\n\n"
        f"## Rationale, in the submitter's words\n\n{rationale}\n\n"
        f"## What it can do\n\n{grants}\n\n"
        f"## What it would have done\n\n"
        f"Simulated on {proposal.simulated} recorded events; it decides differently on {changed} of them.\n"
    )


def render(proposal: Proposal, date: datetime) -> str:
    """The whole patch as text. The same proposal and date give the same bytes."""
    added = files(proposal)
    return (
        f"From {_NO_COMMIT} Mon Sep 17 00:00:00 2001\n"
        "From: Pointcall proposals <proposals@pointcall.invalid>\n"
        f"Date: {format_datetime(date)}\n"
        f"Subject: [PATCH] runbooks: propose {proposal.name}\n"
        "MIME-Version: 1.0\n"
        "Content-Type: text/plain; charset=UTF-8\n"
        "Content-Transfer-Encoding: 8bit\n\n"
        f"Proposal {proposal.id}, submitted {proposal.submitted}.\n"
        f"Proposed by {proposal.author} (not verified).\n"
        f"Source sha256 {proposal.source_sha256}.\n"
        "The rationale and what the runbook can do are in its README.\n"
        f"---\n{_statistics(added)}\n"
        + "".join(_new_file(path, content) for path, content in added.items())
        + f"-- \npointcall {VERSION}\n\n"
    )


def _statistics(added: Mapping[str, str]) -> str:
    lines = sum(len(_lines(content)) for content in added.values())
    created = "".join(f" create mode 100644 {path}\n" for path in added)
    return f" {len(added)} files changed, {lines} insertions(+)\n{created}"


def _new_file(path: str, content: str) -> str:
    lines = _lines(content)
    raw = content.encode()
    blob = hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest()
    hunk = "".join(f"+{line}\n" for line in lines)
    unended = "" if content.endswith("\n") else "\\ No newline at end of file\n"
    return (
        f"diff --git a/{path} b/{path}\n"
        "new file mode 100644\n"
        f"index {'0' * 40}..{blob}\n"
        f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1{'' if len(lines) == 1 else f',{len(lines)}'} @@\n{hunk}{unended}"
    )


def _lines(content: str) -> list[str]:
    return content.removesuffix("\n").split("\n")
