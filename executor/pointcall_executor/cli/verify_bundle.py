"""`pointcall verify-bundle ARTIFACT`: did this identity or key sign this file? The Sigstore conformance protocol."""

from __future__ import annotations

import argparse
import hashlib
import re
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="ARTIFACT", help="the signed file, or sha256:HEX")
    parser.add_argument("--bundle", metavar="FILE", type=Path, required=True, help="the Sigstore bundle")
    parser.add_argument("--certificate-identity", metavar="ID", help="subject alternative name, compared exactly")
    parser.add_argument("--certificate-oidc-issuer", metavar="URL", help="issuer of that identity, compared exactly")
    parser.add_argument("--key", metavar="FILE", type=Path, help="a PEM public key instead of an identity")
    parser.add_argument("--trusted-root", metavar="FILE", type=Path, help="default: the pinned public-good root")
    parser.add_argument("--staging", action="store_true", help="the pinned root of the staging instance")


def run(args: argparse.Namespace) -> int:
    from pointcall_executor.cli.output import Exit, UsageRefusal, print_json

    named = (args.certificate_identity, args.certificate_oidc_issuer)
    if (args.key is not None) == any(named) or (args.key is None and not all(named)):
        raise UsageRefusal("give an identity and its issuer, or a key", want="one of the two")
    digest = _digest(args.artifact)
    _verify(args, digest)
    if args.json:
        print_json({"ok": True, "sha256": digest.hex(), "by": str(args.key or args.certificate_identity)})
    else:
        print(f"ok: {args.key or args.certificate_identity} signed sha256:{digest.hex()}")
    return Exit.OK


def _verify(args: argparse.Namespace, digest: bytes) -> None:
    from pointcall_attest.file_signature import verify_file, verify_file_with_key
    from pointcall_keys.public_roots import public_root

    root = args.trusted_root.read_bytes() if args.trusted_root else public_root(staging=args.staging)
    bundle = args.bundle.read_bytes()
    if args.key is not None:
        verify_file_with_key(bundle, digest, key=args.key.read_bytes(), trusted_root=root)
    else:
        identity, issuer = args.certificate_identity, args.certificate_oidc_issuer
        verify_file(bundle, digest, trusted_root=root, identity=identity, issuer=issuer)


def _digest(artifact: str) -> bytes:
    """SHA-256 of the artifact. `sha256:HEX` is a digest unless a file is called so."""
    if re.fullmatch(r"sha256:[0-9a-fA-F]{64}", artifact) and not Path(artifact).exists():
        return bytes.fromhex(artifact[7:])
    with Path(artifact).open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
