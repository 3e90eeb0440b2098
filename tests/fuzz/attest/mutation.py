"""Mutation testing of the code that verifies evidence: does a test fail when a line of it is wrong?

`python -m tests.fuzz.attest.mutation [--module NAME ...] [--sample N]` runs cosmic-ray on a copy of the tree and prints
one JSON object a module. Never in place. Annotations are not mutated: they change nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[3]
COPIED: Final = ("attest", "runbooks", "executor", "keys", "tests", "docs", "pyproject.toml")
TESTS: Final = {
    "snp": ("snp_report", "snp_appraisal"),
    "snp_chain": ("snp_appraisal", "words", "certificates"),
    "snp_rules": ("snp_appraisal", "words"),
    "tdx": ("intel_forms", "tdx_appraisal"),
    "tdx_chain": ("tdx_appraisal", "words", "intel_forms"),
    "tdx_rules": ("tdx_appraisal", "words"),
    "tdx_tcb": ("tdx_appraisal",),
    "tee_rules": ("snp_appraisal", "tdx_appraisal", "words"),
    "certs": ("certificates", "snp_appraisal"),
    "der": ("certificates",),
    "pck": ("intel_forms", "tdx_appraisal"),
    "crl": ("certificates", "tdx_appraisal"),
    "collateral": ("intel_forms", "tdx_appraisal"),
    "eventlog": ("intel_forms",),
    "cert_table": ("certificates",),
    "layout": ("snp_report",),
}
CONFIG: Final = """[cosmic-ray]
module-path = "attest/pointcall_attest/{module}.py"
timeout = 60.0
excluded-modules = []
test-command = "{python} -m pytest -x -q {tests}"
[cosmic-ray.distributor]
name = "local"
[cosmic-ray.filters.operators-filter]
exclude-operators = ["core/ReplaceBinaryOperator_BitOr_.*"]
"""


def main(words: Sequence[str]) -> int:
    """Run the modules that were named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--module", action="append", choices=tuple(TESTS))
    parser.add_argument("--sample", type=int, help="at most this many mutants a module, by chance")
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        _copy_tree(copy)
        rows = [_run(copy, module, args.sample) for module in args.module or TESTS]
    killed, total = sum(row["killed"] for row in rows), sum(row["mutants"] for row in rows)
    print(json.dumps({"mutants": total, "killed": killed, "score": round(killed / max(total, 1), 3)}))
    return 0


def _copy_tree(copy: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)


def _run(copy: Path, module: str, sample: int | None) -> dict[str, int]:
    """Mutate one module, and count the mutants that some test notices."""
    tests = " ".join(f"tests/unit/attest_tee/test_tee_{name}.py" for name in TESTS[module])
    config, session = copy / f"{module}.toml", copy / f"{module}.sqlite"
    config.write_text(CONFIG.format(module=module, python=sys.executable, tests=tests))
    tools = Path(sys.executable).parent
    for words in (
        (tools / "cosmic-ray", "init", config, session),
        (tools / "cr-filter-operators", session, config),
    ):
        subprocess.run(words, cwd=copy, check=True, capture_output=True)
    if sample is not None:
        _keep(session, sample)
    subprocess.run((tools / "cosmic-ray", "exec", config, session), cwd=copy, check=True, capture_output=True)
    with sqlite3.connect(session) as database:
        outcomes = [str(row[0]) for row in database.execute("SELECT test_outcome FROM work_results")]
        survivors = [
            f"{operator} at line {line}"
            for operator, line in database.execute(
                "SELECT operator_name, start_pos_row FROM mutation_specs JOIN work_results USING (job_id)"
                " WHERE test_outcome LIKE '%SURVIVED%'"
            )
        ]
    killed = sum("KILLED" in outcome or "INCOMPETENT" in outcome for outcome in outcomes)
    total = killed + len(survivors)
    print(json.dumps({"module": module, "mutants": total, "killed": killed, "survivors": survivors}), flush=True)
    return {"mutants": total, "killed": killed}


def _keep(session: Path, sample: int) -> None:
    """Leave a random sample of the mutants that the filter left to do."""
    with sqlite3.connect(session) as database:
        jobs = [
            row[0]
            for row in database.execute(
                "SELECT job_id FROM work_items WHERE job_id NOT IN (SELECT job_id FROM work_results)"
            )
        ]
        for job in random.Random(1).sample(jobs, max(len(jobs) - sample, 0)):
            database.execute("DELETE FROM mutation_specs WHERE job_id = ?", (job,))
            database.execute("DELETE FROM work_items WHERE job_id = ?", (job,))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
