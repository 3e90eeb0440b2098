"""Declarations of every kind: what is accepted, what is refused, and what a change of one means."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointcall_attest.declaration import ServiceDeclaration
from pointcall_attest.errors import MalformedError
from pointcall_attest.service_diff import declaration_changes
from pointcall_executor import cli
from tests.unit.services.world import declared
from tests.unit.signing.world import service, statement

DIGEST = "a" * 64
KINDS: dict[str, dict[str, Any]] = {
    "process": {"argv": ["/bin/a"], "files": [{"path": "/bin/a", "sha256": DIGEST}]},
    "systemd": {
        "unit": "web.service",
        "fragment": "/etc/systemd/system/web.service",
        "files": [{"path": "/etc/systemd/system/web.service", "sha256": DIGEST}],
    },
    "container": {"image": f"localhost/web@sha256:{DIGEST}"},
    "kubernetes": {
        "namespace": "shop",
        "workload": "Deployment/web",
        "selector": {"app": "web"},
        "images": {"web": f"registry.example/web@sha256:{DIGEST}"},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_least_declaration_of_each_kind(kind: str) -> None:
    one = declared(kind, "web", KINDS[kind])
    assert (one.name, one.kind) == ("web", kind)
    assert one.grace_ms > 0


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("process", {"ready": {"http": {}}}),
    ("process", {"ready": {"tcp": "127.0.0.1:0"}}),
    ("process", {"ready": {"tcp": "127.0.0.1:65536"}}),
    ("process", {"ready": {"tcp": "300.0.0.1:80"}}),
    ("process", {"ready": {"tcp": "127.0.0.1:80", "http": {"path": "no-slash"}}}),
    ("process", {"ready": {"tcp": "127.0.0.1:80", "http": {"path": "/a b"}}}),
    ("process", {"ready": {"tcp": "127.0.0.1:80", "http": {"path": "/\r\nHost: evil"}}}),
    ("process", {"ready": {"tcp": "127.0.0.1:80", "http": {"status": 99}}}),
    ("process", {"ready": {"tcp": "127.0.0.1:80"}, "namespaces": ["network"]}),
    ("systemd", {"unit": "web.socket"}),
    ("systemd", {"unit": "../web.service"}),
    ("systemd", {"fragment": "/etc/other.service"}),
    ("systemd", {"files": []}),
    ("container", {"image": "localhost/web:latest"}),
    ("container", {"image": f"localhost/web@sha256:{DIGEST[:-1]}"}),
    ("container", {"image": f"-v/:/@sha256:{DIGEST}"}),
    ("container", {"network": "bridge"}),
    ("container", {"ready": {"tcp": "127.0.0.1:80"}}),
    ("container", {"capabilities": ["ALL"]}),
    ("container", {"mounts": [{"source": "/a/../etc", "target": "/etc"}]}),
    ("container", {"mounts": [{"source": "relative", "target": "/etc"}]}),
    ("container", {"user": "root;id"}),
    ("container", {"privileged": True}),
    ("kubernetes", {"images": {"web": "registry.example/web:1"}}),
    ("kubernetes", {"images": {}}),
    ("kubernetes", {"selector": {}}),
    ("kubernetes", {"selector": {"app": "a,b"}}),
    ("kubernetes", {"selector": {"app": "a=b"}}),
    ("kubernetes", {"namespace": "a/b"}),
    ("kubernetes", {"workload": "Pod/web"}),
    ("kubernetes", {"workload": "Deployment/../secrets"}),
    ("kubernetes", {"replicas": 0}),
]


@pytest.mark.parametrize(("kind", "over"), WRONG)
def test_what_is_refused(kind: str, over: dict[str, Any]) -> None:
    with pytest.raises(MalformedError) as refusal:
        declared(kind, "web", KINDS[kind] | over)
    assert refusal.value.id == "service.malformed"


@pytest.mark.parametrize(("kind", "other"), [("process", "systemd"), ("container", "process")])
def test_kind_and_body_belong_together(kind: str, other: str) -> None:
    body = {"format": "pointcall-service/v1", "name": "web", "kind": kind, other: KINDS[other]}
    for wrong in (body, body | {kind: KINDS[kind]}, body | {"kind": "shell"}):
        with pytest.raises(MalformedError):
            ServiceDeclaration.parse(json.dumps(wrong).encode())


@given(st.sampled_from(sorted(KINDS)), st.binary(max_size=200), st.integers(0, 300))
def test_nothing_but_the_declared_error_comes_out(kind: str, noise: bytes, at: int) -> None:
    raw = json.dumps({"format": "pointcall-service/v1", "name": "web", "kind": kind, kind: KINDS[kind]}).encode()
    with contextlib.suppress(MalformedError):
        parsed = ServiceDeclaration.parse(raw[:at] + noise + raw[at + len(noise) :])
        assert parsed.kind == kind


CHANGES: list[tuple[str, dict[str, Any], dict[str, Any], list[tuple[str, str]]]] = [
    ("container", {}, {"capabilities": ["CAP_NET_RAW"]}, [("grants", "capabilities CAP_NET_RAW")]),
    ("container", {"capabilities": ["CAP_NET_RAW"]}, {}, [("revokes", "capabilities CAP_NET_RAW is dropped")]),
    ("container", {}, {"network": "host"}, [("grants", "network none -> host")]),
    ("container", {"read_only_root": False}, {}, [("revokes", "read_only_root False -> True")]),
    (
        "container",
        {},
        {"mounts": [{"source": "/a", "target": "/b", "read_only": False}]},
        [("grants", "mounts source=/a target=/b read_only=False")],
    ),
    ("process", {"namespaces": ["pid"]}, {}, [("grants", "namespaces pid is dropped")]),
    ("process", {}, {"limits": {"processes": 5}}, [("revokes", "limits processes unset -> 5")]),
    ("process", {"limits": {"processes": 5}}, {"limits": {"processes": 6}}, [("grants", "limits processes 5 -> 6")]),
    ("process", {}, {"user": "web"}, [("changes", "user unset -> web")]),
    (
        "process",
        {},
        {"files": [{"path": "/bin/a", "sha256": "b" * 64}]},
        [("changes", f"file /bin/a {DIGEST[:16]}... -> {'b' * 16}...")],
    ),
    ("kubernetes", {}, {"replicas": 2}, [("changes", "replicas 1 -> 2")]),
    ("systemd", {}, {}, []),
]


@pytest.mark.parametrize(("kind", "before", "after", "said"), CHANGES)
def test_what_a_change_means(
    kind: str, before: dict[str, Any], after: dict[str, Any], said: list[tuple[str, str]]
) -> None:
    found = declaration_changes(declared(kind, "web", KINDS[kind] | before), declared(kind, "web", KINDS[kind] | after))
    assert [(c.effect, c.text.removeprefix("service web: ")) for c in found] == said


def test_another_kind_is_one_change() -> None:
    old, new = (declared(kind, "web", KINDS[kind]) for kind in ("process", "container"))
    assert [c.text for c in declaration_changes(old, new)] == ["service web: declared as container, was process"]


def test_the_command_speaks_of_declarations_that_lie_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, capabilities in (("old", []), ("new", ["CAP_NET_RAW"])):
        body = {"format": "pointcall-service/v1", "name": "db", "kind": "container"}
        raw = json.dumps(body | {"container": KINDS["container"] | {"capabilities": capabilities}}).encode()
        file = tmp_path / name / "files/services/db.json"
        file.parent.mkdir(parents=True)
        file.write_bytes(raw)
        row = service(digest=hashlib.sha256(raw).hexdigest(), kind="container")
        (tmp_path / name / "manifest.json").write_bytes(statement(services=[row]))
    assert cli.main(["manifest", "diff", str(tmp_path / "old/manifest.json"), str(tmp_path / "new/manifest.json")]) == 0
    assert "grants   service db: capabilities CAP_NET_RAW\n" in capsys.readouterr().out
    (tmp_path / "new/files/services/db.json").write_bytes(b"another file")
    assert cli.main(["manifest", "diff", str(tmp_path / "old/manifest.json"), str(tmp_path / "new/manifest.json")]) == 0
    assert "CAP_NET_RAW" not in capsys.readouterr().out
