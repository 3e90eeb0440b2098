"""`pointcall witness`: be a witness of other nodes' logs, on another machine than theirs."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pointcall_executor.cli import output

if TYPE_CHECKING:
    from pointcall_attest.log.checkpoint import WitnessKey
    from pointcall_executor.witness_server import Keys

MAX_KEY_BYTES = 16 * 1024


def configure(parser: argparse.ArgumentParser) -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="machine-readable output")
    common.add_argument("--state-dir", metavar="DIR", default=argparse.SUPPRESS, help="where all state lives")
    common.add_argument(
        "--name", required=True, metavar="NAME", help="what stands in cosignatures, as witness.example/w1"
    )
    common.add_argument("--key", required=True, type=Path, metavar="FILE", help="the private key, PEM, mode 0600")
    verbs = parser.add_subparsers(dest="witness_verb", required=True, metavar="VERB")

    key = verbs.add_parser("key", parents=[common], help="make a key; prints the line for the nodes' policy")
    key.add_argument("--ml-dsa", action="store_true", help="ML-DSA-44 instead of Ed25519")

    serve = verbs.add_parser("serve", parents=[common], help="answer add-checkpoint requests until interrupted")
    serve.add_argument("--listen", default="127.0.0.1:7380", metavar="HOST:PORT", help="plain HTTP: put TLS in front")
    serve.add_argument("--state", required=True, type=Path, metavar="FILE", help="what was signed (SQLite): trusted")
    source = serve.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--logs", type=Path, metavar="FILE", help="`log <verifier key>` lines; read again when it changes"
    )
    source.add_argument("--mirror", metavar="ADDRESS", help="the keys of the epochs that this mirror holds")


def run(args: argparse.Namespace) -> int:
    return {"key": _make_key, "serve": _serve}[args.witness_verb](args)


def _make_key(args: argparse.Namespace) -> int:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    from pointcall_attest.log.checkpoint import Verifier, cosigner

    key: WitnessKey = MLDSA44PrivateKey.generate() if args.ml_dsa else Ed25519PrivateKey.generate()
    public = Verifier.parse(str(cosigner(args.name, key)))  # refuses a name that no policy could hold
    fd = os.open(args.key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    if args.json:
        output.print_json({"name": args.name, "verifier": str(public)})
    else:
        sys.stdout.write(f"{public}\n")
    return output.Exit.OK


def _read_key(path: Path) -> WitnessKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes()[:MAX_KEY_BYTES], None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey | MLDSA44PrivateKey):
        raise output.UsageRefusal(f"{path} is no key of a witness", want="Ed25519 or ML-DSA-44 in PEM, not encrypted")
    return key


def _serve(args: argparse.Namespace) -> int:
    from pointcall_executor.witness_server import Witness, serve

    host, _, port = args.listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise output.UsageRefusal(f"--listen {args.listen!r} is no address", want="HOST:PORT")
    with contextlib.ExitStack() as ending:
        keys = ending.enter_context(_keys(args))
        witness = Witness(args.state, args.name, _read_key(args.key), keys)
        ending.callback(witness.close)
        server = serve(witness, (host.strip("[]"), int(port)), lambda: int(time.time()))
        ending.callback(server.server_close)
        row = {"name": args.name, "verifier": str(witness.verifier), "address": f"http://{host}:{server.server_port}"}
        if args.json:
            output.print_json(row)
        else:
            sys.stdout.write(f"witness {row['verifier']}\nlistening on {row['address']}\n")
            sys.stdout.flush()
        server.serve_forever(poll_interval=0.2)
    return output.Exit.OK


@contextlib.contextmanager
def _keys(args: argparse.Namespace) -> Iterator[Keys]:
    """Where the keys of logs come from; looked up for each request, since they change with every epoch."""
    from pointcall_executor.witness_server import keys_of_file, keys_of_mirror

    yield keys_of_file(args.logs) if args.logs else keys_of_mirror(args.mirror)
