"""Reading a runbook for the verbs that take one: a folder, a source or a module; and how a refused source is shown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pointcall_executor.cli.output import EnvironmentRefusal, Exit, print_json

if TYPE_CHECKING:
    from pointcall_runbook.compiler import Compiled, CompileError


def source_file(path: Path) -> Path:
    """The file that a folder stands for, or the file itself. EnvironmentRefusal where there is none."""
    found = path / "runbook.py" if path.is_dir() else path
    if not found.is_file():
        raise EnvironmentRefusal(f"{path} is no runbook", want="a file, or a folder with runbook.py")
    return found


def compiled(path: Path) -> Compiled:
    """Compile a source file. Raises CompileError; a file that is not UTF-8 has characters that are refused."""
    from pointcall_runbook.compiler import compile_source

    return compile_source(path.read_bytes().decode("utf-8", errors="surrogateescape"), str(path))


def refused(error: CompileError, *, as_json: bool) -> int:
    """Print every diagnostic, for an editor with `--json`; the exit code."""
    if as_json:
        print_json({"ok": False, "diagnostics": [d.as_dict() for d in error.diagnostics], "exit": int(Exit.REFUSED)})
    else:
        sys.stderr.write(str(error).encode(errors="replace").decode() + "\n")
    return Exit.REFUSED
