"""The certificate authority (as Fulcio) with its certificate-transparency log: a token in, a short-lived leaf out.

Spec: Fulcio `certificate-specification.md` and `oid-info.md`; RFC 6962 section 3.2 for the embedded SCT.
"""

from __future__ import annotations

import base64
import datetime as dt
import struct
from dataclasses import dataclass
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier

from pointcall_keys.private_sigstore.certificate import builder, pem, sha256, spki, usage
from pointcall_keys.private_sigstore.issuer import Issuer, TokenRefused

FULCIO_ARC: Final = "1.3.6.1.4.1.57264.1."
SCT_LIST: Final = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
LEAF_LIFETIME: Final = dt.timedelta(minutes=10)
GITHUB: Final = "https://github.com/"
GITLAB: Final = "https://gitlab.com/"


@dataclass(frozen=True, slots=True)
class ClaimRow:
    """One row of oid-info.md: a claim, its legacy arc (raw string), its arc (DER UTF8String) and the prefix there."""

    claim: str
    legacy: int | None
    arc: int | None
    prefix: str = ""


GITHUB_CLAIMS: Final = (
    ClaimRow("event_name", 2, 20),
    ClaimRow("sha", 3, 13),
    ClaimRow("workflow", 4, None),
    ClaimRow("repository", 5, 12, GITHUB),
    ClaimRow("ref", 6, 14),
    ClaimRow("job_workflow_ref", None, 9, GITHUB),
    ClaimRow("job_workflow_sha", None, 10),
    ClaimRow("runner_environment", None, 11),
    ClaimRow("repository_id", None, 15),
    ClaimRow("repository_owner", None, 16, GITHUB),
    ClaimRow("repository_owner_id", None, 17),
    ClaimRow("workflow_ref", None, 18, GITHUB),
    ClaimRow("workflow_sha", None, 19),
    ClaimRow("repository_visibility", None, 22),
)
GITLAB_CLAIMS: Final = (
    ClaimRow("pipeline_source", None, 20),
    ClaimRow("sha", None, 13),
    ClaimRow("project_path", None, 12, GITLAB),
    ClaimRow("ref", None, 14),
    ClaimRow("runner_environment", None, 11),
    ClaimRow("project_id", None, 15),
    ClaimRow("namespace_path", None, 16, GITLAB),
    ClaimRow("namespace_id", None, 17),
    ClaimRow("project_visibility", None, 22),
)


@dataclass(frozen=True, slots=True)
class Authority:
    """The intermediate that signs leaves, its chain (intermediate first), and the key of the CT log."""

    key: ec.EllipticCurvePrivateKey
    chain: list[x509.Certificate]
    ct_key: ec.EllipticCurvePrivateKey

    def issue(self, issuer: Issuer, claims: dict[str, Any], public: ec.EllipticCurvePublicKey, now: dt.datetime) -> str:
        """PEM leaf with an embedded SCT, bound to the identity in `claims`."""
        start = now.astimezone(dt.UTC).replace(microsecond=0)
        leaf = (
            builder(x509.Name([]), self.chain[0].subject, public, self.key, start, start + LEAF_LIFETIME)
            .add_extension(usage(signs_data=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(x509.SubjectAlternativeName([_san(issuer, claims)]), critical=True)  # the subject is empty
        )
        for arc, value in sorted(_extensions(issuer, claims)):
            leaf = leaf.add_extension(x509.UnrecognizedExtension(ObjectIdentifier(FULCIO_ARC + str(arc)), value), False)
        # The CT log signs the body of the same certificate without the SCT list: the precertificate.
        precertificate = leaf.sign(self.key, hashes.SHA256())
        sct = x509.UnrecognizedExtension(SCT_LIST, self._sct(precertificate.tbs_certificate_bytes, now))
        return pem(leaf.add_extension(sct, critical=False).sign(self.key, hashes.SHA256()))

    def _sct(self, body: bytes, now: dt.datetime) -> bytes:
        at_ms = int(now.timestamp() * 1000)
        signed = (
            struct.pack("!BBQH", 0, 0, at_ms, 1)
            + sha256(spki(self.key))
            + len(body).to_bytes(3, "big")
            + body
            + b"\0\0"  # no CT extensions
        )
        signature = self.ct_key.sign(signed, ec.ECDSA(hashes.SHA256()))
        algorithm = b"\x04\x03"  # sha256 (4), ecdsa (3)
        sct = (
            b"\0"
            + sha256(spki(self.ct_key))
            + struct.pack("!QH", at_ms, 0)
            + algorithm
            + struct.pack("!H", len(signature))
            + signature
        )
        # a TLS-encoded list of one, as an OCTET STRING inside the OCTET STRING of extnValue
        return asn1.encode_der(struct.pack("!HH", len(sct) + 2, len(sct)) + sct)


def proven_key(request: dict[str, Any], issuer: Issuer, claims: dict[str, Any]) -> ec.EllipticCurvePublicKey:
    """The key of a signing request, after proof of possession: a CSR (Python), or a signed subject (JS, cosign)."""
    if "certificateSigningRequest" in request:
        csr = x509.load_pem_x509_csr(base64.b64decode(request["certificateSigningRequest"]))
        if not csr.is_signature_valid:
            raise TokenRefused("proof of possession: bad CSR signature")
        return _p256(csr.public_key())
    asked = request["publicKeyRequest"]
    public = _p256(serialization.load_pem_public_key(asked["publicKey"]["content"].encode()))
    subject = str(claims["email" if issuer.kind == "email" else "sub"]).encode()
    try:
        public.verify(base64.b64decode(asked["proofOfPossession"]), subject, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise TokenRefused("proof of possession: bad signature over the subject") from error
    return public


def _p256(key: object) -> ec.EllipticCurvePublicKey:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise TokenRefused("only ECDSA keys")
    return key


def _san(issuer: Issuer, claims: dict[str, Any]) -> x509.GeneralName:
    match issuer.kind:
        case "email":
            if claims.get("email_verified") is not True:
                raise TokenRefused("the e-mail address is not verified")
            return x509.RFC822Name(claims["email"])
        case "github":
            return x509.UniformResourceIdentifier(GITHUB + claims["job_workflow_ref"])
        case "gitlab":
            return x509.UniformResourceIdentifier("https://" + claims["ci_config_ref_uri"])
        case "uri":
            return x509.UniformResourceIdentifier(claims["sub"])


def _extensions(issuer: Issuer, claims: dict[str, Any]) -> list[tuple[int, bytes]]:
    rows: dict[str, tuple[ClaimRow, ...]] = {"github": GITHUB_CLAIMS, "gitlab": GITLAB_CLAIMS}
    out = [(1, issuer.url.encode()), (8, asn1.encode_der(issuer.url))]
    for row in rows.get(issuer.kind, ()):
        if row.claim not in claims:
            continue
        if row.legacy is not None:
            out.append((row.legacy, str(claims[row.claim]).encode()))
        if row.arc is not None:
            out.append((row.arc, asn1.encode_der(row.prefix + str(claims[row.claim]))))
    return out
