"""Callers over the network: each way to be nobody, and what an auditor may do from afar."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pointcall_executor.api.caller import Caller, CallerError, Mtls
from pointcall_executor.api.roles import METHODS, Role
from pointcall_executor.api.server import ServeError, Server, serve
from tests.unit.api.fake_backend import FakeBackend
from tests.unit.api.test_matrix import EXPECTED, _status

AUDITOR, RELYING = "spiffe://example.org/auditor", "spiffe://example.org/relying"
NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)


@dataclass
class Authority:
    """A certificate authority for one test run."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def new(cls) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(NOW - HOUR)
        builder = builder.not_valid_after(NOW + 24 * HOUR)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        return cls(key, builder.sign(key, hashes.SHA256()))

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, *names: x509.GeneralName, ends: datetime = NOW + HOUR) -> tuple[bytes, bytes]:
        """A key and its certificate, PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(self.certificate.subject)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(NOW - 2 * HOUR).not_valid_after(ends)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
        usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
        made = builder.add_extension(usages, critical=False).sign(self.key, hashes.SHA256())
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return key.private_bytes(*form), made.public_bytes(serialization.Encoding.PEM)


@dataclass
class Remote:
    backend: FakeBackend
    server: Server
    authority: Authority

    def channel(self, credentials: tuple[bytes, bytes] | None) -> Any:
        key, chain = credentials or (None, None)
        made = grpc.ssl_channel_credentials(self.authority.pem, key, chain)
        return grpc.secure_channel(f"localhost:{self.server.port}", made)

    def status(self, credentials: tuple[bytes, bytes] | None, method: str = "/pointcall.v1.Runs/ListRuns") -> str:
        with self.channel(credentials) as channel:
            try:
                channel.unary_unary(method)(b"", timeout=5)
            except grpc.RpcError as failure:
                return str(failure.code().name)
        return "OK"


def uri(text: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(text)


@pytest.fixture
def remote(short_dir: Path) -> Iterator[Remote]:
    authority, backend = Authority.new(), FakeBackend(short_dir)
    backend.time = NOW
    key, certificate = authority.issue(x509.DNSName("localhost"))
    roles = {AUDITOR: Role.AUDITOR, RELYING: Role.RELYING_PARTY}
    mtls = Mtls("localhost:0", certificate, key, authority.pem, roles)
    server = serve(backend, short_dir / "run", mtls=mtls)
    yield Remote(backend, server, authority)
    server.stop(0)


def test_a_known_certificate_is_let_in_and_logged_by_its_id(remote: Remote) -> None:
    assert remote.status(remote.authority.issue(uri(AUDITOR))) == "OK"
    remote.server.flush()
    assert [(a.role, a.method, a.count) for a in remote.backend.accesses] == [
        (AUDITOR, "pointcall.v1.Runs/ListRuns", 1)
    ]


@pytest.mark.parametrize(
    "names",
    [
        (uri("spiffe://example.org/stranger"),),
        (uri(AUDITOR + "/"),),
        (uri(AUDITOR.upper()),),
        (uri(AUDITOR), uri(RELYING)),
        (x509.DNSName(AUDITOR),),
        (x509.RFC822Name("auditor@example.org"),),
        (),
    ],
    ids=["another id", "a longer id", "another case", "two ids", "the id as a DNS name", "no URI", "no names"],
)
def test_a_certificate_without_exactly_a_known_id_is_denied(
    remote: Remote, names: tuple[x509.GeneralName, ...]
) -> None:
    assert remote.status(remote.authority.issue(*names)) == "PERMISSION_DENIED"
    remote.server.flush()
    assert [a.role for a in remote.backend.accesses] == ["unknown"]


def test_no_certificate_a_foreign_one_and_an_ended_one_get_no_connection(remote: Remote) -> None:
    foreign = Authority.new().issue(uri(AUDITOR))
    ended = remote.authority.issue(uri(AUDITOR), ends=NOW - HOUR)
    assert [remote.status(c) for c in (None, foreign, ended)] == ["UNAVAILABLE"] * 3


def test_plain_text_gets_no_connection(remote: Remote) -> None:
    with grpc.insecure_channel(f"localhost:{remote.server.port}") as channel:
        assert _status(channel, "pointcall.v1.Status/GetStatus") is grpc.StatusCode.UNAVAILABLE


def test_a_certificate_that_ends_while_connected_is_denied(remote: Remote) -> None:
    credentials = remote.authority.issue(uri(AUDITOR))
    assert remote.status(credentials) == "OK"
    remote.backend.time = NOW + 2 * HOUR
    assert remote.status(credentials) == "PERMISSION_DENIED"


@pytest.mark.parametrize(("id", "role"), [(AUDITOR, Role.AUDITOR), (RELYING, Role.RELYING_PARTY)])
def test_each_cell_of_the_matrix_holds_over_the_network(remote: Remote, id: str, role: Role) -> None:
    credentials = remote.authority.issue(uri(id))
    methods = [m for m in EXPECTED if not m.endswith("Info")]
    let_through = {m for m in methods if remote.status(credentials, f"/{m}") != "PERMISSION_DENIED"}
    assert let_through == {m for m in methods if role in EXPECTED[m]}
    assert not [m for m in let_through if METHODS[f"/{m}"].mutating]


@pytest.mark.parametrize(
    ("id", "role"),
    [
        (AUDITOR, Role.OPERATOR),
        (AUDITOR, Role.AGENT),
        ("auditor", Role.AUDITOR),
        ("spiffe://" + "a" * 2_048, Role.AUDITOR),
    ],
)
def test_operators_and_agents_are_never_remote(id: str, role: Role) -> None:
    with pytest.raises(CallerError) as refusal:
        Mtls("localhost:0", b"", b"", b"", {id: role})
    assert refusal.value.id == "api.callers"


def test_a_certificate_that_is_none_stops_the_start(short_dir: Path) -> None:
    with pytest.raises(ServeError) as refusal:
        serve(FakeBackend(short_dir), short_dir / "run", mtls=Mtls("localhost:0", b"no", b"no", b"no", {}))
    assert refusal.value.id == "api.mtls"
    assert list((short_dir / "run").iterdir()) == []


class Context:
    def __init__(self, *pems: bytes) -> None:
        self._pems = pems

    def auth_context(self) -> dict[str, tuple[bytes, ...]]:
        return {"x509_pem_cert": self._pems} if self._pems else {}


def test_what_is_no_single_certificate_is_nobody() -> None:
    authority = Authority.new()
    caller_of = Mtls("localhost:0", b"", b"", b"", {AUDITOR: Role.AUDITOR}).callers(lambda: NOW)
    _, good = authority.issue(uri(AUDITOR))
    assert caller_of(Context(good)) == Caller(AUDITOR, Role.AUDITOR)
    for context in (Context(), Context(good, good), Context(b""), Context(b"-----BEGIN CERTIFICATE-----\nAAAA\n")):
        assert caller_of(context) is None
