"""What an SRE writes: a RecoveryManifest (apiVersion, kind, metadata, spec), the schema of the Kubernetes resource too.

Keys are camelCase as in every Kubernetes resource; the signed manifest has the same fields in snake_case. Only plain
data comes in here: reading YAML is the caller's. Spec: docs/spec/manifest.md, section manifest.yaml.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from pointcall_attest.errors import MalformedError
from pointcall_attest.manifest import (
    Channel,
    Event,
    Grants,
    Guard,
    Limits,
    Listen,
    ReferenceValues,
    Setting,
    SettingName,
)
from pointcall_attest.model import FileName, Name, Sha256, Strict, Version, validated

MAX_DATA_BYTES: Final = 1024 * 1024
_KEY: Final = re.compile(r"[a-z][A-Za-z0-9]*")
_CAPITAL: Final = re.compile(r"(?=[A-Z])")
_OWN_NAMES: Final = frozenset({"parameters", "params", "labels", "annotations"})  # whose keys are not ours to rename


class RunbookSource(Strict):
    """A runbook to compile (`source`: a folder with runbook.py, or a .py file) or compiled before (`module`: .wasm)."""

    name: Name
    version: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1
    source: FileName | None = None
    module: FileName | None = None
    events: Annotated[tuple[Event, ...], Field(max_length=32)] = ()  # empty: every event that the module handles
    grants: Grants
    limits: Limits = Limits()
    parameters: Annotated[dict[SettingName, Setting], Field(default_factory=dict, max_length=32)]
    mode: Literal["monitor", "enforce"] = "enforce"


class SensorSource(Strict):
    """A sensor; `blob` is the name of a BPF blob of the executor, its own name where unset (`pressure` has none)."""

    name: Name
    blob: Name | None = None
    params: Annotated[dict[SettingName, Setting], Field(default_factory=dict, max_length=64)]


class ServiceSource(Strict):
    """A service and the file that declares it."""

    name: Name
    kind: Literal["process", "systemd", "container", "kubernetes"] = "process"
    declaration: FileName
    listen: Annotated[tuple[Listen, ...], Field(max_length=64)] = ()


class Spec(Strict):
    """What to arm. Dates and sequence are chosen when it is built."""

    runbooks: Annotated[tuple[RunbookSource, ...], Field(max_length=128)] = ()
    sensors: Annotated[tuple[SensorSource, ...], Field(max_length=32)] = ()
    services: Annotated[tuple[ServiceSource, ...], Field(max_length=128)] = ()
    channels: Annotated[tuple[Channel, ...], Field(max_length=64)] = ()
    guard: Guard = Guard()
    reference_values: ReferenceValues = ReferenceValues()
    min_executor: Version = "0.0.0"
    policy_sha256: Sha256 | None = None
    trusted_root_sha256: Sha256 | None = None
    revoked: Annotated[tuple[Sha256, ...], Field(max_length=1024)] = ()
    valid_days: Annotated[int, Field(ge=1, le=3660)] = 90


class Metadata(Strict):
    """As of Kubernetes; only the name goes into the signed manifest."""

    name: Name
    namespace: Name | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class RecoveryManifest(Strict):
    """The whole document."""

    api_version: Literal["pointcall.dev/v1"]
    kind: Literal["RecoveryManifest"]
    metadata: Metadata
    spec: Spec

    @classmethod
    def parse(cls, data: object) -> RecoveryManifest:
        """The document of plain data, as YAML or JSON gives it; MalformedError `build.malformed` for anything else."""
        try:
            raw = json.dumps(_snake(data), allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise MalformedError("not plain data", id="build.malformed", got=str(error)[:120]) from None
        if len(raw) > MAX_DATA_BYTES:
            raise MalformedError("the document is too long", id="build.malformed", want=f"<= {MAX_DATA_BYTES} bytes")
        return validated(cls, raw, id="build.malformed", what="a RecoveryManifest")


def _snake(value: Any) -> Any:
    if isinstance(value, dict):
        return {_snake_key(key): item if key in _OWN_NAMES else _snake(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_snake(item) for item in value]
    return value


def _snake_key(key: object) -> str:
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not a camelCase key")
    return "_".join(part.lower() for part in _CAPITAL.split(key))
