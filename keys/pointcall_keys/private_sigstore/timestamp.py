"""RFC 3161 time-stamp responses, with the declarative ASN.1 of `cryptography` and nothing else. SHA-256 imprints only.

It needs cryptography 50: older versions overflow on 127-bit serial numbers or cannot encode the token.
"""

from __future__ import annotations

import datetime as dt
import secrets
from typing import Annotated, Any, Final

from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from pointcall_keys.private_sigstore.certificate import der, sha256

OID = x509.ObjectIdentifier
SHA256: Final = OID("2.16.840.1.101.3.4.2.1")
ECDSA_SHA256: Final = OID("1.2.840.10045.4.3.2")
SIGNED_DATA: Final = OID("1.2.840.113549.1.7.2")
TST_INFO: Final = OID("1.2.840.113549.1.9.16.1.4")
CONTENT_TYPE: Final = OID("1.2.840.113549.1.9.3")
MESSAGE_DIGEST: Final = OID("1.2.840.113549.1.9.4")
SIGNING_TIME: Final = OID("1.2.840.113549.1.9.5")
SIGNING_CERTIFICATE_V2: Final = OID("1.2.840.113549.1.9.16.2.47")
POLICY: Final = OID("1.3.6.1.4.1.57264.2")  # as Sigstore's own timestamp authority
MAX_REQUEST_BYTES: Final = 4096  # ours are below 100


@asn1.sequence
class Algorithm:
    algorithm: x509.ObjectIdentifier


@asn1.sequence
class Imprint:
    algorithm: Algorithm
    digest: bytes


@asn1.sequence
class RequestedAlgorithm:
    algorithm: x509.ObjectIdentifier
    parameters: asn1.Null | None  # openssl sends NULL, rfc3161-client nothing


@asn1.sequence
class RequestedImprint:
    algorithm: RequestedAlgorithm
    digest: bytes


@asn1.sequence
class TimeStampReq:
    version: int
    imprint: RequestedImprint
    policy: x509.ObjectIdentifier | None
    nonce: int | None
    cert_req: Annotated[bool, asn1.Default(False)]


@asn1.sequence
class Accuracy:
    seconds: int | None


@asn1.sequence
class TstInfo:
    version: int
    policy: x509.ObjectIdentifier
    imprint: Imprint
    serial: int
    gen_time: asn1.GeneralizedTime
    accuracy: Accuracy | None
    nonce: int | None


@asn1.sequence
class Attribute:
    type: x509.ObjectIdentifier
    values: asn1.SetOf[asn1.TLV]


@asn1.sequence
class SignerId:
    issuer: asn1.TLV
    serial: int


@asn1.sequence
class SignerInfo:
    version: int
    sid: SignerId
    digest_algorithm: Algorithm
    attributes: Annotated[asn1.SetOf[Attribute], asn1.Implicit(0)]
    signature_algorithm: Algorithm
    signature: bytes


@asn1.sequence
class Encapsulated:
    type: x509.ObjectIdentifier
    content: Annotated[bytes, asn1.Explicit(0)]


@asn1.sequence
class SignedData:
    version: int
    digest_algorithms: asn1.SetOf[Algorithm]
    encapsulated: Encapsulated
    certificates: Annotated[asn1.SetOf[asn1.TLV] | None, asn1.Implicit(0)]
    signers: asn1.SetOf[SignerInfo]


@asn1.sequence
class ContentInfo:
    type: x509.ObjectIdentifier
    content: Annotated[SignedData, asn1.Explicit(0)]


@asn1.sequence
class Status:
    status: int


@asn1.sequence
class TimeStampResp:
    status: Status
    token: ContentInfo


@asn1.sequence
class CertificateIdV2:
    digest: bytes  # hashAlgorithm is left out: its default is SHA-256


@asn1.sequence
class SigningCertificateV2:
    certificates: list[CertificateIdV2]


@asn1.sequence
class _Attributes:
    attributes: asn1.SetOf[Attribute]


def respond(request: bytes, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, now: dt.datetime) -> bytes:
    """The DER TimeStampResp to a DER TimeStampReq. ValueError if the request is not one that we answer."""
    if len(request) > MAX_REQUEST_BYTES:
        raise ValueError("time-stamp request is too long")
    asked = asn1.decode_der(TimeStampReq, request)
    if asked.imprint.algorithm.algorithm != SHA256 or len(asked.imprint.digest) != 32:
        raise ValueError("only SHA-256 imprints")
    at = now.astimezone(dt.UTC).replace(microsecond=0)
    info = _info(asked, at)
    data = SignedData(
        version=3,
        digest_algorithms=asn1.SetOf([Algorithm(algorithm=SHA256)]),
        encapsulated=Encapsulated(type=TST_INFO, content=info),
        certificates=asn1.SetOf([_raw(der(certificate))]) if asked.cert_req else None,
        signers=asn1.SetOf([_signer(info, key, certificate, at)]),
    )
    token = ContentInfo(type=SIGNED_DATA, content=data)
    return asn1.encode_der(TimeStampResp(status=Status(status=0), token=token))


def _info(asked: TimeStampReq, at: dt.datetime) -> bytes:
    return asn1.encode_der(
        TstInfo(
            version=1,
            policy=POLICY,
            imprint=Imprint(algorithm=Algorithm(algorithm=SHA256), digest=asked.imprint.digest),
            serial=secrets.randbits(127),
            gen_time=asn1.GeneralizedTime(at),
            accuracy=Accuracy(seconds=1),
            nonce=asked.nonce,
        )
    )


def _signer(info: bytes, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, at: dt.datetime) -> SignerInfo:
    attributes = _attributes(info, certificate, at)
    return SignerInfo(
        version=1,
        sid=SignerId(issuer=_raw(certificate.issuer.public_bytes()), serial=certificate.serial_number),
        digest_algorithm=Algorithm(algorithm=SHA256),
        attributes=attributes,
        signature_algorithm=Algorithm(algorithm=ECDSA_SHA256),
        signature=key.sign(_as_set(attributes), ec.ECDSA(hashes.SHA256())),
    )


def _attributes(info: bytes, certificate: x509.Certificate, at: dt.datetime) -> asn1.SetOf[Attribute]:
    own = SigningCertificateV2(certificates=[CertificateIdV2(digest=sha256(der(certificate)))])
    values: list[tuple[x509.ObjectIdentifier, Any]] = [
        (CONTENT_TYPE, TST_INFO),
        (SIGNING_TIME, asn1.UTCTime(at)),
        (MESSAGE_DIGEST, sha256(info)),
        (SIGNING_CERTIFICATE_V2, own),
    ]
    return asn1.SetOf(
        [Attribute(type=kind, values=asn1.SetOf([_raw(asn1.encode_der(value))])) for kind, value in values]
    )


def _as_set(attributes: asn1.SetOf[Attribute]) -> bytes:
    """The DER SET OF that the signature covers (RFC 5652 section 5.4), not the [0] form that is sent.

    `encode_der` takes no bare SET OF: it is wrapped in a SEQUENCE, whose header is stripped again.
    """
    wrapped = asn1.encode_der(_Attributes(attributes=attributes))
    return wrapped[2 if wrapped[1] < 0x80 else 2 + (wrapped[1] & 0x7F) :]


def _raw(encoded: bytes) -> asn1.TLV:
    return asn1.decode_der(asn1.TLV, encoded)
