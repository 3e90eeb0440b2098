"""The executor's own settings: one TOML file, drop-ins beside it, overrides from the environment. All have defaults.

Not here: what may be armed (the trust policy) and what is armed (the manifest). Those are signed or pinned.
Precedence, low to high: defaults, FILE, FILE.d/*.toml in name order, POINTCALL_<NAME>.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pointcall_executor.loopback import loopback
from pointcall_runbook.errors import PointcallError

RESTART: Final = (
    "node", "cgroup", "gate", "tee", "mode", "api", "groups", "http", "otlp", "mtls", "user", "capabilities",
    "privileges", "seccomp", "memory_mb", "systemd_bus", "podman_socket", "kubeconfig", "pin", "allowed_cgroups",
    "protect_resolvers",
)  # fmt: skip
"""Settings that cannot change while running."""


class ConfigError(PointcallError):
    """A setting is unknown, of the wrong type or out of range."""

    id = "config.invalid"


def _folder_below(text: str) -> str:
    if ".." in text.split("/"):
        raise ValueError("a folder below the cgroup root")
    return text


CgroupPath = Annotated[
    str, Field(max_length=400, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._:@\\/-]*$"), AfterValidator(_folder_below)
]


def _loopback(text: str) -> str:
    if text:
        loopback(text)
    return text


class MtlsSettings(BaseModel):
    """The API over the network. Files are PEM; `roles` maps SPIFFE IDs to roles, exactly."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: Annotated[str, Field(min_length=3, max_length=200)]
    certificate: Path
    key: Path
    client_roots: Path
    roles: Annotated[dict[str, Literal["auditor", "relying-party"]], Field(min_length=1, max_length=1000)]


class Config(BaseModel):
    """Every setting of `pointcall run`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    node: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9./:_-]+$")] = "node.local"
    """Name of this node in log entries and in the log's origin."""
    mode: Literal["monitor", "enforce"] = "enforce"
    """`monitor`: everything is decided and recorded, and nothing acts, whatever the manifest says."""
    cgroup: Annotated[
        str, Field(max_length=200, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._/-]*$"), AfterValidator(_folder_below)
    ] = "pointcall"
    """Folder below the cgroup v2 root that holds the declared services."""
    gate: Annotated[
        str, Field(max_length=200, pattern=r"^([A-Za-z0-9_][A-Za-z0-9._/-]*)?$"), AfterValidator(_folder_below)
    ] = ""
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
    retention_days: Annotated[int, Field(ge=1, le=36_500)] = 400
    """Entries younger than this are never pruned."""
    clear_text_days: Annotated[int, Field(ge=1, le=36_500)] = 400
    """After this the executor erases what is personal: addresses, arguments and texts beside the log."""
    witnesses: Annotated[str, Field(max_length=4096)] = ""
    """File with a C2SP witness policy: who is asked to sign checkpoints. Empty: nobody."""
    mirror: Annotated[str, Field(max_length=4096)] = ""
    """PostgreSQL database (connection string) that the log is copied to. Empty: none."""
    lag_seconds: Annotated[int, Field(ge=1, le=604_800)] = 60
    """How long witnesses or the mirror may be behind before the log says so."""
    http: Annotated[str, AfterValidator(_loopback)] = ""
    """ADDRESS:PORT on loopback for /metrics, /healthz and /readyz; empty: nothing listens."""
    otlp: Annotated[
        str, Field(max_length=500, pattern=r"^(https?://[A-Za-z0-9.:\[\]_-]+(/[A-Za-z0-9._/-]*[A-Za-z0-9_-])?)?$")
    ] = ""
    """Base URL of an OpenTelemetry collector (OTLP over HTTP) for metrics and traces; empty: nothing is sent."""
    mtls: MtlsSettings | None = None
    """One more listener of the API, over the network, for auditors and relying parties."""
    user: Annotated[str, Field(max_length=64, pattern=r"^([a-z_][a-z0-9_-]*)?$")] = ""
    """Whom to become once the spawner runs; empty: stay who started it."""
    capabilities: tuple[Literal["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_SYS_ADMIN"], ...] = ()
    """What to keep beside CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN and CAP_KILL."""
    privileges: Literal["drop", "keep"] = "drop"
    """`keep`: give nothing up. For looking for an error, not for production."""
    seccomp: bool = True
    """Refuse the system calls that no executor needs. There is no fallback: without libseccomp it is an error."""
    memory_mb: Annotated[int, Field(ge=128, le=65_536)] = 1024
    """Writable memory of the executor itself (RLIMIT_DATA), in MiB."""
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

    allowed_cgroups: Annotated[tuple[CgroupPath, ...], Field(max_length=64)] = ()
    """Folders below the cgroup v2 root whose tasks the breaker never refuses, such as a health checker's."""
    protect_resolvers: bool = True
    """No circuit refuses this node's resolvers: port 53 of loopback and of the nameservers of /etc/resolv.conf."""

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.pin and self.user:
            raise ValueError("pin needs root's bpf file system: leave user empty, or pin off")
        return self


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
        raise ConfigError(
            f"setting {name or 'combination'}", want=first["msg"], got=repr(first["input"]), hint=hint
        ) from error
