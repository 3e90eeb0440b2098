"""`pointcall sign-bundle ARTIFACT`: sign any file with Sigstore. The Sigstore conformance protocol."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pointcall_keys.signer import TrustConfig


PREDICATE_TYPE: Final = "https://pointcall.dev/file/v1"  # of a statement that says no more than "this file"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path, help="the file to sign")
    parser.add_argument("--bundle", metavar="FILE", type=Path, required=True, help="where to write the bundle")
    parser.add_argument("--identity-token", metavar="TOKEN", help="OpenID Connect token (default: that of the CI job)")
    parser.add_argument(
        "--in-toto", action="store_true", help="sign an in-toto statement: the file, or one about it if it is none"
    )
    parser.add_argument("--staging", action="store_true", help="the public staging instance, unless files name one")
    parser.add_argument("--trusted-root", metavar="FILE", type=Path, help="with --signing-config: a private instance")
    parser.add_argument("--signing-config", metavar="FILE", type=Path, help="with --trusted-root: a private instance")
    parser.add_argument("--trust-config", metavar="FILE", type=Path, help="both in one file: a ClientTrustConfig")


def run(args: argparse.Namespace) -> int:
    from pointcall_executor.cli.output import Exit, print_json
    from pointcall_keys.signer import ambient_token, sign_file, sign_statement

    config, token = _trust_config(args), args.identity_token or ambient_token()
    content = args.artifact.read_bytes()
    if args.in_toto:
        bundle = sign_statement(_statement(args.artifact.name, content), trust_config=config, token=token)
    else:
        bundle = sign_file(content, trust_config=config, token=token)
    args.bundle.write_bytes(bundle)
    if args.json:
        print_json({"ok": True, "bundle": str(args.bundle)})
    else:
        print(f"signed {args.artifact}\nbundle {args.bundle}")
    return Exit.OK


def _statement(name: str, content: bytes) -> bytes:
    """The file, if it means to be a statement (signing refuses it if it is none); else a statement that names the file,
    for people who have no statement to sign."""
    from pointcall_keys.signer import statement_about

    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    is_one = isinstance(body, dict) and not {"_type", "predicateType", "predicate"}.isdisjoint(body)
    return content if is_one else statement_about(name, content, PREDICATE_TYPE, {})


def _trust_config(args: argparse.Namespace) -> TrustConfig:
    from pointcall_executor.cli.output import UsageRefusal
    from pointcall_keys.signer import public_trust_config, trust_config

    apart = (args.trusted_root, args.signing_config)
    if (any(apart) and not all(apart)) or (args.trust_config is not None and (args.staging or any(apart))):
        raise UsageRefusal(
            "these name different instances", want="--staging, --trust-config, or --trusted-root with --signing-config"
        )
    if args.trust_config is not None:
        return _json(args.trust_config)
    if all(apart):
        return trust_config(_json(args.trusted_root), _json(args.signing_config))
    return public_trust_config(staging=args.staging)


def _json(path: Path) -> dict[str, Any]:
    from pointcall_executor.cli.output import UsageRefusal

    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageRefusal(f"{path.name} is not JSON", got=str(error)[:120]) from None
    if not isinstance(value, dict):
        raise UsageRefusal(f"{path.name} is not a JSON object")
    return value
