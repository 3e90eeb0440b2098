"""A service declaration: the hashed state that `recreate` returns a service to. Data only: nothing here acts.

Every file that the process executes or reads at start is listed with its digest, and the executor verifies each before
exec. Spec: docs/spec/manifest.md, section Service declaration.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from pointcall_attest import exact_json
from pointcall_attest.model import Name, Sha256, Strict, validated

FORMAT: Final = "pointcall-service/v1"
MAX_DECLARATION_BYTES: Final = 64 * 1024
AbsolutePath = Annotated[str, StringConstraints(pattern=r"^/[^\x00-\x1f\x7f]*$", max_length=1024)]
Argument = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$", max_length=4096)]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)]
Account = Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")]
Namespace = Literal["mount", "pid", "ipc", "uts", "network", "cgroup"]
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


class Ready(Strict):
    """When the service counts as up: it accepts on `tcp`, or `file` exists; neither: as soon as it runs."""

    tcp: Annotated[str, StringConstraints(pattern=r"^(\d{1,3}(\.\d{1,3}){3}|\[[0-9a-f:.]+\]):\d{1,5}$")] | None = None
    file: AbsolutePath | None = None
    timeout_ms: Annotated[int, Field(ge=1, le=600_000)] = 5000


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
        return self


class _Service(Strict):
    format: Literal["pointcall-service/v1"]
    name: Name
    kind: Literal["process"]
    process: Process


@dataclass(frozen=True, slots=True)
class ServiceDeclaration:
    """A parsed declaration and the digest of the bytes it was read from."""

    name: str
    kind: Literal["process"]
    process: Process
    sha256: str

    @property
    def grace_ms(self) -> int:
        """How long the service may take to end before it is killed."""
        return self.process.stop.grace_ms

    @classmethod
    def parse(cls, raw: bytes) -> ServiceDeclaration:
        """The declaration in JSON bytes; MalformedError `service.malformed` for anything else."""
        exact_json.loads(raw, id="service.malformed", max_bytes=MAX_DECLARATION_BYTES, what="the service declaration")
        body = validated(_Service, raw, id="service.malformed", what="a service declaration")
        return cls(body.name, body.kind, body.process, hashlib.sha256(raw).hexdigest())
