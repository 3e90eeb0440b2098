"""Services of kind `kubernetes`: pods are evicted, and their workload replaces them from its declared template.

Destroy = see that the workload's template names exactly the declared images, then evict each pod of it by name, uid
and resourceVersion: what is not the pod that was looked at stays, and so does one that a disruption budget protects.
Start = wait until as many other pods as declared are ready, with the declared images. Nothing is written but evictions.
Source: Kubernetes API v1, policy/v1 Eviction, apps/v1.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlencode

from pointcall_attest.declaration import Kubernetes, ServiceDeclaration
from pointcall_executor.services.cluster import Cluster, Conflict, NotFound, TooManyDisruptions
from pointcall_executor.services.managed import ABILITIES, OnCgroup, ServiceError, Started, cannot, nobody

LOOK_SECONDS: Final = 0.2
CONFLICTS_MAX: Final = 20  # times that a pod may change between being looked at and being evicted
_KINDS: Final = {"Deployment": "deployments", "StatefulSet": "statefulsets", "DaemonSet": "daemonsets"}


@dataclass(frozen=True, slots=True)
class Pod:
    """What matters of a pod. `ready`: the kubelet says so, and it is not on its way out."""

    name: str
    uid: str
    version: str
    ready: bool
    leaving: bool
    images: Mapping[str, str]  # container -> image, as the pod names it


def pod_of(row: Mapping[str, Any]) -> Pod:
    """Of a pod in JSON. ServiceError `service.manager` where it has not the fields that every pod has."""
    try:
        meta, status = row["metadata"], row.get("status") or {}
        leaving = "deletionTimestamp" in meta
        conditions = {c["type"]: c["status"] for c in status.get("conditions") or ()}
        containers = row["spec"]["containers"]
        images = {c["name"]: c["image"] for c in containers}
        ready = conditions.get("Ready") == "True" and not leaving
        return Pod(meta["name"], meta["uid"], meta["resourceVersion"], ready, leaving, images)
    except (KeyError, TypeError) as error:
        raise _unexpected(error) from error


def _unexpected(error: Exception) -> ServiceError:
    return ServiceError("the API server answers something else", id="service.manager", got=repr(error))


class KubernetesService:
    """One declared workload. It has no process on this node: no signal, no freeze, no cgroup."""

    def __init__(self, declaration: ServiceDeclaration, cluster: Cluster, hurried: threading.Event) -> None:
        """Once `hurried` is set nobody waits for the cluster: it goes on by itself, and the next executor looks."""
        assert isinstance(declaration.body, Kubernetes)
        self.declaration, self._declared = declaration, declaration.body
        self.name = declaration.name
        self.abilities = ABILITIES["kubernetes"]
        self.ours = False
        self._cluster, self._hurried = cluster, hurried
        self._lock = threading.RLock()
        self._replaced: frozenset[str] = frozenset()  # uids of pods that were evicted and not yet replaced
        self.pid = self.cgroup_id = 0

    # ---- what there is ---------------------------------------------------------------------------------------------

    def _pods(self) -> list[Pod]:
        labels = ",".join(f"{key}={value}" for key, value in sorted(self._declared.selector.items()))
        path = f"/api/v1/namespaces/{self._declared.namespace}/pods?{urlencode({'labelSelector': labels})}"
        rows = self._cluster.ask("GET", path).get("items") or []
        return [pod_of(row) for row in rows if (row.get("status") or {}).get("phase") not in ("Succeeded", "Failed")]

    def _check(self) -> None:
        """That the workload makes pods of exactly the declared images. ServiceError `service.image`."""
        kind, _, name = self._declared.workload.partition("/")
        path = f"/apis/apps/v1/namespaces/{self._declared.namespace}/{_KINDS[kind]}/{quote(name)}"
        try:
            spec = self._cluster.ask("GET", path)["spec"]
            rows = spec["template"]["spec"]["containers"]
            images = {row["name"]: row["image"] for row in rows}
            selector = (spec.get("selector") or {}).get("matchLabels") or {}
        except NotFound:
            raise self._other("no such workload") from None
        except (KeyError, TypeError) as error:
            raise ServiceError(
                "the API server answers something else", id="service.manager", got=repr(error)
            ) from error
        if images != self._declared.images:
            raise self._other(", ".join(f"{n}: {i}" for n, i in sorted(images.items())))
        if not selector.items() <= self._declared.selector.items():
            raise self._other(f"its selector {selector}")

    def _other(self, got: str) -> ServiceError:
        want = ", ".join(f"{n}: {i}" for n, i in sorted(self._declared.images.items()))
        hint = "declare and sign what the workload names, or put the workload back"
        return ServiceError(
            f"{self._declared.workload} is not as declared", id="service.image", want=want, got=got, hint=hint
        )

    def _unready(self, pods: Iterable[Pod]) -> str:
        good = [p for p in pods if p.ready and p.uid not in self._replaced and p.images == self._declared.images]
        want = self._declared.replicas
        return "" if len(good) >= want else f"{len(good)} of {want} pods are ready"

    @property
    def running(self) -> bool:
        """Whether any declared pod is ready. A cluster that does not answer says nothing of the kind."""
        try:
            return any(p.ready and p.images == self._declared.images for p in self._pods())
        except ServiceError:
            return False

    @property
    def held(self) -> bool:
        """The cluster holds it."""
        return True

    def found_in(self) -> int:
        return 0

    def alive(self) -> int:
        return 0

    def healthy(self) -> str:
        return self._unready(self._pods())

    # ---- start and stop --------------------------------------------------------------------------------------------

    def adopt(self) -> str:
        """The cluster keeps it running, not the executor: it is taken over if it is what is declared. Otherwise it is
        left alone, since evicting would only make the same pods again."""
        try:
            self._check()
            return self.healthy()
        except ServiceError as error:
            return error.message

    def start(self, on_cgroup: OnCgroup = nobody) -> Started:
        """Wait until as many pods as declared are ready that are not the evicted ones. ServiceError if not in time."""
        begin = time.monotonic_ns()
        with self._lock:
            self._check()
            verified = time.monotonic_ns()
            deadline = time.monotonic() + self._declared.timeout_ms / 1000
            while wrong := self._unready(self._pods()):
                if self._over(deadline):
                    want = f"{self._declared.replicas} ready pods within {self._declared.timeout_ms} ms"
                    raise ServiceError(f"{self.name} is not ready", id="service.not-ready", want=want, got=wrong)
            self._replaced = frozenset()
        ready = time.monotonic_ns()
        what = f"{self._declared.replicas} pods of {self._declared.workload} are ready"
        return Started(0, 0, len(self._declared.images), verified - begin, 0, ready - verified, what)

    def destroy(self, grace_ns: int) -> int:
        """Evict every pod; ns that it took. No pod is no error. Where a disruption budget allows one at a time, the
        next waits for the replacement. ServiceError `service.budget` if it allows none in time."""
        begin = time.monotonic_ns()
        with self._lock:
            self._check()
            deadline = time.monotonic() + self._declared.timeout_ms / 1000
            for pod in self._pods():
                if not pod.leaving:
                    self._evict(pod, grace_ns, deadline)
                self._replaced |= {pod.uid}
        return time.monotonic_ns() - begin

    def _evict(self, pod: Pod, grace_ns: int, deadline: float) -> None:
        path = f"/api/v1/namespaces/{self._declared.namespace}/pods/{quote(pod.name)}"
        conflicts, current = 0, pod
        while True:
            try:
                self._cluster.ask("POST", f"{path}/eviction", self._eviction(current, grace_ns))
                return
            except NotFound:
                return
            except TooManyDisruptions as refusal:
                if self._over(deadline):
                    raise ServiceError(
                        f"a disruption budget protects {pod.name}", id="service.budget", want="an eviction allowed",
                        got=refusal.got, hint="the other pods must be healthy first; look at the budget",
                    ) from refusal  # fmt: skip
            except Conflict:
                conflicts += 1
                if conflicts > CONFLICTS_MAX:
                    raise
                found = self._again(path)
                if found is None or found.uid != pod.uid or found.leaving:
                    return  # somebody else was faster
                current = found

    def _over(self, deadline: float) -> bool:
        """Whether there is no more time, after a moment in which the cluster may have gone on."""
        return time.monotonic() > deadline or self._hurried.wait(LOOK_SECONDS)

    def _again(self, path: str) -> Pod | None:
        try:
            return pod_of(self._cluster.ask("GET", path))
        except NotFound:
            return None

    def _eviction(self, pod: Pod, grace_ns: int) -> dict[str, Any]:
        return {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod.name, "namespace": self._declared.namespace},
            "deleteOptions": {
                "gracePeriodSeconds": -(-grace_ns // 1_000_000_000),
                "preconditions": {"uid": pod.uid, "resourceVersion": pod.version},
            },
        }

    def release(self) -> None:
        """Nothing is kept for a next start."""

    # ---- what it cannot do -----------------------------------------------------------------------------------------

    def signal(self, number: int) -> None:
        raise cannot(self.name, "kubernetes", "signal")

    def freeze(self, until_ns: int) -> None:
        raise cannot(self.name, "kubernetes", "freeze")

    def thaw(self) -> None:
        raise cannot(self.name, "kubernetes", "freeze")

    def frozen(self, until_ns: int) -> bool:
        raise cannot(self.name, "kubernetes", "freeze")
