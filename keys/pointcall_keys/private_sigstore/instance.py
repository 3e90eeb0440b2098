"""The state of one private instance: its keys, certificates and logs, and the trust material that names them.

Everything lives in one folder, keys as plain files of mode 0600: who can read it can sign as anybody. For labs only.
Spec: Sigstore `trustroot.proto` (TrustedRoot, SigningConfig v0.2, ClientTrustConfig v0.1).
"""

from __future__ import annotations

import datetime as dt
import json
import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

from cryptography import x509

from pointcall_keys.private_sigstore import issuer as oidc
from pointcall_keys.private_sigstore import timestamp
from pointcall_keys.private_sigstore.authority import Authority, proven_key
from pointcall_keys.private_sigstore.certificate import (
    ORGANIZATION,
    Key,
    authority,
    der,
    ed25519_key,
    load_chain,
    p256,
    pem,
    sha256,
    spki,
    timestamper,
)
from pointcall_keys.private_sigstore.issuer import Issuer, Kind
from pointcall_keys.private_sigstore.transparency import LogV1, LogV2, b64

Clock = Callable[[], dt.datetime]
RekorVersion = Literal[1, 2]
SERVICES_SINCE: Final = "2020-01-01T00:00:00Z"


class Instance:
    """OIDC issuer, authority, both logs and the timestamp authority at one base URL."""

    def __init__(self, directory: Path, url: str, clock: Clock) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.url, self.clock, self._lock = url, clock, threading.Lock()
        self.issuer = f"{url}/oidc"
        self._oidc_key = p256(directory / "oidc.pem")
        self.issuers: dict[str, Issuer] = {}
        self.accept_issuer(self.issuer, "uri")
        self.authority = self._authority(directory)
        self._tsa_key = p256(directory / "tsa.pem")
        self._tsa_chain = self._timestampers(directory)
        origin = urllib.parse.urlparse(url).netloc
        self.log_v2 = LogV2(directory / "rekor2.log", ed25519_key(directory / "rekor2.pem"), origin)
        self.log_v1 = LogV1(directory / "rekor1.log", p256(directory / "rekor1.pem"), origin)

    def _authority(self, directory: Path) -> Authority:
        root, own = p256(directory / "fulcio-root.pem"), p256(directory / "fulcio.pem")
        top, middle = ("fulcio root", root), ("fulcio intermediate", own)
        chain = load_chain(
            directory / "fulcio.crt",
            lambda: [
                authority(middle, top, path_length=0, now=self.clock()),
                authority(top, top, path_length=1, now=self.clock()),
            ],
        )
        return Authority(own, chain, p256(directory / "ct.pem"))

    def _timestampers(self, directory: Path) -> list[x509.Certificate]:
        top = ("tsa root", p256(directory / "tsa-root.pem"))
        return load_chain(
            directory / "tsa.crt",
            lambda: [
                timestamper(self._tsa_key, top, now=self.clock()),
                authority(top, top, path_length=0, now=self.clock()),
            ],
        )

    # OIDC

    def accept_issuer(self, url: str, kind: Kind) -> None:
        """Accept tokens of `url`, signed by this instance's own key: how tests stand in for a CI provider."""
        self.issuers[url] = Issuer(url, kind, self._oidc_key.public_key())

    def token(self, subject: str, *, ttl_s: int = 600, **claims: Any) -> str:
        return oidc.mint(
            self._oidc_key, issuer=self.issuer, subject=subject, now=self.clock(), ttl_s=ttl_s, claims=claims
        )

    def key_set(self) -> dict[str, Any]:
        return oidc.key_set(self._oidc_key)

    # Fulcio, Rekor, TSA

    def certificates(self, request: dict[str, Any], bearer: str) -> list[str]:
        """PEM leaf and chain for a signing request; the token is a bearer (Python) or in the body (JS, cosign)."""
        token = (request.get("credentials") or {}).get("oidcIdentityToken") or bearer
        now = self.clock()
        issuer, claims = oidc.check(token, self.issuers, now)
        public = proven_key(request, issuer, claims)
        return [self.authority.issue(issuer, claims, public, now), *map(pem, self.authority.chain)]

    def add_v1(self, request: dict[str, Any]) -> dict[str, Any]:
        return self.log_v1.add(request, self.clock())

    def timestamp(self, request: bytes) -> bytes:
        return timestamp.respond(request, self._tsa_key, self._tsa_chain[0], self.clock())

    # Trust material

    def trusted_root(self) -> dict[str, Any]:
        start = min(c.not_valid_before_utc for c in [*self.authority.chain, *self._tsa_chain])
        window = {"start": start.strftime("%Y-%m-%dT%H:%M:%SZ")}
        return {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [
                _log(self.url, self.log_v2.key, "PKIX_ED25519", self.log_v2.id, window),
                _log(self.url, self.log_v1.key, "PKIX_ECDSA_P256_SHA_256", self.log_v1.id, window),
            ],
            "certificateAuthorities": [_ca(self.url, self.authority.chain, window)],
            "ctlogs": [
                _log(
                    f"{self.url}/ct",
                    self.authority.ct_key,
                    "PKIX_ECDSA_P256_SHA_256",
                    sha256(spki(self.authority.ct_key)),
                    window,
                )
            ],
            "timestampAuthorities": [_ca(f"{self.url}/api/v1/timestamp", self._tsa_chain, window)],
        }

    def trusted_root_bytes(self) -> bytes:
        """The exact bytes that a trust policy pins."""
        return (json.dumps(self.trusted_root(), indent=1) + "\n").encode()

    def trust_config(self, rekor: RekorVersion = 2) -> dict[str, Any]:
        """A ClientTrustConfig: what `pointcall sign` and every stock client need to sign here."""
        return {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": self.trusted_root(),
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": [_service(self.url)],
                "oidcUrls": [_service(self.issuer)],
                "rekorTlogUrls": [_service(self.url, rekor)],
                "tsaUrls": [_service(f"{self.url}/api/v1/timestamp")],
                "rekorTlogConfig": {"selector": "ANY"},
                "tsaConfig": {"selector": "ANY"},
            },
        }


def _ca(uri: str, chain: list[x509.Certificate], window: dict[str, str]) -> dict[str, Any]:
    return {
        "uri": uri,
        "subject": {"organization": ORGANIZATION, "commonName": chain[-1].subject.rfc4514_string()},
        "certChain": {"certificates": [{"rawBytes": b64(der(c))} for c in chain]},
        "validFor": window,
    }


def _log(url: str, key: Key, details: str, log_id: bytes, window: dict[str, str]) -> dict[str, Any]:
    return {
        "baseUrl": url,
        "hashAlgorithm": "SHA2_256",
        "publicKey": {"rawBytes": b64(spki(key)), "keyDetails": details, "validFor": window},
        "logId": {"keyId": b64(log_id)},
    }


def _service(url: str, version: int = 1) -> dict[str, Any]:
    return {"url": url, "majorApiVersion": version, "validFor": {"start": SERVICES_SINCE}, "operator": ORGANIZATION}
