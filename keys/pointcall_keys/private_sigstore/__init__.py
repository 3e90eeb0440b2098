"""A private Sigstore on loopback: OIDC issuer, authority with CT log, Rekor v2 and v1, RFC 3161 timestamps.

Stock Sigstore clients sign against it and verify with the trusted root that it writes. For labs, tests and the demo:
its keys are plain files, nobody monitors its logs, and it refuses every address that is not loopback.
"""

from pointcall_keys.private_sigstore.server import PrivateSigstore

__all__ = ["PrivateSigstore"]
