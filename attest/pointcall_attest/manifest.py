"""The manifest: what a node may arm. An in-toto Statement whose subjects are every file, by SHA-256.

One manifest is signed as a whole; modules signed one by one would allow mixing old and new parts.
Not here: whose signature counts (policy.py, signature.py) and whether a node accepts it (admission.py).
Spec: docs/spec/manifest.md; in-toto Statement v1.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    field_validator,
    model_serializer,
    model_validator,
)

from pointcall_attest import canonical
from pointcall_attest.errors import MalformedError
from pointcall_attest.model import (
    Exact,
    FileName,
    Instant,
    Measurement,
    Name,
    Port,
    Sha256,
    Strict,
    Subject,
    Text,
    Version,
    validated,
)
from pointcall_runbook.vocabulary import ACTIONS, EVENTS

FORMAT: Final = "pointcall-manifest/v1"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://pointcall.dev/manifest/v1"
MAX_MANIFEST_BYTES: Final = 160 * 1024  # base64 of it and the signature material stay below the cap of a bundle
MAX_SUBJECTS: Final = 512
MAX_SEQUENCE: Final = 2**53 - 1
NOTHING: Final = "0" * 64  # the digest of what has no file
MAX_DAY_MS: Final = 86_400_000
WITHOUT_BLOB: Final = frozenset({"pressure"})  # sensors that are the kernel's own, without a program of ours

Sequence = Annotated[int, Field(ge=1, le=MAX_SEQUENCE)]
Action = Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,32}$")]
Event = Annotated[str, StringConstraints(pattern=r"^[A-Za-z]{1,32}$")]
Setting = Annotated[int, Field(ge=-(2**53) + 1, le=2**53 - 1)]
SettingName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,62}$")]


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) != len(values):
        raise ValueError("an item occurs twice")
    return values


class Grants(Strict):
    """What a runbook may do, and to what. Everything else is refused before it is armed, and again by the guard."""

    actions: Annotated[tuple[Action, ...], Field(max_length=32)] = ()
    services: Annotated[tuple[Name, ...], Field(max_length=64)] = ()
    channels: Annotated[tuple[Name, ...], Field(max_length=64)] = ()
    networks: Annotated[tuple[Exact, ...], Field(max_length=64)] = ()  # e.g. 10.0.0.0/8; for actions on addresses

    @field_validator("actions")
    @classmethod
    def _are_actions(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in ACTIONS:
                raise ValueError(f"no action is called {name}")
        return _distinct(names)

    @field_validator("services", "channels")
    @classmethod
    def _are_distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(names)

    @field_validator("networks")
    @classmethod
    def _are_networks(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            if str(ipaddress.ip_network(text)) != text:
                raise ValueError(f"write the network {ipaddress.ip_network(text)}")
        return _distinct(texts)


class Limits(Strict):
    """Limits of one runbook, kept by the guard for each target."""

    per_minute: Annotated[int, Field(ge=1, le=600)] = 6
    burst: Annotated[int, Field(ge=1, le=100)] = 3
    hold_off_seconds: Annotated[int, Field(ge=0, le=3600)] = 0  # least time between two runs about the same target
    approval: Annotated[tuple[Action, ...], Field(max_length=32)] = ()  # actions that a second person must approve


class Runbook(Strict):
    """A runbook to arm: its module, what starts it, what it may do."""

    name: Name
    version: Annotated[int, Field(ge=1, le=2**31 - 1)]
    module: FileName
    events: Annotated[tuple[Event, ...], Field(min_length=1, max_length=32)]
    grants: Grants
    limits: Limits = Limits()
    parameters: Annotated[dict[SettingName, Setting], Field(default_factory=dict, max_length=32)]
    mode: Literal["monitor", "enforce"] = "enforce"

    @field_validator("events")
    @classmethod
    def _are_events(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in EVENTS:
                raise ValueError(f"no event is called {name}")
        return _distinct(names)


class Sensor(Strict):
    """A kernel object by its name: its BPF loader blob and its parameters, most of them constants of its programs."""

    name: Name
    blob: FileName | None = None  # null for the sensors of WITHOUT_BLOB, and only for them
    params: Annotated[dict[SettingName, Setting], Field(default_factory=dict, max_length=64)]

    @model_validator(mode="after")
    def _has_its_blob(self) -> Self:
        if (self.blob is None) != (self.name in WITHOUT_BLOB):
            raise ValueError(f"sensor {self.name} has {'no ' if self.blob is None else 'a '}blob")
        return self


class Sparse(Strict):
    """What is not set is not written: a manifest from before the field was there keeps its bytes."""

    @model_serializer(mode="wrap")
    def _what_is_set(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value is not None}


# What connect(2) may say of a peer that cannot be had. EINPROGRESS and the like would make a client wait for nothing.
Errno = Literal[
    "EACCES", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "EPERM", "ETIMEDOUT"
]  # fmt: skip


class Circuit(Sparse):
    """One destination's own values for the breaker; what is not set is the constant of the sensor `breaker`."""

    threshold: Annotated[int, Field(ge=1, le=16_383)] | None = None  # failures within the window that open
    window_ms: Annotated[int, Field(ge=1, le=MAX_DAY_MS)] | None = None
    cooldown_ms: Annotated[int, Field(ge=1, le=MAX_DAY_MS)] | None = None  # open time before the first probe
    percent: Annotated[int, Field(ge=1, le=100)] | None = None  # failures must also be this share of the results
    min_attempts: Annotated[int, Field(ge=1, le=1_000_000)] | None = None  # before that the share means nothing
    refuse_errno: Errno | None = None  # what the client sees
    abandoned: bool | None = None  # whether a connect that the client gave up counts as a failure; TCP

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_dump():
            raise ValueError("a circuit without values: leave it out")
        return self


class Listen(Sparse):
    """Where a service accepts connections; the fact `service` of an event comes from here."""

    address: Exact
    port: Port
    protocol: Literal["tcp", "udp"] = "tcp"
    circuit: Circuit | None = None

    @field_validator("address")
    @classmethod
    def _is_an_address(cls, text: str) -> str:
        address = ipaddress.ip_address(text)
        if str(address) != text:
            raise ValueError(f"write the address {address}")
        if getattr(address, "scope_id", None):
            raise ValueError("a circuit has no zone: one for this address holds on every link")
        return text

    @model_validator(mode="after")
    def _can_be_abandoned(self) -> Self:
        if self.protocol == "udp" and self.circuit is not None and self.circuit.abandoned is not None:
            raise ValueError("abandoned is about TCP connects")
        return self


class Service(Strict):
    """A declared service: what `recreate` and the other actions may be about."""

    name: Name
    kind: Literal["process", "systemd", "container", "kubernetes"]
    declaration: FileName
    digest: Sha256
    listen: Annotated[tuple[Listen, ...], Field(max_length=64)] = ()


_ADDRESS: Final = {
    "log": re.compile(""),
    "unix": re.compile(r"/[^\x00-\x1f\x7f]{1,106}"),
    "webhook": re.compile(
        r"(https://[A-Za-z0-9.-]+(:\d{1,5})?|http://(127\.\d+\.\d+\.\d+|\[::1\]|localhost)(:\d{1,5})?)(/[!-~]*)?"
    ),
}


class Channel(Strict):
    """Where `notify` and `escalate` go. `address`: a URL for `webhook` (https, or http to this machine), an absolute
    path for `unix`, else empty."""

    name: Name
    kind: Literal["log", "webhook", "unix"]
    address: Text = ""

    @model_validator(mode="after")
    def _address_fits(self) -> Self:
        if not _ADDRESS[self.kind].fullmatch(self.address):
            raise ValueError(f"that is no address of a channel of kind {self.kind}")
        return self


class Guard(Strict):
    """Limits over all runbooks together, and what must never be touched."""

    max_actions_per_minute: Annotated[int, Field(ge=1, le=6000)] = 60
    max_services_at_once: Annotated[int, Field(ge=1, le=1000)] = 1
    max_services_percent: Annotated[int, Field(ge=1, le=100)] = 100
    max_circuits_at_once: Annotated[int, Field(ge=1, le=65536)] = 64
    min_healthy_percent: Annotated[int, Field(ge=0, le=100)] = 0
    storm_events_per_minute: Annotated[int, Field(ge=1, le=1_000_000)] = 600
    storm_cooldown_seconds: Annotated[int, Field(ge=0, le=86_400)] = 300
    healthy_delay_seconds: Annotated[int, Field(ge=0, le=86_400)] = 0
    never_touch: Annotated[tuple[Exact, ...], Field(max_length=256)] = ()  # service names, networks, address:port


class ReferenceValues(Strict):
    """Measurements of images that may arm this manifest: SNP launch digests, TDX MRTDs."""

    snp: Annotated[tuple[Measurement, ...], Field(max_length=64)] = ()
    tdx: Annotated[tuple[Measurement, ...], Field(max_length=64)] = ()


class Predicate(Strict):
    """The predicate of the statement."""

    format: Literal["pointcall-manifest/v1"]
    name: Name
    sequence: Sequence
    previous: Sha256 | None  # of the payload that this one replaces
    not_before: Instant
    expires: Instant
    vocabulary: Sha256
    runbooks: Annotated[tuple[Runbook, ...], Field(max_length=128)]
    sensors: Annotated[tuple[Sensor, ...], Field(max_length=32)] = ()
    services: Annotated[tuple[Service, ...], Field(max_length=128)] = ()
    channels: Annotated[tuple[Channel, ...], Field(max_length=64)] = ()
    guard: Guard = Guard()
    reference_values: ReferenceValues = ReferenceValues()
    min_executor: Version = "0.0.0"
    policy_sha256: Sha256 | None = None
    trusted_root_sha256: Sha256 | None = None
    revoked: Annotated[tuple[Sha256, ...], Field(max_length=1024)] = ()

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        rows: tuple[tuple[Any, ...], ...] = (self.runbooks, self.sensors, self.services, self.channels)
        for kind in rows:
            if len({row.name for row in kind}) != len(kind):
                raise ValueError("a name occurs twice")
        if self.not_before >= self.expires:
            raise ValueError("not_before must be earlier than expires")
        return self


class _Statement(Strict):
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: Annotated[tuple[Subject, ...], Field(min_length=1, max_length=MAX_SUBJECTS)]
    predicateType: Literal["https://pointcall.dev/manifest/v1"]  # noqa: N815 - the name in the in-toto format
    predicate: Predicate


@dataclass(frozen=True, slots=True)
class Manifest:
    """A well-formed manifest. `SignedStatement` says that somebody signed it, `Admitted` that it may be armed."""

    payload: bytes
    sha256: str
    subjects: Mapping[str, str]  # file name to SHA-256 (hex)
    predicate: Predicate

    @classmethod
    def parse(cls, payload: bytes) -> Manifest:
        """The manifest in canonical JSON; MalformedError `manifest.form` for anything else."""
        try:
            canonical.loads(payload, max_bytes=MAX_MANIFEST_BYTES, what="the manifest")
        except MalformedError as error:
            raise MalformedError(error.message, id="manifest.form", want=error.want, got=error.got) from None
        body = validated(_Statement, payload, id="manifest.form", what="a manifest")
        subjects = {s.name: s.digest.sha256 for s in body.subject}
        if len(subjects) != len(body.subject):
            raise MalformedError("a subject occurs twice", id="manifest.form")
        return cls(payload, hashlib.sha256(payload).hexdigest(), MappingProxyType(subjects), body.predicate)

    @property
    def name(self) -> str:
        return self.predicate.name

    @property
    def sequence(self) -> int:
        return self.predicate.sequence

    @property
    def runbooks(self) -> tuple[Runbook, ...]:
        return self.predicate.runbooks

    @property
    def sensors(self) -> tuple[Sensor, ...]:
        return self.predicate.sensors

    @property
    def sensor_blobs(self) -> Mapping[str, str]:
        """Sensor name to the SHA-256 (hex) of its blob, 64 zeros where it has none."""
        return {s.name: self.subjects.get(s.blob, "") if s.blob else NOTHING for s in self.sensors}

    @property
    def services(self) -> tuple[Service, ...]:
        return self.predicate.services

    @property
    def channels(self) -> tuple[Channel, ...]:
        return self.predicate.channels

    @property
    def guard(self) -> Guard:
        return self.predicate.guard

    def measurements(self, platform: str) -> tuple[str, ...]:
        """Reference values of a platform, `snp` or `tdx`."""
        values = self.predicate.reference_values
        return {"snp": values.snp, "tdx": values.tdx}.get(platform, ())

    def runbook(self, name: str) -> Runbook:
        """The runbook of this name. KeyError if the manifest has none."""
        return {r.name: r for r in self.runbooks}[name]

    def service(self, name: str) -> Service:
        """The service of this name. KeyError if the manifest has none."""
        return {s.name: s for s in self.services}[name]


def build_statement(files: Mapping[str, bytes], predicate: Predicate) -> bytes:
    """The canonical statement over these files: what is signed, hashed and stored. It parses back by construction."""
    subjects = [{"name": n, "digest": {"sha256": hashlib.sha256(files[n]).hexdigest()}} for n in sorted(files)]
    body = predicate.model_dump(mode="json")
    statement = {"_type": STATEMENT_TYPE, "subject": subjects, "predicateType": PREDICATE_TYPE, "predicate": body}
    payload = canonical.dumps(statement)
    Manifest.parse(payload)
    return payload
