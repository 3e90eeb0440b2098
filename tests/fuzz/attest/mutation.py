"""Mutation testing of the code that verifies evidence: does a test fail when a line of it is wrong?

`python -m tests.fuzz.attest.mutation [--module NAME ...] [--sample N] [--minutes M] [--seed S] [--jobs J]` takes the
mutants from cosmic-ray in an order by chance, all of them, N, or as many as M minutes allow: each is as likely as any
other. It prints one JSON object a module and one for the whole, with the 95 % interval of the score. A mutant lives in
the memory of one child process; no file is ever changed. Annotations and decorators that only remember results are not
mutated: a change there cannot be seen from outside. What is equivalent to the code is not taken out of the score.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

ROOT: Final = Path(__file__).resolve().parents[3]
COPIED: Final = ("attest", "runbooks", "executor", "keys", "tests", "docs", "pyproject.toml")
# The unit tests of each module, those that fail soonest first. The common ones follow, and then the vectors.
COMMON: Final = (
    "boundaries",
    "shape",
    "words",
    "snp_report",
    "intel_forms",
    "tdx_appraisal",
    "certificates",
    "snp_appraisal",
)
TESTS: Final = {
    "layout": ("snp_report",),
    "snp": ("snp_report", "snp_appraisal"),
    "certs": ("certificates", "snp_appraisal"),
    "der": ("certificates",),
    "pem": ("certificates",),
    "cert_table": ("certificates",),
    "certificate_file": ("certificates",),
    "crl": ("certificates", "tdx_appraisal"),
    "snp_chain": ("snp_appraisal", "words", "certificates"),
    "snp_rules": ("snp_appraisal", "words"),
    "hcl": ("intel_forms", "command_line"),
    "tdx": ("intel_forms", "tdx_appraisal"),
    "pck": ("intel_forms", "tdx_appraisal"),
    "collateral": ("intel_forms", "tdx_appraisal"),
    "eventlog": ("intel_forms",),
    "tdreport": ("intel_forms",),
    "tdx_chain": ("tdx_appraisal", "words", "intel_forms"),
    "tdx_tcb": ("tdx_appraisal",),
    "tdx_rules": ("tdx_appraisal", "words"),
    "tee_rules": ("snp_appraisal", "tdx_appraisal", "words"),
    "tee_policy": ("snp_appraisal", "platforms", "command_line"),
    "findings": ("snp_appraisal",),
    "evidence": ("platforms",),
    "appraise": ("snp_appraisal", "platforms", "command_line"),
    "trust": ("platforms", "certificates"),
}
# Left out: both cost seconds a mutant. They could only notice more.
SLOW: Final = ("test_every_flipped_bit_of_a_report_is_refused", "test_one_bit_of_every_byte_flipped_is_refused")
EXAMPLES: Final = 25  # of a property, a quarter of what the suite itself takes: a mutant that lives through is counted
VECTORS: Final = "tests/vectors/tee/test_tee_vectors.py"
TIMEOUT_S: Final = 60  # of processor time; the whole run of a mutant that lives takes some ten
MEMORY_BYTES: Final = 2 << 30
UNCHANGED: Final = "unchanged"  # the control: no mutant, so no test may fail
Outcome = Literal["killed", "survived", "timeout"]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one module."""

    module: str
    operator: str
    occurrence: int
    line: int
    source: str  # of the line, before


def main(words: Sequence[str]) -> int:
    """Run the modules that were named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--module", action="append", choices=tuple(TESTS))
    parser.add_argument("--sample", type=int, metavar="N", help="so many mutants, by chance over all modules")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no mutant after so long")
    parser.add_argument("--seed", type=int, default=1, help="of that chance")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        tree = _copied(Path(folder))
        found = [mutant for module in args.module or TESTS for mutant in _mutants(tree, module)]
        chosen = random.Random(args.seed).sample(found, min(args.sample or len(found), len(found)))
        outcomes = _run(tree, chosen, args.jobs, math.inf if args.minutes is None else args.minutes * 60)
    for module in args.module or TESTS:
        of = sum(mutant.module == module for mutant in found)
        _print({"module": module, "of": of}, [(m, o) for m, o in outcomes if m.module == module])
    whole = {"of": len(found), "seed": args.seed}
    _print(whole, outcomes, with_survivors=False)
    return 0


def _copied(folder: Path) -> Path:
    """The tree as it is now, and the vectors beside it: edits during a long run change nothing."""
    tree = folder / "tree"
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    (folder / "shared").symlink_to(ROOT.parent / "shared")
    return tree


def _mutants(tree: Path, module: str) -> list[Mutant]:
    """Every mutant that cosmic-ray makes of one module, in its order."""
    import cosmic_ray.plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    code = _path(tree, module).read_text()
    lines, nodes, found = code.splitlines(), list(ast_nodes(get_ast(code))), []
    for name in sorted(cosmic_ray.plugins.operator_names()):
        operator_class = cosmic_ray.plugins.get_operator(name)
        if operator_class.arguments() or name.startswith("core/ReplaceBinaryOperator_BitOr_"):  # `X | Y` in annotations
            continue
        positions = [start for node in nodes for start, _ in operator_class().mutation_positions(node)]
        for occurrence, (line, _) in enumerate(positions):
            source = lines[line - 1].strip()
            if not (name == "core/RemoveDecorator" and source.startswith(("@lru_cache", "@cache"))):
                found.append(Mutant(module, name, occurrence, line, source))
    return found


def _run(tree: Path, mutants: Sequence[Mutant], jobs: int, seconds: float) -> list[tuple[Mutant, Outcome]]:
    """Each mutant in a child of this process, which has loaded all that is not ours."""
    keys = _warmed()
    if _tried(tree, Mutant(mutants[0].module, UNCHANGED, 0, 0, ""), keys) != "survived":
        raise SystemExit("the tests fail without any mutant: a score would mean nothing")
    started = time.monotonic()

    def outcome_of(mutant: Mutant) -> Outcome | None:
        return _tried(tree, mutant, keys) if time.monotonic() - started < seconds else None

    done: list[tuple[Mutant, Outcome]] = []
    with ThreadPoolExecutor(jobs) as pool:
        for mutant, outcome in zip(mutants, pool.map(outcome_of, mutants), strict=True):
            if outcome is None:
                continue
            done.append((mutant, outcome))
            if outcome == "survived":
                _note(f"{mutant.module}:{_named(mutant)}")
            if len(done) % 50 == 0:
                _note(f"{len(done)} of {len(mutants)} in {time.monotonic() - started:.0f} s")
    return done


def _named(m: Mutant) -> str:
    return f"{m.line}: {m.operator.removeprefix('core/')} #{m.occurrence}: {m.source}"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _warmed() -> list[Any]:
    """Import what the tests need from others, and make the large keys that their fixtures would make each time."""
    import hypothesis  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import rfc8785  # noqa: F401
    from cryptography import x509  # noqa: F401
    from cryptography.hazmat.primitives.asymmetric import rsa

    return [rsa.generate_private_key(65537, 4096) for _ in range(4)]


def _tried(tree: Path, mutant: Mutant, keys: list[Any]) -> Outcome:
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(_child(tree, mutant, keys))
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL):
        return "timeout"
    return "survived" if status == 0 else "killed"


def _child(tree: Path, mutant: Mutant, keys: list[Any]) -> int:
    """Run the tests with the mutant in place of its module; 0 where none fails. Never returns to the caller's work."""
    resource.setrlimit(resource.RLIMIT_CPU, (TIMEOUT_S, TIMEOUT_S + 5))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.alarm(10 * TIMEOUT_S)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.chdir(tree)
    sys.path[:0] = [str(tree / name) for name in ("runbooks", "attest", "keys", "executor", "")]
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "pointcall_attest")]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Mutated(_path(tree, mutant.module), mutant))
    _give_keys(keys)
    import hypothesis
    import pytest

    hypothesis.settings.register_profile("mutation", max_examples=EXAMPLES, deadline=None, database=None)
    hypothesis.settings.load_profile("mutation")

    quiet = ["-x", "-q", "-p", "no:faulthandler", "--no-header", "--tb=no"]
    quiet += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]  # hypothesis, by the parent
    first = [_file(name) for name in TESTS[mutant.module]]
    others = [_file(name) for name in COMMON if name not in TESTS[mutant.module]]
    slow = [f"{_file('snp_appraisal')}::{SLOW[0]}", f"{_file('tdx_appraisal')}::{SLOW[1]}"]
    without = [word for name in slow for word in ("--deselect", name)]
    return int(pytest.main([*quiet, *without, *first])) or int(pytest.main([*quiet, *without, *others, VECTORS]))


def _file(name: str) -> str:
    return f"tests/unit/attest_tee/test_tee_{name}.py"


class _Mutated:
    """Finds one module, and gives its mutant."""

    def __init__(self, path: Path, mutant: Mutant) -> None:
        self.name, self.path, self.mutant = f"pointcall_attest.{mutant.module}", path, mutant

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        from importlib.util import spec_from_file_location

        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None  # type: ignore[arg-type]

    def create_module(self, spec: object) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        import cosmic_ray.plugins
        from cosmic_ray.mutating import mutate_code

        code = self.path.read_text()
        if self.mutant.operator != UNCHANGED:
            operator = cosmic_ray.plugins.get_operator(self.mutant.operator)()
            code = mutate_code(code, operator, self.mutant.occurrence)
        assert code is not None, "the mutant was found in this very text"
        exec(compile(code, str(self.path), "exec"), module.__dict__)


def _give_keys(keys: Iterable[Any]) -> None:
    """The first large keys that anybody makes are those of the parent: a second a mutant is saved."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    ready, make = iter(keys), rsa.generate_private_key

    def generate(exponent: int, size: int) -> Any:
        return next(ready, None) or make(exponent, size) if (exponent, size) == (65537, 4096) else make(exponent, size)

    rsa.generate_private_key = generate  # type: ignore[assignment]


def _path(tree: Path, module: str) -> Path:
    return tree / "attest" / "pointcall_attest" / f"{module}.py"


def _print(row: dict[str, Any], outcomes: Sequence[tuple[Mutant, Outcome]], *, with_survivors: bool = True) -> None:
    """One JSON object: how many, how many noticed, the score and its 95 % interval."""
    count = Counter(outcome for _, outcome in outcomes)
    noticed = count["killed"] + count["timeout"]
    low, high = wilson(noticed, len(outcomes))
    row |= {"mutants": len(outcomes), "killed": count["killed"], "timeout": count["timeout"]}
    row |= {"survived": count["survived"], "score": round(noticed / max(len(outcomes), 1), 4), "low": low, "high": high}
    if with_survivors:
        row["survivors"] = [_named(m) for m, outcome in outcomes if outcome == "survived"]
    print(json.dumps(row), flush=True)


def wilson(hits: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, after Wilson; (0, 1) where nothing was tried."""
    if not total:
        return 0.0, 1.0
    z, share = 1.959964, hits / total
    middle = share + z * z / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return round((middle - reach) / scale, 4), round((middle + reach) / scale, 4)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
