"""`python -m pointcall_keys.private_sigstore DIR`: serve the instance of a folder, or print a token of it. For labs."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import signal
import sys
from pathlib import Path

from pointcall_keys.errors import KeysError
from pointcall_keys.private_sigstore.instance import Instance
from pointcall_keys.private_sigstore.server import PrivateSigstore


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pointcall_keys.private_sigstore")
    parser.add_argument("dir", metavar="DIR", type=Path, help="the folder that holds the instance, keys included")
    parser.add_argument("--token", metavar="SUBJECT", help="print an identity token for SUBJECT and end")
    args = parser.parse_args()
    try:
        return _print_token(args.dir, args.token) if args.token else _serve(args.dir)
    except KeysError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _serve(directory: Path) -> int:
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before any thread exists, so that all of them inherit it
    with PrivateSigstore.start(directory, clock=_now) as sigstore:
        (directory / "trust_config.json").write_text(json.dumps(sigstore.trust_config(), indent=1))
        (directory / "trusted_root.json").write_bytes(sigstore.trusted_root())
        (directory / "url").write_text(sigstore.url)
        print(sigstore.url, flush=True)
        signal.sigwait(signals)
    return 0


def _print_token(directory: Path, subject: str) -> int:
    path = directory / "url"
    if not path.exists():
        raise KeysError("this folder has served no instance yet", id="sigstore.port", got=str(directory))
    print(Instance(directory, path.read_text(), _now).token(subject))
    return 0


if __name__ == "__main__":
    sys.exit(main())
