"""`pointcall sign MANIFEST`: sign it keyless, as whoever the identity token names, or with a long-lived key."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pointcall_keys.signer import TrustConfig


PASSPHRASE: Final = "POINTCALL_KEY_PASSPHRASE"  # noqa: S105 - the name of a variable
PIN: Final = "POINTCALL_PKCS11_PIN"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", metavar="MANIFEST", type=Path, help="manifest.json, or another statement of ours")
    add_signing_options(parser)
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: beside MANIFEST, with .sigstore.json")


def add_signing_options(parser: argparse.ArgumentParser) -> None:
    """Who signs: keyless, with a key in a file, or with one on a token."""
    parser.add_argument("--trust-config", metavar="FILE", type=Path, help="ClientTrustConfig of a private instance")
    parser.add_argument("--staging", action="store_true", help="the public staging instance")
    parser.add_argument("--identity-token", metavar="TOKEN", help="OpenID Connect token (default: that of the CI job)")
    parser.add_argument("--key", metavar="FILE", type=Path, help=f"a long-lived key; passphrase in ${PASSPHRASE}")
    parser.add_argument("--pkcs11", metavar="FILE", type=Path, help=f"library of a token; PIN in ${PIN}")
    parser.add_argument("--token", metavar="LABEL", help="with --pkcs11: the token")
    parser.add_argument("--label", metavar="LABEL", help="with --pkcs11: the key pair on it")


def run(args: argparse.Namespace) -> int:
    from pointcall_executor.cli.output import Exit, print_json

    payload = args.manifest.read_bytes()
    what, digest = _described(payload), hashlib.sha256(payload).hexdigest()
    bundle = signed_with(args, payload)
    out = args.out or args.manifest.with_suffix(".sigstore.json")
    out.write_bytes(bundle)
    if args.json:
        print_json({"ok": True, "manifest": digest, "bundle": str(out)})
    else:
        print(f"signed {what}, {digest}\nbundle {out}")
    return Exit.OK


def _described(payload: bytes) -> str:
    """What is about to be signed: a manifest, which must be well-formed, or another of our statements."""
    from pointcall_attest import canonical
    from pointcall_attest.approval import APPROVAL_TYPE
    from pointcall_attest.errors import MalformedError
    from pointcall_attest.manifest import MAX_MANIFEST_BYTES, PREDICATE_TYPE, STATEMENT_TYPE, Manifest
    from pointcall_attest.notice import POINTER_TYPE, REVOCATION_TYPE
    from pointcall_keys.provenance import PROVENANCE_TYPE, TEST_RESULT_TYPE

    others = (APPROVAL_TYPE, POINTER_TYPE, REVOCATION_TYPE, PROVENANCE_TYPE, TEST_RESULT_TYPE)
    body = canonical.loads(payload, max_bytes=MAX_MANIFEST_BYTES, what="the statement")
    kind = body.get("predicateType") if isinstance(body, dict) and body.get("_type") == STATEMENT_TYPE else None
    if kind == PREDICATE_TYPE:
        manifest = Manifest.parse(payload)
        return f"{manifest.name} sequence {manifest.sequence}"
    if kind not in others:
        raise MalformedError("not a statement of ours", id="manifest.form", want=PREDICATE_TYPE, got=str(kind)[:80])
    return f"a statement {kind}"


def signed_with(args: argparse.Namespace, statement: bytes) -> bytes:
    """The Sigstore bundle over a statement, signed as the options say."""
    from pointcall_executor.cli.output import UsageRefusal
    from pointcall_keys.long_lived import FileKey, TokenKey, sign_with_key
    from pointcall_keys.signer import ambient_token, sign_statement

    keyless = (args.trust_config, args.identity_token, args.staging or None)
    if (args.key or args.pkcs11) and any(keyless):
        raise UsageRefusal("a long-lived key needs neither instance nor token", want="--key or --pkcs11 alone")
    if args.key:
        passphrase = os.environ.get(PASSPHRASE)
        return sign_with_key(statement, FileKey.load(args.key, passphrase.encode() if passphrase else None))
    if args.pkcs11:
        if not (args.token and args.label and PIN in os.environ):
            raise UsageRefusal("--pkcs11 needs more", want=f"--token, --label and ${PIN}")
        return sign_with_key(
            statement, TokenKey.open(args.pkcs11, token=args.token, label=args.label, pin=os.environ[PIN])
        )
    token = args.identity_token or ambient_token()
    return sign_statement(statement, trust_config=_trust_config(args), token=token)


def _trust_config(args: argparse.Namespace) -> TrustConfig:
    from pointcall_executor.cli.output import UsageRefusal
    from pointcall_keys.signer import public_trust_config

    if args.trust_config is None:
        return public_trust_config(staging=args.staging)
    if args.staging:
        raise UsageRefusal("--trust-config and --staging exclude each other")
    try:
        config = json.loads(args.trust_config.read_bytes())
    except ValueError as error:
        raise UsageRefusal("the trust config is not JSON", got=str(error)[:120]) from None
    if not isinstance(config, dict):
        raise UsageRefusal("the trust config is not a JSON object")
    return config
