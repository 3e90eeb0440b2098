"""A service declaration: the hashed state that `recreate` returns a service to. Data only: nothing here acts.

Whatever a service is started from is pinned by digest: files of a process or a unit, the image of a container, the
images of pods. The executor verifies each before every start. Spec: docs/spec/service.md.
"""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Self

from pydantic import ConfigDict, Field, RootModel, StringConstraints, field_validator, model_validator

from pointcall_attest import exact_json
from pointcall_attest.model import Name, Sha256, Strict, validated

FORMAT: Final = "pointcall-service/v1"
MAX_DECLARATION_BYTES: Final = 64 * 1024
AbsolutePath = Annotated[str, StringConstraints(pattern=r"^/[^\x00-\x1f\x7f]*$", max_length=1024)]
Argument = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$", max_length=4096)]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)]
Account = Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")]
Namespace = Literal["mount", "pid", "ipc", "uts", "network", "cgroup"]
Capability = Annotated[str, StringConstraints(pattern=r"^CAP_[A-Z_]{2,32}$")]
Label = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]  # RFC 1123
LabelKey = Annotated[str, StringConstraints(pattern=r"^([a-z0-9][a-z0-9.-]{0,252}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
LabelValue = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,62})?$")]
PinnedImage = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,255}@sha256:[0-9a-f]{64}$")]
Milliseconds = Annotated[int, Field(ge=0, le=600_000)]


def _plain(path: str) -> str:
    if any(part in (".", "..") for part in path.split("/")) or "//" in path:
        raise ValueError("a path has no `.`, `..` or empty part")
    return path


class DeclaredFile(Strict):
    """A file and the digest that it must have before the service may start."""

    path: AbsolutePath
    sha256: Sha256

    @field_validator("path")
    @classmethod
    def _has_one_form(cls, path: str) -> str:
        return _plain(path)


class Limits(Strict):
    """Limits of the service's cgroup; null is no limit of its own."""

    memory_bytes: Annotated[int, Field(ge=1 << 20, le=2**53 - 1)] | None = None
    processes: Annotated[int, Field(ge=1, le=1 << 22)] | None = None


class Stop(Strict):
    """How the service is asked to end before it is killed."""

    signal: Literal["TERM", "INT", "QUIT", "HUP", "KILL"] = "TERM"
    grace_ms: Milliseconds = 2000


class Http(Strict):
    """An HTTP/1.1 GET to the address of `tcp`, without TLS."""

    path: Annotated[str, StringConstraints(pattern=r"^/[\x21-\x7e]*$", max_length=1024)] = "/"
    status: Annotated[int, Field(ge=100, le=599)] = 200


class Ready(Strict):
    """When the service counts as up: it accepts on `tcp`, answers `http` there, `file` exists; none: once it runs."""

    tcp: Annotated[str, StringConstraints(pattern=r"^(\d{1,3}(\.\d{1,3}){3}|\[[0-9a-f:.]+\]):\d{1,5}$")] | None = None
    http: Http | None = None
    file: AbsolutePath | None = None
    timeout_ms: Annotated[int, Field(ge=1, le=600_000)] = 5000

    @model_validator(mode="after")
    def _has_an_address(self) -> Self:
        if self.http is not None and self.tcp is None:
            raise ValueError("http needs tcp, the address to ask")
        if self.tcp is not None:
            host, _, port = self.tcp.rpartition(":")
            ipaddress.ip_address(host.strip("[]"))
            if not 1 <= int(port) <= 65535:
                raise ValueError("a port is 1 to 65535")
        return self


class Process(Strict):
    """How a service of kind `process` is started."""

    argv: Annotated[tuple[Argument, ...], Field(min_length=1, max_length=256)]
    environment: Annotated[dict[Variable, Argument], Field(default_factory=dict, max_length=256)]
    directory: AbsolutePath = "/"
    files: Annotated[tuple[DeclaredFile, ...], Field(min_length=1, max_length=256)]
    user: Account | None = None
    group: Account | None = None
    limits: Limits = Limits()
    namespaces: Annotated[tuple[Namespace, ...], Field(max_length=6)] = ()
    no_new_privileges: Literal[True] = True
    stop: Stop = Stop()
    ready: Ready = Ready()

    @model_validator(mode="after")
    def _the_program_is_listed(self) -> Self:
        paths = [f.path for f in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError("a file is listed twice")
        if self.argv[0] not in paths:
            raise ValueError("argv[0] must be one of the listed files")
        if len(set(self.namespaces)) != len(self.namespaces):
            raise ValueError("a namespace is listed twice")
        if "network" in self.namespaces and self.ready.tcp is not None:
            raise ValueError("nobody outside sees a port in the service's own network: let it say by a file")
        return self


class Systemd(Strict):
    """A unit of the service manager. `files`: its unit file, every drop-in, and what else must be as declared."""

    unit: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9:_.\\@-]{1,200}\.service$")]
    fragment: AbsolutePath
    files: Annotated[tuple[DeclaredFile, ...], Field(min_length=1, max_length=256)]
    grace_ms: Milliseconds = 10_000
    ready: Ready = Ready()

    @model_validator(mode="after")
    def _the_unit_file_is_listed(self) -> Self:
        paths = [f.path for f in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError("a file is listed twice")
        if self.fragment not in paths:
            raise ValueError("the unit file must be one of the listed files")
        return self


class Mount(Strict):
    """A folder or file of the node inside a container."""

    source: AbsolutePath
    target: AbsolutePath
    read_only: bool = True

    @field_validator("source", "target")
    @classmethod
    def _has_one_form(cls, path: str) -> str:
        return _plain(path)


class Container(Strict):
    """How a container is made: from an image that is on the node already, named by its digest; never pulled."""

    image: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._:/-]{0,254}@sha256:[0-9a-f]{64}$")]
    command: Annotated[tuple[Argument, ...], Field(max_length=256)] = ()  # none: the image's own
    environment: Annotated[dict[Variable, Argument], Field(default_factory=dict, max_length=256)]
    mounts: Annotated[tuple[Mount, ...], Field(max_length=64)] = ()
    network: Literal["none", "host"] = "none"
    capabilities: Annotated[tuple[Capability, ...], Field(max_length=41)] = ()  # every other one is dropped
    read_only_root: bool = True
    user: (
        Annotated[str, StringConstraints(pattern=r"^[a-z0-9_][a-z0-9_-]{0,31}(:[a-z0-9_][a-z0-9_-]{0,31})?$")] | None
    ) = None
    limits: Limits = Limits()
    stop: Stop = Stop()
    ready: Ready = Ready()

    @model_validator(mode="after")
    def _is_seen_from_outside(self) -> Self:
        if self.network == "none" and self.ready.tcp is not None:
            raise ValueError("nobody outside sees a port in the container's own network: let it say by a file")
        return self

    @property
    def digest(self) -> str:
        """`sha256:` and hex."""
        return self.image.partition("@")[2]


class Kubernetes(Strict):
    """Pods of one workload. Recreated by eviction, so that disruption budgets hold; the workload replaces them."""

    namespace: Label
    workload: Annotated[
        str, StringConstraints(pattern=r"^(Deployment|StatefulSet|DaemonSet)/[a-z0-9][a-z0-9.-]{0,252}$")
    ]
    selector: Annotated[dict[LabelKey, LabelValue], Field(min_length=1, max_length=16)]
    images: Annotated[dict[Label, PinnedImage], Field(min_length=1, max_length=32)]  # container name -> its image
    replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    grace_ms: Milliseconds = 30_000
    timeout_ms: Annotated[int, Field(ge=1, le=3_600_000)] = 300_000


class _Base(Strict):
    format: Literal["pointcall-service/v1"]
    name: Name


class _ProcessService(_Base):
    kind: Literal["process"]
    process: Process


class _SystemdService(_Base):
    kind: Literal["systemd"]
    systemd: Systemd


class _ContainerService(_Base):
    kind: Literal["container"]
    container: Container


class _KubernetesService(_Base):
    kind: Literal["kubernetes"]
    kubernetes: Kubernetes


class _Service(RootModel[_ProcessService | _SystemdService | _ContainerService | _KubernetesService]):
    model_config = ConfigDict(frozen=True, strict=True)
    root: Annotated[
        _ProcessService | _SystemdService | _ContainerService | _KubernetesService, Field(discriminator="kind")
    ]


Kind = Literal["process", "systemd", "container", "kubernetes"]
Body = Process | Systemd | Container | Kubernetes


@dataclass(frozen=True, slots=True)
class ServiceDeclaration:
    """A parsed declaration and the digest of the bytes it was read from."""

    name: str
    kind: Kind
    body: Body
    sha256: str

    @property
    def process(self) -> Process:
        """Of kind `process` only."""
        assert isinstance(self.body, Process)
        return self.body

    @property
    def grace_ms(self) -> int:
        """How long the service may take to end before it is killed."""
        return self.body.grace_ms if isinstance(self.body, Systemd | Kubernetes) else self.body.stop.grace_ms

    @classmethod
    def parse(cls, raw: bytes) -> ServiceDeclaration:
        """The declaration in JSON bytes; MalformedError `service.malformed` for anything else."""
        exact_json.loads(raw, id="service.malformed", max_bytes=MAX_DECLARATION_BYTES, what="the service declaration")
        found = validated(_Service, raw, id="service.malformed", what="a service declaration").root
        body: Body = getattr(found, found.kind)
        return cls(found.name, found.kind, body, hashlib.sha256(raw).hexdigest())
