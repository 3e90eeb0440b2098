"""The trust policy of a node: whose signatures count, which trusted root, what evidence must show. Data only.

It is provisioned on the node, outside the manifest, and its digest is part of REPORT_DATA. Identities are exact
strings: the format has no patterns, because every pattern that people write lets a look-alike through.
Spec: docs/spec/trust-policy.md.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Annotated, Final, Literal, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pydantic import Field, PrivateAttr, field_validator, model_validator

from pointcall_attest import exact_json
from pointcall_attest.model import Exact, Instant, Name, Sha256, Strict, validated
from pointcall_attest.tee_policy import TeePolicy

FORMAT: Final = "pointcall-trust-policy/v1"
MAX_POLICY_BYTES: Final = 128 * 1024  # thirty lines for most sites; long revocation and chip lists fit
# Issuers whose identities anyone can obtain for their own repository: the subject name alone says too little. GitHub's
# enterprises have issuers of their own, below its first one.
CI_ISSUERS: Final = ("https://token.actions.githubusercontent.com", "https://gitlab.com")


class Signer(Strict):
    """One allowed identity. Unset fields of the certificate are not compared."""

    issuer: Exact
    identity: Exact  # the whole subject alternative name, with its @ref
    source_repository: Exact | None = None  # tells whose build it was when the identity is a shared workflow
    source_repository_id: Annotated[str, Field(pattern=r"^[0-9]{1,20}$")] | None = None  # survives a rename
    build_trigger: Annotated[tuple[Exact, ...], Field(max_length=8)] = ()  # e.g. push; keeps pull_request_target out
    runner_environment: Exact | None = None
    valid_until: Instant | None = None  # judged against the time of signing

    @model_validator(mode="after")
    def _a_ci_identity_names_its_repository(self) -> Self:
        of_ci = any(self.issuer == ci or self.issuer.startswith(f"{ci}/") for ci in CI_ISSUERS)
        if of_ci and not (self.source_repository and self.build_trigger):
            raise ValueError("a CI identity must name its source_repository and build_trigger")
        return self


class PinnedKey(Strict):
    """A long-lived ECDSA P-256 key, for sites without any Sigstore. It proves who signed, never when."""

    name: Name
    public_key: Annotated[str, Field(max_length=256)]  # SubjectPublicKeyInfo, DER in base64
    valid_until: Instant | None = None  # judged against the time of verification: such a signature states no time

    @field_validator("public_key")
    @classmethod
    def _is_p256(cls, text: str) -> str:
        try:
            key = load_der_public_key(base64.b64decode(text, validate=True))
        except (ValueError, UnsupportedAlgorithm):
            raise ValueError("not a public key in DER and base64") from None
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError("not a P-256 key")  # noqa: TRY004 - the policy is input
        return text

    @property
    def spki(self) -> bytes:
        return base64.b64decode(self.public_key)

    @property
    def hint(self) -> str:
        """How a bundle names this key: base64 of the SHA-256 of its SPKI."""
        return base64.b64encode(hashlib.sha256(self.spki).digest()).decode()


class TrustPolicy(Strict):
    """The whole policy. Made by `parse` only, so that its digest is that of the bytes it was read from."""

    format: Literal["pointcall-trust-policy/v1"]
    trusted_root_sha256: Sha256 | None = None  # of trusted_root.json; needed as soon as `signers` names anybody
    signers: Annotated[tuple[Signer, ...], Field(max_length=64)] = ()
    keys: Annotated[tuple[PinnedKey, ...], Field(max_length=16)] = ()
    min_signatures: Annotated[int, Field(ge=1, le=8)] = 1  # by distinct signers, over the same bytes
    min_sequence: Annotated[int, Field(ge=0, le=2**53 - 1)] = 0
    revoked: Annotated[tuple[Sha256, ...], Field(max_length=1024)] = ()  # manifests or files that must never be armed
    max_age_days: Annotated[int, Field(ge=1, le=3660)] | None = None  # of a signature; None: expiry alone limits it
    require_pointer: bool = False  # True: only the manifest that an unexpired pointer names is armed
    ring: Name | None = None  # None: a pointer for any ring
    approvers: Annotated[tuple[Signer, ...], Field(max_length=64)] = ()  # may approve an action; cannot sign manifests
    approver_keys: Annotated[tuple[PinnedKey, ...], Field(max_length=16)] = ()
    tee: TeePolicy = TeePolicy()
    _raw: bytes = PrivateAttr(default=b"")

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        if (self.signers or self.approvers) and self.trusted_root_sha256 is None:
            raise ValueError("signers and approvers need a trusted_root_sha256")
        if self.min_signatures > len(self.signers) + len(self.keys):
            raise ValueError("min_signatures is more than there are signers and keys")
        for keys in (self.keys, self.approver_keys):
            if len({k.hint for k in keys}) != len(keys) or len({k.name for k in keys}) != len(keys):
                raise ValueError("a key is named twice")
        return self

    @classmethod
    def parse(cls, raw: bytes) -> TrustPolicy:
        """The policy in JSON bytes; MalformedError `policy.malformed` for anything else."""
        exact_json.loads(raw, id="policy.malformed", max_bytes=MAX_POLICY_BYTES, what="the trust policy")
        policy = validated(cls, raw, id="policy.malformed", what="a trust policy")
        policy._raw = raw
        return policy

    def for_one_signature(self) -> TrustPolicy:
        """This policy, except that one signer is enough: for what arms nothing. Its digest is another."""
        body = exact_json.loads(self.raw, id="policy.malformed", max_bytes=MAX_POLICY_BYTES, what="the trust policy")
        return self.parse(json.dumps(body | {"min_signatures": 1}).encode())

    @property
    def may_approve(self) -> bool:
        """Whether anybody can approve an action."""
        return bool(self.approvers or self.approver_keys)

    def for_approvals(self) -> TrustPolicy:
        """The same trust, with the approvers in the place of the signers of manifests."""
        rows = ("format", "trusted_root_sha256", "approvers", "approver_keys")
        body = self.model_dump(mode="json", include=set(rows))
        body["signers"], body["keys"] = body.pop("approvers"), body.pop("approver_keys")
        return TrustPolicy.parse(json.dumps(body).encode())

    @property
    def raw(self) -> bytes:
        """Exactly the bytes that were parsed."""
        assert self._raw, "a trust policy is made by parse()"
        return self._raw

    @property
    def sha256(self) -> str:
        """Digest (hex) of exactly the bytes that were parsed; it goes into REPORT_DATA."""
        return hashlib.sha256(self.raw).hexdigest()
