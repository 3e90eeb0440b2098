"""RFC 3161 tokens beside a signature by a long-lived key: when do the timestamp authorities say that it was there?

The `sigstore` library asks this for certificates; it knows no keys, so their tokens are verified here. Every token
must verify: one that does not may be there to be believed by somebody else. Spec: RFC 3161; Sigstore client spec.
"""

from __future__ import annotations

import base64
import datetime as dt
from collections.abc import Mapping
from typing import Any, Final

from cryptography import x509

from pointcall_attest.errors import VerifyError
from pointcall_attest.trusted_root import in_window

MAX_TOKENS: Final = 32  # as the library


def stamped_times(material: Mapping[str, Any], signature: bytes, root: Mapping[str, Any]) -> list[dt.datetime]:
    """The time of each token in a bundle's verification material; VerifyError `bundle.timestamp` if one is wrong.

    Raises whatever bad input raises (KeyError, ValueError, TypeError): the caller guards.
    """
    tokens = (material.get("timestampVerificationData") or {}).get("rfc3161Timestamps") or []
    encoded = [token["signedTimestamp"] for token in tokens]
    if len(encoded) > MAX_TOKENS or len(set(encoded)) != len(encoded):
        raise VerifyError("too many timestamps, or one twice", id="bundle.timestamp", want=f"<= {MAX_TOKENS}, distinct")
    return [_stamped(base64.b64decode(token, validate=True), signature, root) for token in encoded]


def _stamped(token: bytes, signature: bytes, root: Mapping[str, Any]) -> dt.datetime:
    from rfc3161_client import decode_timestamp_response

    response = decode_timestamp_response(token)
    at = response.tst_info.gen_time
    authorities = [row for row in root.get("timestampAuthorities", []) if in_window(row, at)]
    if not any(_by(row, response, signature) for row in authorities):
        raise VerifyError(
            "a timestamp is by no authority of the root", id="bundle.timestamp", want="one within its window then"
        )
    return at


def _by(row: Mapping[str, Any], response: Any, signature: bytes) -> bool:
    """Whether this authority stamped this signature. One without a certificate of its own and a root stamps nothing."""
    from rfc3161_client import VerificationError, VerifierBuilder

    rows = row["certChain"]["certificates"]
    chain = [x509.load_der_x509_certificate(base64.b64decode(c["rawBytes"], validate=True)) for c in rows]
    if len(chain) < 2:
        return False
    builder = VerifierBuilder().tsa_certificate(chain[0]).add_root_certificate(chain[-1])
    for certificate in chain[1:-1]:
        builder = builder.add_intermediate_certificate(certificate)
    try:
        return builder.build().verify_message(response, signature)
    except VerificationError:
        return False
