"""Every parser of this room on bytes that nobody meant: only the declared error comes out."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pointcall_attest.errors import MalformedError
from pointcall_attest.report import controls
from pointcall_executor.agent_api import check, recorded
from pointcall_executor.agent_api.errors import RequestError
from pointcall_executor.agent_api.inbox import Inbox
from pointcall_executor.agent_api.proposal import Submission
from tests.unit.api.proposals import proposal
from tests.unit.report.sample_log import SampleLog

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
GOOD = json.loads(proposal().model_dump_json())
quick = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(raw=st.binary(max_size=2_000) | json_values.map(lambda v: json.dumps(v).encode()))
@example(raw=b"\xed\xa0\x80")
def test_stored_proposals(tmp_path: Path, raw: bytes) -> None:
    folder = tmp_path / ("p-" + "0" * 24)
    folder.mkdir(exist_ok=True)
    (folder / "proposal.json").write_bytes(raw)
    with contextlib.suppress(RequestError):
        Inbox(tmp_path).all()


@quick
@given(key=st.sampled_from(sorted(GOOD)), value=json_values)
def test_a_stored_proposal_with_one_other_field(tmp_path: Path, key: str, value: object) -> None:
    folder = tmp_path / ("p-" + "0" * 24)
    folder.mkdir(exist_ok=True)
    (folder / "proposal.json").write_text(json.dumps(GOOD | {key: value}))
    with contextlib.suppress(RequestError):
        (read,) = Inbox(tmp_path).all()
        assert json.loads(read.model_dump_json()) == GOOD | {key: value}


@quick
@given(raw=st.binary(max_size=2_000) | st.text(max_size=2_000).map(str.encode))
def test_control_mappings(raw: bytes) -> None:
    with contextlib.suppress(MalformedError):
        controls.parse(raw)


@quick
@given(name=st.text(max_size=60), author=st.text(max_size=140), source=st.text(max_size=200), why=st.text(max_size=200))
def test_submissions(name: str, author: str, source: str, why: str) -> None:
    with contextlib.suppress(RequestError):
        made = Submission.of(name=name, rationale=why, source=source, author=author)
        assert made.name.isascii()
        assert made.author.isascii()
        assert made.id == Submission.of(name=name, rationale=why, source=source, author=author).id


@quick
@given(token=st.text(max_size=40), size=st.integers(0, 2**32 - 1))
def test_pages(token: str, size: int) -> None:
    log = SampleLog()
    log.recover()
    with contextlib.suppress(RequestError):
        assert len(recorded.page(log, size=size, token=token).runs) <= 1


@settings(max_examples=40, deadline=None)
@given(source=st.text(max_size=400) | st.text("defimport()=:\n \t@xe0123[]", max_size=400))
def test_sources(source: str) -> None:
    found = check.examine({"source": source, "rationale": "why", "cases": [], "names": []})
    assert {c["outcome"] for c in found["checks"]} <= {"pass", "fail", "not-checked"}
    json.dumps(found).encode()


@pytest.mark.parametrize("size", [0, 1, 512, 513, 1200])
def test_reading_backwards_finds_everything_once(size: int) -> None:
    """Receipts among many other entries, read in pages that do not fit the windows."""
    log = SampleLog()
    made = []
    for n in range(size):
        if n % 200 == 7:
            made.append(log.recover().index)
        else:
            log.refuse()
    seen, token = [], ""
    while True:
        page = recorded.page(log, size=2, token=token)
        seen += [r.receipt_index for r in page.runs]
        token = page.next
        if not token:
            break
    assert seen == made[::-1]
