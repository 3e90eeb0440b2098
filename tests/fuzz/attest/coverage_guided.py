"""Coverage-guided fuzzing of the same parsers with atheris, where it is installed. Seeds are those of mutants.py.

`python -m tests.fuzz.attest.coverage_guided [--parser tdx.parse] [--inputs N]`: one parser, or each in a process of its
own; libFuzzer prints the input that breaks a rule.
Our modules are imported late, so that atheris can instrument them and nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def main(words: Sequence[str]) -> None:
    """Fuzz one parser, and end the process as libFuzzer does; or all of them, and fail with the first that does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parser")
    parser.add_argument("--inputs", type=int, default=100_000, help="for each parser")
    args = parser.parse_args(words)
    if args.parser is None:
        mutants = importlib.import_module("tests.fuzz.attest.mutants")
        for name in [target.name for target in mutants.targets()]:
            one = ("-m", "tests.fuzz.attest.coverage_guided", "--parser", name, "--inputs", str(args.inputs))
            said = subprocess.run((sys.executable, *one), capture_output=True, text=True, check=False)
            if said.returncode:
                sys.exit(said.stdout + said.stderr)
            print(json.dumps({"parser": name, "inputs": args.inputs, "atheris": "no rule was broken"}), flush=True)
        return
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["pointcall_attest"]):
        mutants = importlib.import_module("tests.fuzz.attest.mutants")
    target = next(one for one in mutants.targets() if one.name == args.parser)
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(target.seeds):
            (Path(corpus) / f"{number}").write_bytes(seed)
        _fuzz(atheris, mutants, target, [f"-runs={args.inputs}", corpus])


def _fuzz(atheris: Any, mutants: ModuleType, target: Any, options: Sequence[str]) -> None:
    def one_input(raw: bytes) -> None:
        try:
            target.parse(raw)
        except mutants.MalformedError:
            return

    limits = ["-timeout=1", "-rss_limit_mb=256", "-max_len=20000", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, *options], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
