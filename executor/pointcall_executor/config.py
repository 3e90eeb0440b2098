"""The executor's own settings: one TOML file, drop-ins beside it, overrides from the environment. All have defaults.

Not here: what may be armed (the trust policy) and what is armed (the manifest). Those are signed or pinned.
Precedence, low to high: defaults, FILE, FILE.d/*.toml in name order, POINTCALL_<NAME>.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pointcall_runbook.errors import PointcallError


class ConfigError(PointcallError):
    """A setting is unknown, of the wrong type or out of range."""

    id = "config.invalid"


class Config(BaseModel):
    """Every setting of `pointcall run`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    node: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9./:_-]+$")] = "node.local"
    """Name of this node in log entries and in the log's origin."""
    cgroup: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._/-]*$")] = "pointcall"
    """Folder below the cgroup v2 root that holds the declared services."""
    gate: Annotated[str, Field(max_length=200, pattern=r"^([A-Za-z0-9_][A-Za-z0-9._/-]*)?$")] = ""
    """Folder below the cgroup v2 root whose processes the breaker may refuse connects; empty means all of them."""
    tee: Literal["emulated", "sev-snp", "tdx"] = "sev-snp"
    """Where evidence comes from. There is no fallback: absent hardware is an error."""
    api: bool = True
    """Serve the gRPC API on Unix sockets below run/."""
    groups: dict[Literal["auditor", "agent", "relying-party"], str] = {}
    """Group of each role's socket, by name; the sockets have mode 0660. The operator's has mode 0600."""
    checkpoint_seconds: Annotated[float, Field(ge=1, le=3600)] = 1.0
    """At most one signed checkpoint in this time."""
    epoch_minutes: Annotated[int, Field(ge=1, le=1440)] = 15
    """Lifetime of one receipt key."""
    systemd_bus: Annotated[str, Field(max_length=200, pattern=r"^unix:path=/[^;,]+$")] = (
        "unix:path=/run/dbus/system_bus_socket"
    )
    """D-Bus of the service manager that runs services of kind systemd."""
    podman_socket: Annotated[str, Field(max_length=100, pattern=r"^/")] = "/run/podman/podman.sock"
    """Podman's API, for services of kind container."""
    kubeconfig: Annotated[str, Field(max_length=200, pattern=r"^(/.*)?$")] = ""
    """A kubeconfig for services of kind kubernetes; its account needs to read pods and workloads and to evict."""
    pin: bool = False
    """Pin the breaker in bpffs: it stays when the executor ends or is killed, and the next one takes it up again."""


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path.name}", want="a TOML file", got=str(error), hint=str(path)) from error


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    names = {f"POINTCALL_{n.upper()}": n for n in Config.model_fields}
    return {names[k]: v for k, v in environ.items() if k in names}


def load(path: Path | None, environ: Mapping[str, str] = os.environ) -> Config:
    """Settings from `path` (None: defaults only), its drop-ins and the environment. ConfigError names the setting."""
    values: dict[str, Any] = {}
    if path is not None:
        values |= _read(path)
        for extra in sorted(Path(f"{path}.d").glob("*.toml")):
            values |= _read(extra)
    values |= _environment(environ)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        hint = "known settings: " + ", ".join(Config.model_fields)
        raise ConfigError(f"setting {name}", want=first["msg"], got=repr(first["input"]), hint=hint) from error
