"""Services of kind `kubernetes` against a small strict API server, and against a real one where KUBECONFIG is set."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pointcall_executor.services import cluster, kubernetes
from pointcall_executor.services.cluster import Cluster
from pointcall_executor.services.kubernetes import KubernetesService
from pointcall_executor.services.managed import ServiceError
from tests.unit.services.apiserver import IMAGE, PODS, TOKEN, ApiServer
from tests.unit.services.world import declared

WEB = {
    "namespace": "shop",
    "workload": "Deployment/web",
    "selector": {"app": "web"},
    "images": {"web": IMAGE},
    "replicas": 2,
    "timeout_ms": 3000,
}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "LOOK_SECONDS", 0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(tmp_path) as server:
        yield server


def service(server: ApiServer, **over: Any) -> KubernetesService:
    return KubernetesService(declared("kubernetes", "web", WEB | over), Cluster(server.kubeconfig()), threading.Event())


def test_pods_are_evicted_by_uid_and_version_and_replaced(server: ApiServer) -> None:
    before = {p["metadata"]["uid"]: p["metadata"]["resourceVersion"] for p in server.pods.values()}
    one = service(server)
    assert one.healthy() == ""
    one.destroy(1_500_000_000)
    started = one.start()
    given = [e["deleteOptions"] for e in server.evictions]
    assert {g["preconditions"]["uid"]: g["preconditions"]["resourceVersion"] for g in given} == before
    assert [g["gracePeriodSeconds"] for g in given] == [2, 2]
    assert not before.keys() & {p["metadata"]["uid"] for p in server.pods.values()}
    assert started.ready_for == "2 pods of Deployment/web are ready"
    assert (started.pid, started.cgroup_id) == (0, 0)
    assert one.running


def test_a_budget_of_one_lets_pods_go_one_after_the_other(server: ApiServer) -> None:
    server.budget = 1
    least: list[int] = []
    server.looks_until_ready = 1

    def replaced(s: ApiServer, _name: str) -> None:
        least.append(s.ready_pods())
        if len(least) > 3:  # the replacement takes a while
            for name in s.pods:
                s.set_ready(name, True)

    server.before_eviction = replaced
    one = service(server)
    one.destroy(0)
    one.start()
    assert len(server.evictions) == 2
    assert min(least) == 1


def test_a_budget_that_allows_nothing_is_an_error_and_nothing_is_forced(server: ApiServer) -> None:
    server.budget = 0
    with pytest.raises(ServiceError) as refusal:
        service(server, timeout_ms=50).destroy(0)
    assert refusal.value.id == "service.budget"
    assert "disruption budget" in refusal.value.got
    assert server.evictions == []
    assert len(server.pods) == 2


def test_a_pod_that_was_written_to_meanwhile_is_looked_at_again(server: ApiServer) -> None:
    times = iter(range(100))
    server.before_eviction = lambda s, name: s.touch(name) if next(times) < 3 else None
    service(server).destroy(0)
    assert len(server.evictions) == 2


def test_a_pod_that_changes_all_the_time_is_given_up(server: ApiServer) -> None:
    server.before_eviction = lambda s, name: s.touch(name)
    with pytest.raises(ServiceError) as refusal:
        service(server).destroy(0)
    assert refusal.value.got.startswith("409 Conflict")
    assert server.evictions == []


def test_another_pod_of_the_same_name_is_left_alone(server: ApiServer) -> None:
    server.replaces = False

    def replaced(s: ApiServer, name: str) -> None:
        s.pods[name]["metadata"]["uid"] = "another"
        s.touch(name)

    server.before_eviction = replaced
    service(server).destroy(0)
    assert server.evictions == []
    assert len(server.pods) == 2


def test_a_pod_that_is_gone_or_leaving_is_no_error(server: ApiServer) -> None:
    first = next(iter(server.pods))
    server.pods[first]["metadata"]["deletionTimestamp"] = "2026-11-23T00:00:00Z"
    server.before_eviction = lambda s, name: s.pods.pop(name) and None
    service(server).destroy(0)
    assert server.evictions == []


def test_a_workload_with_another_image_is_neither_evicted_nor_waited_for(server: ApiServer) -> None:
    server.image = IMAGE.replace("a" * 64, "b" * 64)
    one = service(server)
    for ask in (lambda: one.destroy(0), one.start):
        with pytest.raises(ServiceError) as refusal:
            ask()
        assert refusal.value.id == "service.image"
    assert server.evictions == []
    assert "not as declared" in one.adopt()


def test_a_workload_that_is_absent_or_selects_otherwise_is_refused(server: ApiServer) -> None:
    assert "not as declared" in service(server, workload="Deployment/other").adopt()
    server.selector = {"app": "web", "tier": "gold"}
    assert "not as declared" in service(server).adopt()


def test_replacements_that_do_not_become_ready_are_an_error(server: ApiServer) -> None:
    one = service(server, timeout_ms=100)
    server.looks_until_ready = 10_000
    one.destroy(0)
    with pytest.raises(ServiceError) as refusal:
        one.start()
    assert (refusal.value.id, refusal.value.got) == ("service.not-ready", "0 of 2 pods are ready")
    assert not one.running
    assert one.healthy() == "0 of 2 pods are ready"


def test_what_runs_as_declared_is_taken_over(server: ApiServer) -> None:
    assert service(server).adopt() == ""
    server.set_ready(next(iter(server.pods)), False)
    server.looks_until_ready = 10_000
    assert service(server).adopt() == "1 of 2 pods are ready"
    assert server.evictions == []


def test_who_ends_waits_for_no_cluster(server: ApiServer) -> None:
    hurried = threading.Event()
    body = WEB | {"replicas": 9, "timeout_ms": 600_000}
    one = KubernetesService(declared("kubernetes", "web", body), Cluster(server.kubeconfig()), hurried)
    threading.Timer(0.2, hurried.set).start()
    with pytest.raises(ServiceError) as refusal:
        one.start()
    assert (refusal.value.id, refusal.value.got) == ("service.not-ready", "2 of 9 pods are ready")


def test_what_it_cannot_do_it_says(server: ApiServer) -> None:
    one = service(server)
    assert one.abilities == frozenset()
    for ask in (lambda: one.signal(15), lambda: one.freeze(1), one.thaw):
        with pytest.raises(ServiceError) as refusal:
            ask()
        assert refusal.value.id == "service.ability"


# ---- the client ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "user", "got"),
    [
        ({"server": "http://127.0.0.1:1"}, None, "https"),
        ({"server": "https://u@127.0.0.1:1"}, None, "https"),
        ({"insecure-skip-tls-verify": True}, None, "insecure-skip-tls-verify"),
        ({"proxy-url": "http://p"}, None, "proxy-url"),
        ({"certificate-authority-data": "!"}, None, "kubeconfig"),
        (None, {"exec": {"command": "x"}}, "exec is refused"),
        (None, {"auth-provider": {}}, "auth-provider is refused"),
        (None, {"username": "a", "password": "b"}, "username is refused"),
        (None, {"token": "two words"}, "token"),
        (None, {"token": "line\nbreak"}, "token"),
    ],
)
def test_a_kubeconfig_that_is_not_safe_is_refused(
    server: ApiServer, cluster: dict[str, Any] | None, user: dict[str, Any] | None, got: str
) -> None:
    with pytest.raises(ServiceError) as refusal:
        Cluster(server.kubeconfig(cluster=cluster, user=user)).ask("GET", PODS)
    assert refusal.value.id == "service.kubeconfig"
    assert got in refusal.value.got


def test_an_answer_that_comes_a_byte_at_a_time_is_given_up(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.5)
    server.drip_seconds = 0.1
    begin = time.monotonic()
    with pytest.raises(ServiceError, match="does not answer"):
        Cluster(server.kubeconfig()).ask("GET", f"{PODS}?labelSelector=app%3Dweb")
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("content", ["", "[]", "a: [", "current-context: x\ncontexts: []\n", "\x00"])
def test_a_file_that_is_no_kubeconfig_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "k").write_text(content)
    for path in (tmp_path / "k", tmp_path / "absent", None):
        with pytest.raises(ServiceError) as refusal:
            Cluster(path).ask("GET", PODS)
        assert refusal.value.id == "service.kubeconfig"


def test_a_server_with_another_certificate_is_not_spoken_to(server: ApiServer, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with ApiServer(other) as second:
        document = second.kubeconfig().read_text()
        config = server.kubeconfig()
        authority = next(line for line in document.splitlines() if "certificate-authority-data" in line)
        lines = [authority if "certificate-authority-data" in row else row for row in config.read_text().splitlines()]
        config.write_text("\n".join(lines))
        with pytest.raises(ServiceError) as refusal:
            Cluster(config).ask("GET", PODS)
    assert "CERTIFICATE_VERIFY_FAILED" in refusal.value.got


def test_credentials_may_be_files_and_a_new_token_is_read(server: ApiServer, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("wrong\n")
    config = server.kubeconfig(user={"tokenFile": "token"})
    cluster = Cluster(config)
    with pytest.raises(ServiceError) as refusal:
        cluster.ask("GET", PODS + "?labelSelector=app%3Dweb")
    assert refusal.value.got.startswith("401")
    token.write_text(f"{TOKEN}\n")
    assert len(cluster.ask("GET", PODS + "?labelSelector=app%3Dweb")["items"]) == 2
    token.unlink()
    with pytest.raises(ServiceError) as refusal:
        cluster.ask("GET", PODS)
    assert refusal.value.id == "service.kubeconfig"


def test_an_answer_that_is_no_object_is_an_error(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "get", lambda _path, _query: (200, [1]))
    with pytest.raises(ServiceError) as refusal:
        Cluster(server.kubeconfig()).ask("GET", PODS)
    assert "no JSON object" in refusal.value.got
    monkeypatch.setattr(server, "get", lambda _path, _query: (200, {"items": [{"metadata": {}}]}))
    with pytest.raises(ServiceError) as refusal:
        service(server).healthy()
    assert refusal.value.id == "service.manager"


REAL = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: web, image: IMAGE}]}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: web}
spec: {minAvailable: 1, selector: {matchLabels: {app: web}}}
"""


@pytest.mark.skipif(
    not {"KUBECONFIG", "POINTCALL_KUBERNETES_IMAGE"} <= os.environ.keys(),
    reason="needs KUBECONFIG and POINTCALL_KUBERNETES_IMAGE, an image by digest that runs without arguments",
)
def test_a_real_cluster() -> None:
    image, namespace = os.environ["POINTCALL_KUBERNETES_IMAGE"], f"pointcall-test-{os.getpid()}"

    def kubectl(*words: str, input: str = "") -> str:
        return subprocess.run(
            ["kubectl", *words], input=input, text=True, check=True, capture_output=True, timeout=180
        ).stdout

    kubectl("create", "namespace", namespace)
    try:
        kubectl("-n", namespace, "apply", "-f", "-", input=REAL.replace("IMAGE", json.dumps(image)))
        kubectl("-n", namespace, "rollout", "status", "deployment/web", "--timeout=150s")
        body = WEB | {"namespace": namespace, "images": {"web": image}, "timeout_ms": 120_000}
        one = KubernetesService(
            declared("kubernetes", "web", body), Cluster(Path(os.environ["KUBECONFIG"])), threading.Event()
        )
        before = {p.uid for p in one._pods()}
        assert one.adopt() == ""
        one.destroy(1_000_000_000)
        one.start()
        assert not before & {p.uid for p in one._pods() if p.ready}
    finally:
        kubectl("delete", "namespace", namespace, "--wait=false")
