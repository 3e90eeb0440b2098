"""Signing with Sigstore: a statement or a file and an identity token in, a bundle out. It talks to the network.

What is signed is exactly the bytes that were given: the library's Statement keeps them, and this is asserted on every
bundle. Verification is another room's: pointcall_attest.signature. The sigstore library is imported here on first use.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pointcall_keys.errors import KeysError

if TYPE_CHECKING:
    from sigstore.models import Bundle, ClientTrustConfig
    from sigstore.sign import Signer

    TrustConfig = Mapping[str, Any] | ClientTrustConfig

T = TypeVar("T")
MAX_STATEMENT_BYTES: Final = 160 * 1024  # so that the bundle stays below the cap of the verifier


def sign_statement(statement: bytes, *, trust_config: TrustConfig, token: str) -> bytes:
    """A Sigstore bundle (v0.3 JSON) over exactly the bytes of an in-toto statement.

    `trust_config` is a ClientTrustConfig, plain or the library's; `token` an identity token that its authority accepts.
    KeysError `sign.statement`, `sign.config`, `sign.token` or `sign.failed`.
    """
    if len(statement) > MAX_STATEMENT_BYTES:
        raise KeysError("the statement is too long", id="sign.statement", want=f"<= {MAX_STATEMENT_BYTES} bytes")
    bundle = _signed(trust_config, token, lambda signer: _dsse(signer, statement))
    assert _payload(bundle) == statement, "the library signed other bytes than ours"
    return bundle


def sign_file(content: bytes, *, trust_config: TrustConfig, token: str) -> bytes:
    """A Sigstore bundle over a file, as a message signature. Errors as of `sign_statement`."""
    return _signed(trust_config, token, lambda signer: signer.sign_artifact(content))


def statement_about(name: str, content: bytes, predicate_type: str, predicate: Mapping[str, Any]) -> bytes:
    """An in-toto statement with one file as its subject."""
    subject = [{"name": name, "digest": {"sha256": hashlib.sha256(content).hexdigest()}}]
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": subject,
        "predicateType": predicate_type,
        "predicate": dict(predicate),
    }
    return json.dumps(statement, separators=(",", ":"), sort_keys=True).encode()


def ambient_token() -> str:
    """The identity token of the CI job that this runs in. KeysError `sign.token` where there is none.

    GitHub Actions, GitLab (`SIGSTORE_ID_TOKEN`), Google Cloud, Buildkite and CircleCI, as the library finds them.
    """
    from sigstore.oidc import detect_credential

    token = _guarded(detect_credential, "sign.token", "the identity of this CI job cannot be read")
    if token is None:
        raise KeysError(
            "there is no ambient identity here",
            id="sign.token",
            want="a CI job with an identity token",
            hint="in GitHub Actions: permissions id-token: write; in GitLab: id_tokens; else --identity-token",
        )
    return token


def public_trust_config(*, staging: bool = False) -> ClientTrustConfig:
    """The trust config of the public instance, brought up to date by TUF over the network. KeysError `sign.config`."""
    from sigstore.models import ClientTrustConfig

    make = ClientTrustConfig.staging if staging else ClientTrustConfig.production
    return _guarded(make, "sign.config", "the public instance's trust config cannot be had")


def trust_config(trusted_root: Mapping[str, Any], signing_config: Mapping[str, Any]) -> dict[str, Any]:
    """A ClientTrustConfig of its two halves."""
    kind = "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json"
    return {"mediaType": kind, "trustedRoot": dict(trusted_root), "signingConfig": dict(signing_config)}


def _signed(trust_config: TrustConfig, token: str, act: Callable[[Signer], Bundle]) -> bytes:
    from sigstore.oidc import IdentityToken
    from sigstore.sign import SigningContext

    config = _guarded(lambda: _config(trust_config), "sign.config", "the trust config is unusable")
    identity = _guarded(lambda: IdentityToken(token), "sign.token", "the identity token is unusable")

    def sign() -> bytes:
        with SigningContext.from_trust_config(config).signer(identity) as signer:
            return act(signer).to_json().encode()

    return _guarded(sign, "sign.failed", "signing failed")


def _config(trust_config: TrustConfig) -> ClientTrustConfig:
    from sigstore.models import ClientTrustConfig

    if isinstance(trust_config, ClientTrustConfig):
        return trust_config
    return ClientTrustConfig.from_json(json.dumps(trust_config))


def _dsse(signer: Signer, statement: bytes) -> Bundle:
    from sigstore.dsse import Statement

    return signer.sign_dsse(Statement(statement))


def _payload(bundle: bytes) -> bytes:
    return base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"])


def _guarded(call: Callable[[], T], id: str, message: str) -> T:
    """The library raises many types, among them private ones: each becomes one error with its text."""
    try:
        return call()
    except Exception as error:
        cause = error if error.__cause__ is None else error.__cause__
        text = " ".join(f"{type(error).__name__}: {error} {cause if cause is not error else ''}".split())
        raise KeysError(message, id=id, got=text[:300]) from error
