"""The OpenID Connect issuer of the private instance: it mints identity tokens, and checks those it is shown.

There is no login page: whoever holds the state folder decides who is who. Spec: OpenID Connect Core 1.0, RFC 7519.
"""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass
from typing import Any, Final, Literal

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

AUDIENCE: Final = "sigstore"
MAX_TOKEN_BYTES: Final = 16 * 1024
ALGORITHM: Final = "ES256"

# How a token's identity becomes the certificate's subject alternative name.
Kind = Literal["uri", "email", "github", "gitlab"]


class TokenRefused(Exception):
    """The token is not one that this instance accepts; the text says why."""


@dataclass(frozen=True, slots=True)
class Issuer:
    """An issuer whose tokens the authority accepts, and the key that signs them."""

    url: str
    kind: Kind
    key: ec.EllipticCurvePublicKey


def mint(
    key: ec.EllipticCurvePrivateKey, *, issuer: str, subject: str, now: dt.datetime, ttl_s: int, claims: dict[str, Any]
) -> str:
    """A signed identity token. `claims` may replace any claim, `iss` included, to stand in for a CI provider."""
    at = int(now.timestamp())
    body = {"iss": issuer, "sub": subject, "aud": AUDIENCE, "iat": at, "nbf": at, "exp": at + ttl_s} | claims
    return jwt.encode(body, key, ALGORITHM, headers={"kid": "oidc"})


def check(token: str, issuers: dict[str, Issuer], now: dt.datetime) -> tuple[Issuer, dict[str, Any]]:
    """The issuer and the claims of a valid token, or TokenRefused."""
    if len(token) > MAX_TOKEN_BYTES:
        raise TokenRefused("the token is too long")
    try:
        claimed = jwt.decode(token, options={"verify_signature": False}).get("iss")
        issuer = issuers.get(str(claimed))
        if issuer is None:
            raise TokenRefused(f"issuer {claimed!r} is not configured")
        claims = _decode(token, issuer)
    except jwt.PyJWTError as error:
        raise TokenRefused(f"{type(error).__name__}: {error}") from error
    if not claims["iat"] - 60 <= now.timestamp() < claims["exp"]:
        raise TokenRefused("the token is not valid now")
    return issuer, claims


def _decode(token: str, issuer: Issuer) -> dict[str, Any]:
    """Signature, issuer and audience; the dates are judged by the instance's own clock."""
    return jwt.decode(
        token,
        issuer.key,
        algorithms=[ALGORITHM],
        audience=AUDIENCE,
        issuer=issuer.url,
        options={
            "require": ["exp", "iat", "sub", "aud"],
            "verify_exp": False,
            "verify_iat": False,
            "verify_nbf": False,
        },
    )


def discovery(issuer: str) -> dict[str, Any]:
    """The document at /.well-known/openid-configuration."""
    return {
        "issuer": issuer,
        "jwks_uri": f"{issuer}/keys",
        "token_endpoint": f"{issuer}/token",
        "authorization_endpoint": f"{issuer}/auth",
        "response_types_supported": ["code"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": [ALGORITHM],
    }


def key_set(key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
    """The JSON Web Key Set with the one signing key."""
    row: dict[str, Any] = json.loads(ECAlgorithm.to_jwk(key.public_key()))
    return {"keys": [row | {"kid": "oidc", "alg": ALGORITHM, "use": "sig"}]}
