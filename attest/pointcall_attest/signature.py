"""Sigstore bundles: bytes and a trust policy in, the signed payload and who signed it out. Offline, always.

The signature, certificate, transparency log and timestamps are verified by the public API of the `sigstore` library;
this module adds what the library leaves to its caller. It does not judge what the payload says: that is admission.py.

  (1) trusted_root.json is the pinned one, and is loaded from the bytes that were hashed
  (2) one to eight bundles, each within the cap and well-formed
  (3) signature, certificate chain, SCT, log entry, time: the library
  (4) every log, CT and CA key was within its window at the time of signing: the library ignores the end of windows
  (5) the certificate names one of the policy's signers exactly
  (6) payload type, statement type, predicate type
  (7) all bundles carry the same bytes, signed by enough distinct signers
  (8) no signature comes from the future

By default all this happens in a short-lived child with resource limits, so that a long-running caller neither grows by
the library's 45 MB nor parses untrusted ASN.1 itself. Whatever goes wrong is a MalformedError or a VerifyError.
Spec: docs/spec/trust-policy.md, section Verification; Sigstore bundle v0.3.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key

from pointcall_attest import exact_json
from pointcall_attest.errors import AttestError, MalformedError, VerifyError
from pointcall_attest.manifest import PREDICATE_TYPE, STATEMENT_TYPE
from pointcall_attest.model import instant
from pointcall_attest.policy import PinnedKey, Signer, TrustPolicy
from pointcall_attest.trusted_root import Root, guarded

if TYPE_CHECKING:
    from sigstore.models import Bundle
    from sigstore.verify.policy import VerificationPolicy

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
KEY_ISSUER: Final = "key"  # the issuer of a signer that is a pinned long-lived key
MAX_BUNDLE_BYTES: Final = 256 * 1024  # twenty times the largest real one
MAX_BUNDLES: Final = 8
CLOCK_SKEW: Final = dt.timedelta(minutes=5)

# The checks in the order in which they are made; the first that fails ends the verification.
CHECKS: Final = (
    "manifest.unsigned",
    "trust.root",
    "manifest.bundle",
    "manifest.signature",
    "manifest.window",
    "manifest.signer",
    "manifest.statement",
    "manifest.same",
    "manifest.threshold",
    "manifest.clock",
)
UNANSWERED: Final = "manifest.child"  # not a word about what was asked: the verifying child ended (signature_child.py)


@dataclass(frozen=True, slots=True, order=True)
class SignerIdentity:
    """Who signed: issuer and subject alternative name, or `key` and the digest of a pinned key."""

    issuer: str
    identity: str


@dataclass(frozen=True, slots=True)
class SignedStatement:
    """Bytes that enough signers of the policy signed. Only `verify_bundles` makes one.

    `signed_at` is the latest authenticated time of signing; None where only pinned keys signed, which state no time.
    """

    payload: bytes
    signers: tuple[SignerIdentity, ...]
    signed_at: dt.datetime | None


def verify_bundles(
    bundles: Sequence[bytes],
    *,
    trusted_root: bytes,
    policy: TrustPolicy,
    at: dt.datetime,
    in_process: bool = False,
    predicate_type: str = PREDICATE_TYPE,
) -> SignedStatement:
    """The statement that all bundles carry, if the policy accepts its signers.

    `trusted_root` is the content of trusted_root.json; `at` the time that judges future signatures and expired keys.
    MalformedError `manifest.bundle`, or VerifyError with one of the ids of `CHECKS`.
    """
    groups = [(bundles, predicate_type)]
    (answer,) = verify_each(groups, trusted_root=trusted_root, policy=policy, at=at, in_process=in_process)
    if isinstance(answer, AttestError):
        raise answer
    return answer


def verify_each(
    groups: Sequence[tuple[Sequence[bytes], str]],
    *,
    trusted_root: bytes,
    policy: TrustPolicy,
    at: dt.datetime,
    in_process: bool = False,
) -> tuple[SignedStatement | AttestError, ...]:
    """`verify_bundles` for several statements, each (its bundles, its predicate type), in one child: an answer each."""
    if not in_process:
        from pointcall_attest.signature_child import verify_in_child

        return verify_in_child(groups, trusted_root, policy, at)
    answers: list[SignedStatement | AttestError] = []
    for bundles, predicate_type in groups:
        try:
            answers.append(_verify(bundles, trusted_root, policy, at, predicate_type))
        except AttestError as refusal:
            answers.append(refusal)
    return tuple(answers)


def unverified_payload(raw: bytes) -> bytes | None:
    """What a bundle carries, for showing it; None if these bytes are no bundle. Nobody's signature has been checked."""
    try:
        bundle = exact_json.loads(raw, id="manifest.bundle", max_bytes=MAX_BUNDLE_BYTES, what="the bundle")
        return base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True)
    except (MalformedError, KeyError, TypeError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class _Signed:
    """One bundle on its way through the steps."""

    payload_type: str
    payload: bytes
    at: dt.datetime | None
    who: SignerIdentity


def _verify(
    bundles: Sequence[bytes], trusted_root: bytes, policy: TrustPolicy, at: dt.datetime, predicate_type: str
) -> SignedStatement:
    if not bundles:
        raise VerifyError("nobody signed this", id="manifest.unsigned", want="a bundle", hint="pointcall sign MANIFEST")
    if policy.trusted_root_sha256 is not None:
        _check_root(trusted_root, policy.trusted_root_sha256)  # (1)
    parsed = [_parse(raw, len(bundles)) for raw in bundles]  # (2)
    signed = [_verify_one(bundle, trusted_root, policy, at) for bundle in parsed]  # (3) to (5)
    for one in signed:
        _check_statement(one, predicate_type)  # (6)
    return _agreed(signed, policy, at)


def _check_root(trusted_root: bytes, pinned: str) -> None:
    digest = hashlib.sha256(trusted_root).hexdigest()
    if digest != pinned:
        raise VerifyError(
            "the trusted root is not the pinned one",
            id="trust.root",
            want=pinned,
            got=digest,
            hint="the policy's trusted_root_sha256 names the only acceptable trusted_root.json",
        )


def _parse(raw: bytes, count: int) -> dict[str, Any]:
    if count > MAX_BUNDLES:
        raise MalformedError("too many bundles", id="manifest.bundle", want=f"<= {MAX_BUNDLES}", got=str(count))
    bundle = exact_json.loads(raw, id="manifest.bundle", max_bytes=MAX_BUNDLE_BYTES, what="the bundle")
    if not isinstance(bundle, dict) or not isinstance(bundle.get("verificationMaterial"), dict):
        raise MalformedError(
            "not a Sigstore bundle", id="manifest.bundle", want="Sigstore bundle v0.3", hint="pointcall sign MANIFEST"
        )
    return bundle


def _verify_one(bundle: dict[str, Any], trusted_root: bytes, policy: TrustPolicy, at: dt.datetime) -> _Signed:
    if "publicKey" in bundle["verificationMaterial"]:
        return _verify_key(bundle, policy.keys, at)
    if policy.trusted_root_sha256 is None:
        raise VerifyError("the policy accepts pinned keys only", id="manifest.signer", want="a key of the policy")
    return _verify_identity(bundle, trusted_root, policy.signers)


def _check_statement(signed: _Signed, predicate_type: str) -> None:
    """(6) The library verifies any payload: what it is must be checked here."""
    if signed.payload_type != PAYLOAD_TYPE:
        raise VerifyError(
            "the payload is of another type", id="manifest.statement", want=PAYLOAD_TYPE, got=signed.payload_type[:80]
        )
    try:
        body = exact_json.loads(
            signed.payload, id="manifest.statement", max_bytes=MAX_BUNDLE_BYTES, what="the statement"
        )
    except MalformedError as error:
        raise VerifyError(error.message, id="manifest.statement", want=error.want, got=error.got) from None
    got = (body.get("_type"), body.get("predicateType")) if isinstance(body, dict) else (None, None)
    if got != (STATEMENT_TYPE, predicate_type):
        raise VerifyError(
            "the statement says something else",
            id="manifest.statement",
            want=f"{STATEMENT_TYPE}, {predicate_type}",
            got=f"{got[0]}, {got[1]}"[:200],
        )


def _agreed(signed: list[_Signed], policy: TrustPolicy, at: dt.datetime) -> SignedStatement:
    if len({one.payload for one in signed}) != 1:  # (7)
        raise VerifyError("the signers signed different statements", id="manifest.same", want="the same bytes")
    who = tuple(sorted({one.who for one in signed}))
    if len(who) < policy.min_signatures:
        raise VerifyError(
            "not enough distinct signers", id="manifest.threshold", want=str(policy.min_signatures), got=str(len(who))
        )
    times = [one.at for one in signed if one.at is not None]
    latest = max(times, default=None)
    if latest is not None and latest > at + CLOCK_SKEW:  # (8)
        raise VerifyError(
            "a signature comes from the future",
            id="manifest.clock",
            want=f"signed before {instant(at)}",
            got=instant(latest),
            hint="the clock of this node is behind: it would also accept what has expired",
        )
    return SignedStatement(signed[0].payload, who, latest)


# Keyless: the library, and what it leaves to its caller


def _verify_identity(bundle: dict[str, Any], trusted_root: bytes, signers: Sequence[Signer]) -> _Signed:
    opened = open_bundle(bundle, "manifest.bundle")
    names = _Names(signers)
    full = Root.load(trusted_root)
    kind, payload = guarded(lambda: full.verifier.verify_dsse(opened, names), "manifest.signature")  # (3)
    at = guarded(lambda: _signing_time(bundle), "manifest.window")
    reduced = guarded(lambda: full.reduced_to(at), "manifest.window")
    if reduced is not None:  # (4)
        guarded(lambda: reduced.verify_dsse(opened, names), "manifest.window")
    return _Signed(kind, payload, at, names.chosen(opened.signing_certificate, at))  # (5)


class _Names:
    """A policy of the library that lets every certificate pass: whom it names is asked afterwards, under its own id."""

    def __init__(self, signers: Sequence[Signer]) -> None:
        self._signers = signers

    def verify(self, cert: x509.Certificate) -> None:
        """Called by the library in the middle of its steps."""

    def chosen(self, certificate: x509.Certificate, at: dt.datetime) -> SignerIdentity:
        """The signer of our policy that the certificate names; VerifyError `manifest.signer` if there is none."""
        reason = "no signer is configured"
        for signer in self._signers:
            refusal = refused_by(exactly(signer), certificate)
            if refusal is None and signer.valid_until is not None and at > signer.valid_until:
                refusal = f"{signer.identity} was valid until {instant(signer.valid_until)}"
            if refusal is None:
                return SignerIdentity(signer.issuer, signer.identity)
            reason = refusal
        raise VerifyError(
            "the certificate names no signer of the policy",
            id="manifest.signer",
            want="; ".join(f"{s.identity} by {s.issuer}" for s in self._signers)[:600],
            got=f"{subject_of(certificate)} ({reason})"[:600],
            hint="every part is compared exactly: identity, issuer, repository, trigger",
        )


def exactly(signer: Signer) -> VerificationPolicy:
    """The library's policy for one signer; every comparison is of whole strings."""
    from sigstore.verify import policy as p

    parts: list[VerificationPolicy] = [
        p.Identity(identity=signer.identity, issuer=signer.issuer),
        p.OIDCIssuerV2(signer.issuer),
    ]
    if signer.source_repository is not None:
        parts.append(p.OIDCSourceRepositoryURI(signer.source_repository))
    if signer.source_repository_id is not None:
        parts.append(p.OIDCSourceRepositoryIdentifier(signer.source_repository_id))
    if signer.build_trigger:
        parts.append(p.AnyOf([p.OIDCBuildTrigger(trigger) for trigger in signer.build_trigger]))
    if signer.runner_environment is not None:
        parts.append(p.OIDCRunnerEnvironment(signer.runner_environment))
    return p.AllOf(parts)


def refused_by(policy: VerificationPolicy, certificate: x509.Certificate) -> str | None:
    """Why the library's policy refuses the certificate, or None."""
    try:
        policy.verify(certificate)
    except Exception as error:  # a hostile certificate may raise anything: all of it is a refusal
        return f"{type(error).__name__}: {error}"
    return None


def subject_of(certificate: x509.Certificate) -> str:
    """The subject alternative name as text, for messages only."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return ", ".join(str(n.value) for n in names)
    except Exception:  # as above
        return "a certificate without a readable name"


def open_bundle(bundle: dict[str, Any], id: str) -> Bundle:
    """The library's bundle, read from the one value that our own reader saw."""
    from sigstore.models import Bundle

    return guarded(lambda: Bundle.from_json(json.dumps(bundle)), id, MalformedError)


def signing_times(bundle: Mapping[str, Any]) -> list[dt.datetime]:
    """The times that a verified bundle states: the promise of Rekor v1, or else its RFC 3161 tokens, one or more.

    The library needs one token that verifies; a further one may be anybody's.
    """
    material = bundle["verificationMaterial"]
    entry = material["tlogEntries"][0]
    if entry.get("inclusionPromise") and int(entry.get("integratedTime") or 0):
        return [dt.datetime.fromtimestamp(int(entry["integratedTime"]), dt.UTC)]
    from rfc3161_client import decode_timestamp_response

    tokens = material["timestampVerificationData"]["rfc3161Timestamps"]
    return [decode_timestamp_response(base64.b64decode(t["signedTimestamp"])).tst_info.gen_time for t in tokens]


def _signing_time(bundle: Mapping[str, Any]) -> dt.datetime:
    """The one time of signing. Among several, one could lie in the life of a key that is dead."""
    times = signing_times(bundle)
    if len(times) != 1:
        raise VerifyError(
            "the time of signing is ambiguous", id="manifest.window", want="one RFC 3161 token", got=str(len(times))
        )
    return times[0]


# Long-lived keys: the same bundle form with `publicKey.hint` and no log entry, which the library does not support


def _verify_key(bundle: dict[str, Any], keys: Sequence[PinnedKey], at: dt.datetime) -> _Signed:
    kind, payload, signature, hint = _key_envelope(bundle)
    key = next((k for k in keys if k.hint == hint), None)
    if key is None or (key.valid_until is not None and at > key.valid_until):
        raise VerifyError(
            "the key is not one of the policy" if key is None else "the key is no longer valid",
            id="manifest.signer",
            want=", ".join(k.name for k in keys)[:200] or "no key is accepted",
            got=hint[:80],
        )
    public = load_der_public_key(key.spki)
    assert isinstance(public, ec.EllipticCurvePublicKey), "the policy accepts P-256 keys only"
    pae = b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(payload), payload)
    try:
        public.verify(signature, pae, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise VerifyError("the signature does not verify", id="manifest.signature", want=f"key {key.name}") from None
    return _Signed(kind, payload, None, SignerIdentity(KEY_ISSUER, hashlib.sha256(key.spki).hexdigest()))


_KEY_BUNDLE: Final = {"mediaType", "verificationMaterial", "dsseEnvelope"}
_BUNDLE_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"


def _key_envelope(bundle: dict[str, Any]) -> tuple[str, bytes, bytes, str]:
    """(payload type, payload, signature, hint) of a key bundle, whose form is exact."""
    try:
        material, envelope = bundle["verificationMaterial"], bundle["dsseEnvelope"]
        (signature,) = envelope["signatures"]
        exact = (
            set(bundle) == _KEY_BUNDLE
            and bundle["mediaType"] == _BUNDLE_TYPE
            and set(material) <= {"publicKey", "tlogEntries"}
            and not material.get("tlogEntries")
            and set(material["publicKey"]) == {"hint"}
            and set(envelope) == {"payload", "payloadType", "signatures"}
            and set(signature) <= {"sig", "keyid"}
        )
        parts = (envelope["payloadType"], envelope["payload"], signature["sig"], material["publicKey"]["hint"])
        if not exact or not all(isinstance(part, str) for part in parts):
            raise ValueError("another form")
        payload, sig = (base64.b64decode(part, validate=True) for part in parts[1:3])
        return parts[0], payload, sig, parts[3]
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise MalformedError(
            "not a bundle of a long-lived key", id="manifest.bundle", got=f"{type(error).__name__}: {error}"[:120]
        ) from None
