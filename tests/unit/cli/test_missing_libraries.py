"""A verb that needs a library of an extra says which one is missing, and nothing else breaks. Tried in a child."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pointcall_executor.cli.output import Exit

CHILD = """
import json, sys
sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))  # what is None cannot be imported
from pointcall_executor.cli import main
raise SystemExit(main(sys.argv[2:]))
"""


def without(libraries: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(libraries), *words],
        capture_output=True, text=True, timeout=60, env=environment, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("libraries", "words", "code", "id"),
    [
        (["textual"], ["top"], Exit.ENVIRONMENT, "top.missing"),
        (["mcp"], ["mcp"], Exit.ENVIRONMENT, "mcp.missing"),
        (["psycopg"], ["mirror", "status", "host=127.0.0.1"], Exit.REFUSED, "mirror.driver"),
    ],
)
def test_the_missing_library_is_named(
    libraries: list[str], words: list[str], code: int, id: str, tmp_path: Path
) -> None:
    done = without(libraries, *words, "--json", "--state-dir", str(tmp_path))
    assert (done.returncode, done.stderr) == (code, "")
    error = json.loads(done.stdout)["error"]
    assert error["id"] == id
    assert libraries[0] in error["got"]
    assert error["hint"]


def test_everything_else_goes_on_without_them(tmp_path: Path) -> None:
    """A node has none of them: the verbs of an auditor and of a person on call need none."""
    done = without(["textual", "mcp", "psycopg", "opentelemetry"], "explain", "CircuitOpened", "--json")
    assert done.returncode == Exit.OK, done.stderr
    assert "CircuitOpened" in done.stdout
