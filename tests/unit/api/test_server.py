"""The server: sockets and their modes, errors in their one form, caps, access counts."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pointcall_attest.log.proof import Proof
from pointcall_executor.api import interceptor, roles, services
from pointcall_executor.api.accesses import Accesses
from pointcall_executor.api.caller import Caller
from pointcall_executor.api.client import ApiError, Client, UnreachableError
from pointcall_executor.api.endpoint import SocketPathError
from pointcall_executor.api.roles import SOCKET_MODES, Role
from pointcall_executor.api.server import ServeError, serve
from tests.unit.api.conftest import Api
from tests.unit.api.fake_backend import FakeBackend
from tests.unit.report.sample_log import SampleLog


def test_each_role_has_a_socket_with_its_mode(api: Api) -> None:
    modes = {role: stat.S_IMODE(api.server.socket(role).stat().st_mode) for role in Role}
    assert modes == dict(SOCKET_MODES)
    assert stat.S_ISSOCK(api.server.socket(Role.AGENT).stat().st_mode)


def test_the_folder_holds_the_sockets_and_nothing_else(api: Api) -> None:
    folder = api.server.socket(Role.OPERATOR).parent
    assert sorted(p.name for p in folder.iterdir()) == [
        "agent.sock",
        "auditor.sock",
        "operator.sock",
        "relying-party.sock",
    ]


def test_stop_removes_the_sockets_and_may_be_called_twice(short_dir: Path) -> None:
    server = serve(FakeBackend(short_dir), short_dir / "run")
    server.stop(0)
    server.stop(0)
    assert list((short_dir / "run").iterdir()) == []


def test_a_left_over_socket_is_replaced(short_dir: Path) -> None:
    (short_dir / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(short_dir / "run" / "agent.sock"))
    server = serve(FakeBackend(short_dir), short_dir / "run")
    with Client(server.socket(Role.AGENT)) as client:
        assert client.call("Status/GetStatus").node == "node-7"
    server.stop(0)


def test_a_socket_of_a_living_executor_is_not_taken(api: Api) -> None:
    with pytest.raises(ServeError) as refusal:
        serve(api.backend, api.server.socket(Role.AGENT).parent)
    assert refusal.value.id == "api.socket-in-use"
    with api.client(Role.AGENT) as client:
        assert client.call("Status/GetStatus").node == "node-7"


def test_a_path_that_is_too_long_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 100)
    for make in (lambda: serve(FakeBackend(tmp_path), folder), lambda: Client(folder / "agent.sock")):
        with pytest.raises(SocketPathError) as refusal:
            make()
        assert refusal.value.id == "api.socket-path"
    assert list(folder.iterdir()) == []


def test_a_long_path_that_is_short_from_here_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("d" * 100)
    folder.mkdir()
    monkeypatch.chdir(folder)
    server = serve(FakeBackend(folder), Path("run"))
    with Client(folder / "run" / "agent.sock") as client:
        assert client.call("Status/GetStatus").node == "node-7"
    server.stop(0)
    assert list((folder / "run").iterdir()) == []


def test_nobody_listens(tmp_path: Path) -> None:
    with Client(tmp_path / "agent.sock", timeout_s=5) as client, pytest.raises(UnreachableError):
        client.call("Status/GetStatus")


def test_runs_are_listed_newest_first_in_pages(short_dir: Path) -> None:
    log = SampleLog()
    made = [log.recover().run for _ in range(7)]
    server = serve(FakeBackend(short_dir, log), short_dir / "run")
    seen, token = [], ""
    with Client(server.socket(Role.AGENT)) as client:
        while True:
            answer = client.call("Runs/ListRuns", page_size=3, page_token=token)
            seen += [r.id for r in answer.runs]
            token = answer.next_page_token
            if not token:
                break
    server.stop(0)
    assert seen == made[::-1]


def test_a_receipt_is_exactly_the_bytes_of_the_log(api: Api) -> None:
    made = api.backend.log.recover()
    with api.client(Role.AUDITOR) as client:
        got = client.call("Runs/GetReceipt", run=made.run)
    assert (got.dsse, got.index, got.leaf_sha256) == (made.raw, made.index, made.leaf_hash)
    assert got.tlog_proof == b""


def test_a_receipt_under_a_checkpoint_comes_with_its_proof(api: Api) -> None:
    made = api.backend.log.recover()
    head = api.backend.log.checkpoint()
    later = api.backend.log.recover()
    with api.client(Role.AUDITOR) as client:
        got = client.call("Runs/GetReceipt", run=made.run)
        none_yet = client.call("Runs/GetReceipt", run=later.run)
    proof = Proof.parse(got.tlog_proof)
    proof.verify(got.dsse)
    assert proof.checkpoint == head
    assert none_yet.tlog_proof == b""


def test_a_run_has_its_event_decision_and_times(api: Api) -> None:
    made = api.backend.log.recover()
    with api.client(Role.AGENT) as client:
        run = client.call("Runs/GetRun", run=made.run)
    assert (run.event, run.runbook, run.tier, run.actions[0].outcome) == (
        "CircuitOpened",
        "refusing-dependency",
        "emulated",
        "applied",
    )
    assert run.fields["port"] == "5432"
    assert sorted(run.timeline_ns, key=lambda step: run.timeline_ns[step]) == [
        "event",
        "received",
        "decided",
        "intent",
        "applied",
        "confirmed",
    ]


@pytest.mark.parametrize(
    ("role", "method", "fields", "status", "id"),
    [
        (Role.AGENT, "Runs/GetRun", {"run": "x"}, "INVALID_ARGUMENT", "api.run-id"),
        (Role.AGENT, "Runs/GetRun", {"run": "0" * 26}, "NOT_FOUND", "api.not-found"),
        (Role.AGENT, "Runs/ListRuns", {"page_size": 101}, "INVALID_ARGUMENT", "api.page"),
        (Role.AGENT, "Runs/ListRuns", {"page_token": "-1"}, "INVALID_ARGUMENT", "api.page"),
        (Role.AGENT, "Runs/ListRuns", {"page_token": "9" * 5000}, "INVALID_ARGUMENT", "api.size"),
        (Role.AUDITOR, "Status/GetEvidence", {"nonce": b"n" * 31}, "INVALID_ARGUMENT", "api.nonce"),
        (Role.OPERATOR, "Control/Disarm", {}, "INVALID_ARGUMENT", "api.reason"),
        (Role.OPERATOR, "Control/EraseLog", {"reason": "r"}, "INVALID_ARGUMENT", "api.erase"),
        (Role.OPERATOR, "Control/PruneLog", {}, "INVALID_ARGUMENT", "api.reason"),
        (Role.AUDITOR, "Control/EraseLog", {"reason": "r", "what": ["1"]}, "PERMISSION_DENIED", "api.denied"),
        (Role.OPERATOR, "Control/Disarm", {"reason": "a\nb"}, "INVALID_ARGUMENT", "api.reason"),
        (Role.OPERATOR, "Control/Pause", {"reason": "r"}, "INVALID_ARGUMENT", "api.seconds"),
        (Role.OPERATOR, "Control/Pause", {"reason": "r", "seconds": 86_401}, "INVALID_ARGUMENT", "api.seconds"),
        (Role.OPERATOR, "Control/TripCircuit", {"address": "db", "port": 1}, "INVALID_ARGUMENT", "api.address"),
        (Role.OPERATOR, "Control/TripCircuit", {"address": "::1", "port": 0}, "INVALID_ARGUMENT", "api.address"),
        (
            Role.OPERATOR,
            "Control/ReleaseCircuit",
            {"address": "::1", "port": 9, "reason": "r"},
            "FAILED_PRECONDITION",
            "circuit.unknown",
        ),
        (Role.AGENT, "Proposals/GetProposal", {"id": "../x"}, "INVALID_ARGUMENT", "proposal.id"),
        (Role.AGENT, "Proposals/GetProposal", {"id": "p-" + "0" * 24}, "NOT_FOUND", "api.not-found"),
        (Role.AGENT, "Control/Disarm", {"reason": "r"}, "PERMISSION_DENIED", "api.denied"),
    ],
)
def test_a_wrong_call_gets_one_clear_error(
    api: Api, role: Role, method: str, fields: dict[str, Any], status: str, id: str
) -> None:
    with api.client(role) as client, pytest.raises(ApiError) as refusal:
        client.call(method, **fields)
    assert (refusal.value.status, refusal.value.id) == (status, id)


def test_the_refused_calls_reach_no_backend_method(api: Api) -> None:
    with api.client(Role.AGENT) as client:
        for method in ("Arm", "Disarm", "Pause", "Resume", "TripCircuit", "ReleaseCircuit"):
            with pytest.raises(ApiError):
                client.call(f"Control/{method}")
    assert api.backend.asked == []


def test_control_calls_pass_on_what_was_asked(api: Api) -> None:
    with api.client(Role.OPERATOR) as client:
        client.call("Control/Pause", reason="maintenance", seconds=60)
        client.call("Control/Resume", reason="done")
        client.call("Control/TripCircuit", address="::ffff:10.0.0.1", port=80, seconds=5, reason="bad deploy")
        client.call("Control/ReleaseCircuit", address="10.0.0.1", port=80, reason="fixed")
        assert client.call("Control/Disarm", reason="end").state == "armed"
        assert list(client.call("Control/PruneLog", reason="old").index) == [7]
        assert client.call("Control/PruneLog", reason="old", minimum=0, retention_days=0).pruned == 1
        assert list(client.call("Control/EraseLog", reason="asked", what=["5", "x"]).erased) == [3, 4]
        client.call("Control/EraseLog", reason="old", older_than_days=9)
    log, api.backend.asked[-4:] = api.backend.asked[-4:], []
    assert log == [
        ("prune", None, None, "old"),
        ("prune", 0, 0, "old"),
        ("erase", ("5", "x"), None, "asked"),
        ("erase", (), 9, "old"),
    ]
    assert api.backend.asked == [
        ("pause", "maintenance", 60),
        ("resume", "done"),
        ("trip", "10.0.0.1", 80, 5, "bad deploy"),
        ("release", "10.0.0.1", 80, "fixed"),
        ("disarm", "end"),
    ]


def test_bytes_that_are_no_message_of_the_method(api: Api) -> None:
    with grpc.insecure_channel(f"unix:{api.server.socket(Role.AGENT)}") as channel:
        call = channel.unary_unary("/pointcall.v1.Runs/GetRun")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"\xff" * 20, timeout=20)
    assert _id(refused.value) == "api.request"


def test_a_method_that_this_build_does_not_serve(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permitted by the table, and nobody serves it: an answer, not a broken connection."""
    name = "/pointcall.v1.Status/GetWeather"
    monkeypatch.setitem(interceptor.METHODS, name, roles.METHODS["/pointcall.v1.Status/GetStatus"])  # type: ignore[index]
    channel = grpc.insecure_channel(f"unix:{api.server.socket(Role.AGENT)}")
    with channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(name)(b"", timeout=20)
    assert _id(refused.value) == "api.method"


def test_a_call_that_is_too_late_is_not_begun() -> None:
    """The caller has gone by the time that the server comes to it: grpc says how long is left."""

    class AbortedError(Exception):
        pass

    class Late:
        sent: dict[str, str]

        def time_remaining(self) -> float:
            return -0.1

        def set_trailing_metadata(self, pairs: Any) -> None:
            self.sent = dict(pairs)

        def abort(self, *_: Any) -> None:
            raise AbortedError

    method, began = "/pointcall.v1.Status/GetStatus", []
    guard = interceptor.Interceptor(lambda _: Caller("agent", Role.AGENT), Accesses(), lambda: 0)
    handler = grpc.unary_unary_rpc_method_handler(lambda *given: began.append(given), lambda raw: raw)
    context = Late()
    with pytest.raises(AbortedError):
        guard.intercept_service(lambda _: handler, SimpleNamespace(method=method)).unary_unary(b"", context)
    assert json.loads(context.sent["pointcall-error"])["id"] == "api.late"
    assert began == []


def test_one_proposal_is_examined_at_a_time(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "WAIT_FOR_EXAMINATION_S", 0.2)
    begun, go_on, told = threading.Event(), threading.Event(), []

    def slow(*given: Any) -> Any:
        begun.set()
        go_on.wait(20)
        return examine(*given)

    examine = services.examine
    monkeypatch.setattr(services, "examine", slow)
    fields = {"name": "fix", "rationale": "Because.", "source": "x = 1\n", "author": "agent-1"}

    def first() -> None:
        with api.client(Role.AGENT) as client:
            told.append(client.call("Proposals/SubmitProposal", **fields).state)

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert begun.wait(20)
        with api.client(Role.AGENT) as client, pytest.raises(ApiError) as refused:
            client.call("Proposals/SubmitProposal", **fields | {"name": "other"})
    finally:
        go_on.set()
        thread.join(30)
    assert (refused.value.id, refused.value.status) == ("proposal.busy", "RESOURCE_EXHAUSTED")
    assert told == ["refused"]  # that source is no runbook; it was examined to the end


def _id(failure: Any) -> str:
    sent = dict(failure.trailing_metadata())["pointcall-error"]
    return str(json.loads(sent)["id"])


def test_a_refused_manifest_is_an_answer_with_every_check(api: Api) -> None:
    with api.client(Role.OPERATOR) as client:
        refused = client.call("Control/Arm")
        armed = client.call("Control/Arm", bundles=[b"{}"], files={"a.wasm": b"\0asm"})
    assert not refused.armed
    assert [(c.id, c.outcome) for c in refused.checks] == [("manifest.unsigned", "fail")]
    assert armed.armed
    assert armed.tier == "emulated"
    assert api.backend.asked[-1] == ("arm", (b"{}",), {"a.wasm": b"\0asm"})


def test_a_bug_leaves_without_its_text(api: Api) -> None:
    api.backend.refuse_with = RuntimeError("secret path /etc")
    with api.client(Role.AGENT) as client, pytest.raises(ApiError) as refusal:
        client.call("Status/GetStatus")
    assert refusal.value.status == "INTERNAL"
    assert "secret" not in str(refusal.value)


def test_calls_are_counted_and_handed_over_once(api: Api) -> None:
    with api.client(Role.AGENT) as client:
        client.call("Status/GetStatus")
        client.call("Status/GetStatus")
        with pytest.raises(ApiError):
            client.call("Control/Disarm")
    api.server.flush()
    api.server.flush()
    assert [(a.role, a.method, a.count) for a in api.backend.accesses] == [
        ("agent", "pointcall.v1.Control/Disarm (denied)", 1),
        ("agent", "pointcall.v1.Status/GetStatus", 2),
    ]


def test_standard_health(api: Api) -> None:
    with grpc.insecure_channel(f"unix:{api.server.socket(Role.RELYING_PARTY)}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest(service="pointcall.v1.Status"), timeout=5).status == 1
        api.server.set_serving(False)
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status == 2


def test_standard_reflection(api: Api) -> None:
    with grpc.insecure_channel(f"unix:{api.server.socket(Role.AUDITOR)}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        names = {s.name for s in next(stub.ServerReflectionInfo(ask, timeout=5)).list_services_response.service}
    assert {"pointcall.v1.Runs", "pointcall.v1.Status", "pointcall.v1.Proposals", "pointcall.v1.Control"} <= names


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_stranger_cannot_open_any_socket(api: Api) -> None:
    """The mode is the permission: another user without the group gets no connection at all."""
    folder = api.server.socket(Role.AGENT).parent
    folder.parent.chmod(0o755)
    program = (
        "import os, socket, sys\nos.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for path in sys.argv[1:]:\n"
        "    try: socket.socket(socket.AF_UNIX).connect(path); print('in')\n"
        "    except PermissionError: print('denied')\n"
    )
    paths = [str(api.server.socket(role)) for role in Role]
    done = subprocess.run([sys.executable, "-I", "-c", program, *paths], capture_output=True, check=True)
    assert done.stdout.split() == [b"denied"] * len(Role)
