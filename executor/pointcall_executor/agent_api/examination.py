"""One examination of a proposal in a child process, and its result as a typed value.

Not the examination itself: that is check.py, which limits itself. Here is only what the parent owes: a time limit,
a cap on the answer, and a strict reading of it. A child that dies is a failed check, never an exception.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pointcall_executor.agent_api.check import OUTPUT_BYTES

TIME_LIMIT_S: Final = 10.0
_STRICT: Final = ConfigDict(frozen=True, extra="forbid", strict=True)


class CheckRow(BaseModel):
    """One check of a proposal; the same words as `pointcall_attest.verdict.Check`."""

    model_config = _STRICT
    id: str
    outcome: Literal["pass", "fail", "not-checked"]
    expected: str = ""
    observed: str = ""


class Capability(BaseModel):
    """What one handler can call, and the most it can cost."""

    model_config = _STRICT
    event: str
    actions: tuple[str, ...]
    fuel_bound: int


class Difference(BaseModel):
    """One recorded event: what was decided then, and what the proposal would decide.

    `case` is the same as a case of the runbook (pointcall_runbook.case), None where a service has no known name.
    """

    model_config = _STRICT
    run: str
    event: str
    fields: Mapping[str, str]
    recorded_runbook: str
    recorded: tuple[str, ...]
    proposed: tuple[str, ...]
    same: bool
    case: Mapping[str, Any] | None = None


class Examination(BaseModel):
    """The answer of the child. `differences` has one row for each simulated event, also where both agree."""

    model_config = _STRICT
    checks: tuple[CheckRow, ...]
    module_sha256: str
    capabilities: tuple[Capability, ...]
    simulated: int
    differences: tuple[Difference, ...]

    @property
    def passed(self) -> bool:
        """Every check that was made passed, and at least one was made."""
        outcomes = {c.outcome for c in self.checks}
        return "pass" in outcomes and "fail" not in outcomes


def examine(
    source: str,
    rationale: str,
    cases: Sequence[Mapping[str, Any]],
    names: Sequence[str] = (),
    *,
    time_limit_s: float = TIME_LIMIT_S,
) -> Examination:
    """Examine a runbook source in a fresh process, on recorded events as `recorded.cases` gives them; `names` are those
    of the declared services. Never raises for anything that the source can cause."""
    body = {"source": source, "rationale": rationale, "cases": list(cases), "names": list(names)}
    request = json.dumps(body).encode()
    raw, ended = _answer(request, time_limit_s)
    if ended:
        return _died(ended)
    try:
        return Examination.model_validate_json(raw)
    except ValidationError:
        return _died("an answer that is not of the agreed form")


def _answer(request: bytes, time_limit_s: float) -> tuple[bytes, str]:
    """The child's output, and how it ended where that was not well. The answer goes to a memory file, whose size the
    child's own limit caps: a pipe would let it fill our memory."""
    with os.fdopen(os.memfd_create("examination"), "r+b") as answer:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-X", "utf8", "-m", "pointcall_executor.agent_api.check"],
                input=request,
                stdout=answer,
                stderr=subprocess.DEVNULL,
                timeout=time_limit_s,
                check=False,
                env={},
                cwd="/",
            )
        except subprocess.TimeoutExpired:
            return b"", f"no answer within {time_limit_s:g} s"
        answer.seek(0)
        return answer.read(OUTPUT_BYTES), _ended(done.returncode)


def _ended(code: int) -> str:
    if code < 0:
        return f"killed by signal {-code}"
    return f"exit code {code}" if code else ""


def _died(how: str) -> Examination:
    row = CheckRow(id="proposal.examination", outcome="fail", expected="an answer within the limits", observed=how)
    return Examination(checks=(row,), module_sha256="", capabilities=(), simulated=0, differences=())
