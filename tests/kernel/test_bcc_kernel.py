"""`pointcall probe` with the distribution's bcc: compiled on the node, attached, its lines and tables as rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pointcall_executor.kernel import bcc_probe
from pointcall_executor.kernel.errors import KernelError

pytestmark = pytest.mark.kernel

HEADERS = Path("/lib/modules", os.uname().release, "build")
CALLS = 5
SOURCE = """
BPF_HASH(counts, u32, u64);
TRACEPOINT_PROBE(syscalls, sys_enter_getpgid) {
    u32 pid = bpf_get_current_pid_tgid() >> 32;
    if (pid != %d)
        return 0;
    counts.increment(pid);
    bpf_trace_printk("pgid of %%d", (int)args->pid);
    return 0;
}
"""


@pytest.fixture
def python() -> Path:
    """The interpreter that has bcc, where the kernel's headers are, too."""
    try:
        found = bcc_probe.find_interpreter()
    except KernelError as absent:
        pytest.skip(f"{absent.want}: {absent.hint}")
    if not HEADERS.exists():
        pytest.skip(f"no headers of kernel {os.uname().release}")
    return found


def test_a_probe_is_compiled_here_and_what_it_traces_are_rows(python: Path, tmp_path: Path) -> None:
    path, rows = tmp_path / "pgid.c", list[dict[str, Any]]()
    path.write_text(SOURCE % os.getpid())

    def seen(row: dict[str, Any]) -> None:
        rows.append(row)
        if row == {"attached": True}:
            for _ in range(CALLS):
                os.getpgid(1)

    bcc_probe.run(path, 5, ["counts"], seen, python)
    assert rows[0] == {"attached": True}
    assert [(row["pid"], row["line"]) for row in rows if "line" in row] == [(os.getpid(), "pgid of 1")] * CALLS
    assert rows[-1] == {"table": "counts", "rows": [[str(os.getpid()), str(CALLS)]]}


@pytest.mark.parametrize("source", ["int kprobe__nothing_of_that_name(void *ctx) { return 0; }", "this is no C"])
def test_what_it_does_not_take_is_refused_in_its_own_words(python: Path, tmp_path: Path, source: str) -> None:
    path = tmp_path / "probe.c"
    path.write_text(source)
    with pytest.raises(KernelError) as refused:
        bcc_probe.run(path, 1, [], lambda _: None, python)
    assert refused.value.id == "kernel.bcc.failed"
    assert refused.value.got
