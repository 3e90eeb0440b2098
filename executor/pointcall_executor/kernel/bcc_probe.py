"""A diagnosis probe in BCC's C: compiled on this machine, so nobody measured it. Never part of a manifest.

It uses the distribution's bcc (Debian: python3-bpfcc) in an interpreter of its own, because the executor's need not
have it, and because 60 MiB of compiler do not belong into the executor. PyPI's `bcc` is another project. BCC compiles
against the kernel's headers, and cannot without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from pointcall_executor.kernel.errors import KernelError

RUNNER: Final = Path(__file__).with_name("bcc_runner.py")
INTERPRETERS: Final = (Path(sys.executable), Path("/usr/bin/python3"))
MAX_SOURCE_BYTES: Final = 256 * 1024  # a probe is a page of C
MAX_SECONDS: Final = 3600.0
CLEAN: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
_HAS_BCC: Final = "import bcc; bcc.BPF"


def find_interpreter(candidates: Sequence[Path] = INTERPRETERS) -> Path:
    """One that can import the distribution's bcc. KernelError `kernel.bcc.absent`."""
    for python in candidates:
        if python.exists() and subprocess.run([python, "-c", _HAS_BCC], capture_output=True, env=CLEAN).returncode == 0:
            return python
    raise KernelError(
        "BCC is not installed", id="kernel.bcc.absent", want="the distribution's python bindings of bcc",
        got="not found by " + ", ".join(map(str, candidates)),
        hint="apt-get install python3-bpfcc; PyPI's `bcc` is something else",
    )  # fmt: skip


def run(
    path: Path, seconds: float, tables: Sequence[str], on_row: Callable[[dict[str, Any]], None], python: Path
) -> None:
    """Run the probe for so long; each traced line and each table is a row.

    KernelError: `kernel.bcc.headers` where the kernel's headers are missing, `kernel.bcc.failed` for the rest, with
    the compiler's own words.
    """
    command = [str(python), str(RUNNER), str(path), str(seconds), *tables]
    with subprocess.Popen(command, env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                on_row(json.loads(line))
            said = process.stderr.read() if process.stderr is not None else ""
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise _failed(said)


def _failed(said: str) -> KernelError:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if "kernel headers" in said or "/build" in said:
        return KernelError(
            "BCC cannot compile here", id="kernel.bcc.headers", want=f"the headers of kernel {os.uname().release}",
            got=lines[0][:200] if lines else "", hint="apt-get install linux-headers-$(uname -r), where there are any",
        )  # fmt: skip
    return KernelError(
        "the probe failed", id="kernel.bcc.failed", want="a program that BCC compiles and this kernel takes",
        got=" | ".join(lines[-4:])[:800], hint="bcc says what is wrong; this kernel may grant no kprobes",
    )  # fmt: skip
