"""Callers who mean harm: more calls than allowed, random bytes, and every hiding code point there is."""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointcall_attest.printable import hides
from pointcall_executor.agent_api.errors import QuotaError
from pointcall_executor.agent_api.examination import Examination
from pointcall_executor.api import interceptor, services
from pointcall_executor.api.client import ApiError, Client
from pointcall_executor.api.messages import pb
from pointcall_executor.api.quota import Bucket
from pointcall_executor.api.roles import METHODS, RATES, Role
from pointcall_executor.api.server import Server, serve
from tests.unit.api.conftest import Api
from tests.unit.api.fake_backend import FakeBackend

ALLOWED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "FAILED_PRECONDITION"}


def status(channel: Any, method: str, raw: bytes) -> str:
    try:
        channel.unary_unary(method)(raw, timeout=20)
    except grpc.RpcError as failure:
        return str(failure.code().name)
    return "OK"


@pytest.fixture(scope="module")
def wide_open() -> Iterator[Server]:
    """A server whose clock runs so fast that no call is ever too soon."""
    ticks = itertools.count(step=10**12)
    folder = Path(tempfile.mkdtemp(prefix="pc-"))
    server = serve(FakeBackend(folder), folder / "run", clock_ns=lambda: next(ticks))
    yield server
    server.stop(0)
    shutil.rmtree(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(method=st.sampled_from([m for m in METHODS if "/pointcall." in m]), raw=st.binary(max_size=5_000))
def test_random_bytes_are_never_a_bug(wide_open: Server, method: str, raw: bytes) -> None:
    with grpc.insecure_channel(f"unix:{wide_open.socket(Role.OPERATOR)}") as channel:
        assert status(channel, method, raw) in ALLOWED


def test_a_request_that_is_no_message_is_refused(api: Api) -> None:
    with grpc.insecure_channel(f"unix:{api.server.socket(Role.AGENT)}") as channel:
        assert status(channel, "/pointcall.v1.Runs/GetRun", b"\xff\xff") == "INVALID_ARGUMENT"


def test_a_message_beyond_the_role_s_cap_never_reaches_a_handler(api: Api) -> None:
    with grpc.insecure_channel(f"unix:{api.server.socket(Role.AGENT)}") as channel:
        assert status(channel, "/pointcall.v1.Proposals/SubmitProposal", b"\0" * (1 << 20)) == "RESOURCE_EXHAUSTED"
    assert api.backend.proposals == []


def test_a_flood_of_one_role_is_cut_and_leaves_the_others_alone(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptor, "PENALTY_S", 0.001)
    seen: dict[str, int] = {}
    lock = threading.Lock()

    def flood() -> None:
        with grpc.insecure_channel(f"unix:{api.server.socket(Role.AGENT)}") as channel:
            for _ in range(120):
                got = status(channel, "/pointcall.v1.Status/GetStatus", b"")
                with lock:
                    seen[got] = seen.get(got, 0) + 1

    threads = [threading.Thread(target=flood) for _ in range(6)]
    for thread in threads:
        thread.start()
    with api.client(Role.OPERATOR) as operator:
        for _ in range(20):
            assert operator.call("Status/GetStatus").node == "node-7"
    for thread in threads:
        thread.join()
    assert set(seen) == {"OK", "RESOURCE_EXHAUSTED"}
    assert sum(seen.values()) == 720

    # What got through is in the log, in a few entries, not in hundreds.
    api.server.flush()
    counted = {(a.role, a.method): a.count for a in api.backend.accesses}
    assert counted == {
        ("agent", "pointcall.v1.Status/GetStatus"): seen["OK"],
        ("operator", "pointcall.v1.Status/GetStatus"): 20,
    }


def test_no_hiding_code_point_leaves_the_api(short_dir: Path) -> None:
    hostile = [c for c in map(chr, range(sys.maxunicode + 1)) if hides(c) and not 0xD800 <= ord(c) < 0xE000]
    assert len(hostile) > 100_000
    sample = hostile[:400] + hostile[:: len(hostile) // 600]
    backend = FakeBackend(short_dir)
    details = ["".join(sample[i : i + 25]) for i in range(0, len(sample), 25)]
    made = backend.log.recover(detail={f"d{n}": text for n, text in enumerate(details)})
    server = serve(backend, short_dir / "run")
    with Client(server.socket(Role.AGENT)) as agent:
        run = agent.call("Runs/GetRun", run=made.run)
    server.stop(0)
    texts = [*run.actions[0].detail.values()]
    assert len(texts) == 32  # and the rest is cut
    assert [c for text in texts for c in text if hides(c)] == []


def test_unknown_methods_are_counted_without_their_names(api: Api) -> None:
    with grpc.insecure_channel(f"unix:{api.server.socket(Role.AGENT)}") as channel:
        for n in range(50):
            assert status(channel, f"/evil.Service{n}/Run", b"") == "PERMISSION_DENIED"
    api.server.flush()
    assert [(a.method, a.count) for a in api.backend.accesses] == [("unknown (denied)", 50)]


@given(st.lists(st.tuples(st.integers(0, 10**10), st.integers(1, 30)), max_size=60))
def test_a_bucket_never_gives_more_than_it_gained(steps: list[tuple[int, int]]) -> None:
    bucket, now, given_out = Bucket(50, 10**8, 0), 0, 0
    for later, cost in steps:
        now += later
        given_out += cost * bucket.take(cost, now)
        assert given_out <= 50 + now * 10 / 1e9


def test_a_clock_that_steps_back_gains_nothing() -> None:
    bucket = Bucket(1, 10**9, 10**12)
    assert bucket.take(1, 10**12)
    assert not bucket.take(1, 0)
    assert not bucket.take(1, 10**12)
    assert bucket.take(1, 10**12 + 10**9)


def test_proposals_are_limited_for_all_callers_together(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "examine", lambda *_: Examination.model_validate_json(REFUSED))
    services_of = services.Services(api.backend, lambda: 0)
    submit = services_of.handlers()["Proposals"]["SubmitProposal"]
    for n in range(services.SUBMISSIONS_AT_ONCE):
        submit(pb.SubmitProposalRequest(name="n0", rationale="r", source=f"x = {n}", author=f"agent-{n}"))
    with pytest.raises(QuotaError) as refusal:
        submit(pb.SubmitProposalRequest(name="n0", rationale="r", source="y", author="another"))
    assert refusal.value.id == "proposal.rate"


REFUSED = (
    '{"checks": [{"id": "proposal.text", "outcome": "fail"}], "module_sha256": "", "capabilities": [], "simulated": 0,'
    ' "differences": []}'
)


def test_a_call_too_many_waits_before_it_is_refused(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(interceptor.time, "sleep", slept.append)
    with api.client(Role.RELYING_PARTY) as client:
        errors = [_refused(client) for _ in range(20)]
    assert slept == [interceptor.PENALTY_S] * errors.count("api.rate")
    assert slept


def test_asking_for_what_is_denied_costs_as_well(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(interceptor.time, "sleep", slept.append)
    _, burst = RATES[Role.AGENT]
    with grpc.insecure_channel(f"unix:{api.server.socket(Role.AGENT)}") as channel:
        seen = {status(channel, "/pointcall.v1.Control/Disarm", b"") for _ in range(2 * burst)}
    assert seen == {"PERMISSION_DENIED"}
    assert slept


def test_evidence_costs_more_than_reading(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptor, "PENALTY_S", 0.001)
    _, burst = RATES[Role.RELYING_PARTY]
    with api.client(Role.RELYING_PARTY) as client:
        errors = [_refused(client) for _ in range(burst)]
    assert "api.rate" in errors
    assert len(api.backend.asked) == errors.count("") < burst


def _refused(client: Client) -> str:
    try:
        client.call("Status/GetEvidence", nonce=b"n" * 32)
    except ApiError as refusal:
        return refusal.id
    return ""
