"""`pointcall run`: the executor on this node, until it is told to stop.

SIGTERM and SIGINT disarm and close the epoch; SIGHUP reads the settings and the manifest folder again.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML (docs/spec/config.md)")
    parser.add_argument(
        "--manifest", type=Path, metavar="DIR", help="what to arm: *.sigstore.json and files/ (default: STATE/manifest)"
    )


def run(args: argparse.Namespace) -> int:
    gc.disable()  # imports free next to nothing: looking for garbage among them would take a sixth of their time
    try:
        from pointcall_executor.beginning import begin, leave_in_order
        from pointcall_executor.cli.output import state_dir

        state = state_dir(args).absolute()
        leave_in_order()
        begun = begin(state, args.config)
    except BaseException:
        gc.enable()
        raise
    with begun.ending:
        try:
            from pointcall_executor.serving import Serving  # the large rest, without privileges by now
        finally:
            gc.enable()
        return Serving(begun, state, args.config, args.manifest or state / "manifest").run()
