"""`pointcall sign WHAT`: sign statements keyless, as whoever the identity token names, or with a long-lived key."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pointcall_keys.long_lived import SigningKey
    from pointcall_keys.signer import TrustConfig


PASSPHRASE: Final = "POINTCALL_KEY_PASSPHRASE"  # noqa: S105 - the name of a variable
PIN: Final = "POINTCALL_PKCS11_PIN"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", metavar="WHAT", type=Path, nargs="*",
        help="a statement, such as manifest.json or a notice; or what `build` left: the manifest and all provenance",
    )  # fmt: skip
    add_signing_options(parser)
    parser.add_argument("--policy-row", metavar="NAME", help="print the row of a trust policy that accepts the key")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: beside WHAT, with .sigstore.json")


def add_signing_options(parser: argparse.ArgumentParser) -> None:
    """Who signs: keyless, with a key in a file, or with one on a token."""
    parser.add_argument("--trust-config", metavar="FILE", type=Path, help="ClientTrustConfig of a private instance")
    parser.add_argument("--staging", action="store_true", help="the public staging instance")
    parser.add_argument("--identity-token", metavar="TOKEN", help="OpenID Connect token (default: that of the CI job)")
    parser.add_argument("--key", metavar="FILE", type=Path, help=f"a long-lived key; passphrase in ${PASSPHRASE}")
    parser.add_argument("--make-key", action="store_true", help="with --key: make it first, as a new file")
    parser.add_argument("--pkcs11", metavar="FILE", type=Path, help=f"library of a token; PIN in ${PIN}")
    parser.add_argument("--token", metavar="LABEL", help="with --pkcs11: the token")
    parser.add_argument("--label", metavar="LABEL", help="with --pkcs11: the key pair on it")


def run(args: argparse.Namespace) -> int:
    key = _key(args)
    try:
        return _policy_row(args, key) if args.policy_row else _sign(args, key)
    finally:
        if key is not None:
            key.close()


def _sign(args: argparse.Namespace, key: SigningKey | None) -> int:
    from pointcall_executor.cli.output import Exit, UsageRefusal, print_json

    paths = [path for what in args.what for path in _statements(what)]
    if not paths or (args.out and len(paths) > 1):
        raise UsageRefusal("nothing to sign" if not paths else "--out names one file", want="statements, or a build")
    payloads = [(path, path.read_bytes()) for path in paths]
    described = [_described(payload) for _, payload in payloads]  # all are of their form before any is signed
    sign = _signer(args, key)
    for (path, payload), what in zip(payloads, described, strict=True):
        digest, out = hashlib.sha256(payload).hexdigest(), args.out or path.with_suffix(".sigstore.json")
        out.write_bytes(sign(payload))
        if args.json:
            print_json({"ok": True, "manifest": digest, "bundle": str(out)})
        else:
            print(f"signed {what}, {digest}\nbundle {out}")
    return Exit.OK


def _statements(what: Path) -> list[Path]:
    """A file; or of a build, manifest.json and what lies in provenance/."""
    if not what.is_dir():
        return [what]
    beside = sorted(path for path in (what / "provenance").glob("*.json") if not path.name.endswith(".sigstore.json"))
    return [what / "manifest.json", *beside]


def _policy_row(args: argparse.Namespace, key: SigningKey | None) -> int:
    from pointcall_executor.cli.output import Exit, UsageRefusal, print_json
    from pointcall_keys.long_lived import policy_row

    if key is None or args.what:
        raise UsageRefusal("--policy-row is about a key, and signs nothing", want="--key or --pkcs11, without WHAT")
    print_json(policy_row(args.policy_row, key))
    return Exit.OK


def _described(payload: bytes) -> str:
    """What is about to be signed: a manifest, which must be well-formed, or another of our statements."""
    from pointcall_attest import canonical
    from pointcall_attest.approval import APPROVAL_TYPE
    from pointcall_attest.errors import MalformedError
    from pointcall_attest.manifest import MAX_MANIFEST_BYTES, PREDICATE_TYPE, STATEMENT_TYPE, Manifest
    from pointcall_attest.notice import POINTER_TYPE, REVOCATION_TYPE
    from pointcall_attest.provenance_check import PROVENANCE_TYPE, TEST_RESULT_TYPE

    others = (APPROVAL_TYPE, POINTER_TYPE, REVOCATION_TYPE, PROVENANCE_TYPE, TEST_RESULT_TYPE)
    body = canonical.loads(payload, max_bytes=MAX_MANIFEST_BYTES, what="the statement")
    kind = body.get("predicateType") if isinstance(body, dict) and body.get("_type") == STATEMENT_TYPE else None
    if kind == PREDICATE_TYPE:
        manifest = Manifest.parse(payload)
        return f"{manifest.name} sequence {manifest.sequence}"
    if kind not in others:
        raise MalformedError("not a statement of ours", id="manifest.form", want=PREDICATE_TYPE, got=str(kind)[:80])
    return f"a statement {kind}"


def _key(args: argparse.Namespace) -> SigningKey | None:
    """The long-lived key that the words name, if they do."""
    from pointcall_executor.cli.output import UsageRefusal
    from pointcall_keys.long_lived import FileKey, TokenKey

    if (args.key or args.pkcs11) and (args.trust_config or args.identity_token or args.staging):
        raise UsageRefusal("a long-lived key needs neither instance nor token", want="--key or --pkcs11 alone")
    if args.make_key and not args.key:
        raise UsageRefusal("--make-key needs a file", want="--key FILE")
    if args.key:
        passphrase = (os.environ.get(PASSPHRASE) or "").encode() or None
        return FileKey.make(args.key, passphrase) if args.make_key else FileKey.load(args.key, passphrase)
    if args.pkcs11:
        if not (args.token and args.label and PIN in os.environ):
            raise UsageRefusal("--pkcs11 needs more", want=f"--token, --label and ${PIN}")
        return TokenKey.open(args.pkcs11, token=args.token, label=args.label, pin=os.environ[PIN])
    return None


def signed_with(args: argparse.Namespace, statement: bytes) -> bytes:
    """The Sigstore bundle over one statement, signed as the options say."""
    key = _key(args)
    try:
        return _signer(args, key)(statement)
    finally:
        if key is not None:
            key.close()


def _signer(args: argparse.Namespace, key: SigningKey | None) -> Callable[[bytes], bytes]:
    """What signs one statement after the other: with the key, or keyless with one identity token."""
    from pointcall_keys.long_lived import sign_with_key
    from pointcall_keys.signer import ambient_token, sign_statement

    if key is not None:
        return lambda statement: sign_with_key(statement, key)
    token, config = args.identity_token or ambient_token(), _trust_config(args)
    return lambda statement: sign_statement(statement, trust_config=config, token=token)


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
