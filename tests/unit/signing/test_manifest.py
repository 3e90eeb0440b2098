"""The forms of manifest and declaration: what is accepted, and every rule that refuses something."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pointcall_attest import canonical
from pointcall_attest.declaration import ServiceDeclaration
from pointcall_attest.errors import MalformedError
from pointcall_attest.manifest import Circuit, Manifest, build_statement
from tests.unit.signing.world import NOW, declaration, files, runbook, service, sha256, statement, z

GRANTS = {"actions": ["recreate"], "services": ["db"]}


def place(**over: Any) -> dict[str, Any]:
    return {"address": "127.0.0.1", "port": 5432, "protocol": "tcp"} | over


CIRCUIT = {
    "threshold": 3, "window_ms": 5000, "cooldown_ms": 250, "percent": 50, "min_attempts": 10,
    "refuse_errno": "ECONNREFUSED", "abandoned": False,
}  # fmt: skip


def test_a_destination_with_values_of_its_own() -> None:
    raw = statement(services=[service(listen=[place(circuit=CIRCUIT), place(port=1, circuit={"threshold": 1})])])
    manifest = Manifest.parse(raw)
    full, one = (row.circuit for row in manifest.service("db").listen)
    assert full is not None
    assert one is not None
    assert {name: getattr(full, name) for name in Circuit.model_fields} == CIRCUIT
    assert one.model_dump() == {"threshold": 1}
    rebuilt = Manifest.parse(build_statement(files(), manifest.predicate))
    assert json.loads(rebuilt.payload)["predicate"]["services"] == json.loads(raw)["predicate"]["services"]


def test_what_is_not_set_is_not_written() -> None:
    """A manifest from before there were circuits: its bytes are the same, so is its digest."""
    predicate = Manifest.parse(statement()).predicate
    assert b'"circuit"' not in build_statement(files(), predicate)
    assert predicate.services[0].listen[0].model_dump() == place()


def test_the_good_manifest() -> None:
    manifest = Manifest.parse(statement())
    assert manifest.sha256 == sha256(statement())
    assert (manifest.name, manifest.sequence) == ("edge", 7)
    assert manifest.subjects == {name: sha256(content) for name, content in files().items()}
    assert manifest.service("db").listen[0].port == 5432
    assert manifest.channels[0].name == "oncall"
    assert manifest.measurements("snp") == ("cd" * 48,)
    assert manifest.measurements("sgx") == ()
    with pytest.raises(KeyError):
        manifest.runbook("none")


@pytest.mark.parametrize(
    "over",
    [
        {"format": "pointcall-manifest/v2"},
        {"name": "edge\n"},
        {"name": "ed ge"},
        {"name": "é"},
        {"sequence": 0},
        {"sequence": -1},
        {"sequence": "7"},
        {"sequence": True},
        {"previous": "AB" * 32},
        {"not_before": "2026-11-23"},
        {"not_before": "2026-11-23T00:00:00+00:00"},
        {"not_before": "2026-13-23T00:00:00Z"},
        {"not_before": 0},
        {"not_before": z(NOW), "expires": z(NOW)},
        {"runbooks": [runbook(), runbook()]},
        {"services": [service(), service()]},
        {"runbooks": [runbook(events=[])]},
        {"runbooks": [runbook(events=["ProcessExited", "ProcessExited"])]},
        {"runbooks": [runbook(events=["NoSuchEvent"])]},
        {"runbooks": [runbook(grants={"actions": ["no_such_action"]})]},
        {"runbooks": [runbook(grants={"actions": ["recreate", "recreate"]})]},
        {"runbooks": [runbook(grants={"services": ["db", "db"]})]},
        {"runbooks": [runbook(grants={"networks": ["10.0.0.1/8"]})]},
        {"runbooks": [runbook(grants={"networks": ["10.0.0.0/8", "10.0.0.0/8"]})]},
        {"runbooks": [runbook(grants={"networks": ["anything"]})]},
        {"runbooks": [runbook(grants={"everything": True})]},
        {"runbooks": [runbook(mode="yolo")]},
        {"runbooks": [runbook(module="../a.wasm")]},
        {"runbooks": [runbook(module="/a.wasm")]},
        {"runbooks": [runbook(module="a//b.wasm")]},
        {"runbooks": [runbook(module=".hidden")]},
        {"runbooks": [runbook(version=0)]},
        {"runbooks": [runbook(parameters={"a b": 1})]},
        {"runbooks": [runbook(limits={"per_minute": 0})]},
        {"services": [service(listen=[{"address": "127.0.0.1", "port": 0}])]},
        {"services": [service(listen=[{"address": "127.0.0.1", "port": 65536}])]},
        {"services": [service(listen=[{"address": "localhost", "port": 1}])]},
        {"services": [service(listen=[place(circuit={})])]},
        {"services": [service(listen=[place(circuit={"treshold": 3})])]},
        {"services": [service(listen=[place(circuit={"threshold": 0})])]},
        {"services": [service(listen=[place(circuit={"threshold": 16_384})])]},
        {"services": [service(listen=[place(circuit={"threshold": "3"})])]},
        {"services": [service(listen=[place(circuit={"threshold": True})])]},
        {"services": [service(listen=[place(circuit={"window_ms": 0})])]},
        {"services": [service(listen=[place(circuit={"window_ms": 86_400_001})])]},
        {"services": [service(listen=[place(circuit={"cooldown_ms": 0})])]},
        {"services": [service(listen=[place(circuit={"cooldown_ms": 86_400_001})])]},
        {"services": [service(listen=[place(circuit={"percent": 101})])]},
        {"services": [service(listen=[place(circuit={"percent": 0})])]},
        {"services": [service(listen=[place(circuit={"min_attempts": 0})])]},
        {"services": [service(listen=[place(circuit={"refuse_errno": 111})])]},
        {"services": [service(listen=[place(circuit={"refuse_errno": "EINPROGRESS"})])]},
        {"services": [service(listen=[place(circuit={"abandoned": 1})])]},
        {"services": [service(listen=[place(protocol="udp", circuit={"abandoned": False})])]},
        {"services": [service(listen=[{"address": "0:0::1", "port": 1}])]},
        {"services": [service(kind="magic")]},
        {"guard": {"max_actions_per_minute": 10.5}},
        {"guard": None},
        {"reference_values": {"snp": ["00" * 32]}},
        {"min_executor": "1.0"},
        {"min_executor": "01.0.0"},
        {"surprise": None},
    ],
)
def test_predicates_that_are_refused(over: dict[str, Any]) -> None:
    try:
        payload = statement(**over)
    except ValueError:  # a fraction has no canonical form
        payload = json.dumps(json.loads(statement())["predicate"] | over).encode()
    with pytest.raises(MalformedError) as caught:
        Manifest.parse(payload)
    assert caught.value.id == "manifest.form"


@pytest.mark.parametrize(
    "change",
    [
        {"_type": "https://in-toto.io/Statement/v0.1"},
        {"predicateType": "https://pointcall.dev/manifest/v2"},
        {"subject": []},
        {"subject": [{"name": "a", "digest": {"sha256": "00" * 32}}] * 2},
        {"subject": [{"name": "a", "digest": {"sha1": "00" * 20}}]},
        {"subject": [{"name": "a", "digest": {"sha256": "00" * 32, "sha1": "00" * 20}}]},
        {"subject": [{"name": "../a", "digest": {"sha256": "00" * 32}}]},
        {"subject": [{"name": "a", "digest": {"sha256": "00" * 32}, "uri": "x"}]},
        {"extra": 1},
    ],
)
def test_statements_that_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedError) as caught:
        Manifest.parse(canonical.dumps(json.loads(statement()) | change))
    assert caught.value.id == "manifest.form"


def test_only_the_canonical_form_is_accepted() -> None:
    value = json.loads(statement())
    for raw in (
        json.dumps(value).encode(),
        json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\n",
        statement().replace(b'"sequence":7', b'"sequence":7,"sequence":7'),
        statement().replace(b'"sequence":7', b'"sequence":7.0'),
        statement().replace(b'"sequence":7', b'"sequence":7e0'),
        b"\xef\xbb\xbf" + statement(),
        statement() + b" " * 200_000,
    ):
        with pytest.raises(MalformedError) as caught:
            Manifest.parse(raw)
        assert caught.value.id == "manifest.form"


@pytest.mark.parametrize(
    "process",
    [
        {"argv": []},
        {"argv": ["/bin/other"]},
        {"argv": ["/usr/bin/db", "a\x00b"]},
        {"files": []},
        {"files": [{"path": "usr/bin/db", "sha256": "ab" * 32}]},
        {"files": [{"path": "/usr/../bin/db", "sha256": "ab" * 32}]},
        {"files": [{"path": "/usr//bin/db", "sha256": "ab" * 32}]},
        {"files": [{"path": "/usr/bin/db", "sha256": "ab" * 32}] * 2},
        {"files": [{"path": "/usr/bin/db", "sha256": "ab"}]},
        {"environment": {"A=B": "c"}},
        {"environment": {"A": "c\x00"}},
        {"user": "Root"},
        {"no_new_privileges": False},
        {"namespaces": ["pid", "pid"]},
        {"namespaces": ["user"]},
        {"limits": {"memory_bytes": 1}},
        {"stop": {"signal": "STOP"}},
        {"stop": {"grace_ms": -1}},
        {"ready": {"tcp": "localhost:80"}},
        {"ready": {"timeout_ms": 0}},
        {"shell": True},
    ],
)
def test_declarations_that_are_refused(process: dict[str, Any]) -> None:
    with pytest.raises(MalformedError) as caught:
        ServiceDeclaration.parse(declaration(**process))
    assert caught.value.id == "service.malformed"


def test_a_full_declaration() -> None:
    given = ServiceDeclaration.parse(
        declaration(
            environment={"A": "b"},
            directory="/srv",
            user="db",
            group="db",
            limits={"memory_bytes": 1 << 28, "processes": 8},
            namespaces=["mount", "pid"],
            stop={"signal": "INT", "grace_ms": 10},
            ready={"tcp": "[::1]:5432", "timeout_ms": 100},
        )
    )
    assert given.process.stop.grace_ms == 10
    assert given.process.namespaces == ("mount", "pid")
