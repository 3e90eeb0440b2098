"""`pointcall probe`: another interpreter's bcc, always marked unmeasured, and clear words where it cannot run."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pointcall_executor import probes
from pointcall_executor.cli import output, probe
from pointcall_executor.kernel import bcc_probe
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.recorded import RecordedNode
from tests.lab import Lab
from tests.scenario.conftest import lab, make_lab, sigstore, tee_folder

__all__ = ["lab", "make_lab", "sigstore", "tee_folder"]  # fixtures
SOURCE = b"int kprobe__x(void *ctx) { return 0; }\n"

# Stands in for the distribution's module: it "compiles" by looking at the text, and traces two lines.
FAKE_BCC = """
class Number:
    def __init__(self, value): self.value = value
class BPF:
    def __init__(self, src_file):
        text = open(src_file).read()
        if "no headers" in text:
            raise Exception("Unable to find kernel headers. Try rebuilding kernel with CONFIG_IKHEADERS=m")
        if "broken" in text:
            raise Exception("Failed to compile BPF module")
        self.lines = [(b"sh", 7, 0, b"", 1.5, b"opened \\x1b[31m"), (b"sh", 8, 0, b"", 2.5, b"closed")]
    def num_open_kprobes(self): return 1
    def num_open_tracepoints(self): return 0
    def num_open_uprobes(self): return 0
    def trace_fields(self, nonblocking):
        assert nonblocking
        return self.lines.pop(0) if self.lines else (None,) * 6
    def __getitem__(self, name): return {Number(3): Number(4)}
    def cleanup(self): pass
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter that has this bcc."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "bcc.py").write_text(FAKE_BCC)
    wrapper = tmp_path / "python3"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={modules} exec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    return wrapper


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "opens.c"
    path.write_bytes(SOURCE)
    return path


def parsed(state: Path, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--state-dir", default=str(state))
    probe.configure(parser)
    return parser.parse_args(words)


def test_lines_and_tables_are_rows(python: Path, file: Path) -> None:
    rows: list[dict[str, Any]] = []
    bcc_probe.run(file, 0.1, ["counts"], rows.append, python)
    assert rows[0] == {"attached": True}
    assert [r["line"] for r in rows if "line" in r] == ["opened \x1b[31m", "closed"]
    assert rows[-1] == {"table": "counts", "rows": [["3", "4"]]}


@pytest.mark.parametrize(("text", "check"), [("no headers", "kernel.bcc.headers"), ("broken", "kernel.bcc.failed")])
def test_what_bcc_refuses_is_said_in_its_words(python: Path, file: Path, text: str, check: str) -> None:
    file.write_text(text)
    with pytest.raises(KernelError) as refused:
        bcc_probe.run(file, 0.1, [], lambda _: None, python)
    assert refused.value.id == check
    assert refused.value.got


def test_an_interpreter_without_bcc_is_not_taken(python: Path, tmp_path: Path) -> None:
    lattices = tmp_path / "lattices"  # PyPI's bcc has no BPF
    lattices.mkdir()
    (lattices / "bcc.py").write_text("class Lattice: pass\n")
    other = tmp_path / "other"
    other.write_text(f'#!/bin/sh\nPYTHONPATH={lattices} exec {sys.executable} "$@"\n')
    other.chmod(0o755)
    assert bcc_probe.find_interpreter([tmp_path / "none", other, python]) == python
    with pytest.raises(KernelError) as refused:
        bcc_probe.find_interpreter([tmp_path / "none", other])
    assert refused.value.id == "kernel.bcc.absent"
    assert "PyPI" in refused.value.hint


def test_without_an_executor_the_next_one_writes_it_into_the_log(
    python: Path, file: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    monkeypatch.setattr(bcc_probe, "INTERPRETERS", (python,))
    monkeypatch.setattr(bcc_probe, "find_interpreter", lambda: python)
    words = [str(file), "--seconds", "0.1", "--table", "counts", "--reason", "slow opens"]
    assert probe.run(parsed(lab.state, *words)) == output.Exit.OK
    shown = capsys.readouterr().out
    assert "UNMEASURED" in shown
    assert "\x1b" not in shown
    assert probe.run(parsed(lab.state, *words, "--json")) == output.Exit.OK
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["measured"], told["rows"]) == (False, 2)
    assert len(probes.pending(lab.state)) == 4
    with lab.executor(RecordedNode()) as executor:
        found = [e.body for e in executor.journal.entries(kind="config") if "unmeasured" in e.body["what"]]
        assert [b["what"] for b in found] == ["unmeasured probe begins", "unmeasured probe ended"] * 2
        digest = hashlib.sha256(SOURCE).hexdigest()
        assert {(b["detail"]["sha256"], b["detail"]["measured"]) for b in found} == {(digest, "no")}
        assert found[0]["detail"]["reason"] == "slow opens"
    assert probes.pending(lab.state) == []


def test_a_probe_that_fails_has_ended_in_the_log_too(
    python: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    file.write_text("broken")
    monkeypatch.setattr(bcc_probe, "find_interpreter", lambda: python)
    with pytest.raises(KernelError):
        probe.run(parsed(tmp_path / "state", str(file)))
    assert [b["what"] for b in probes.pending(tmp_path / "state")] == ["begins", "ended"]


def test_a_line_that_is_not_ours_does_not_stop_the_executor(tmp_path: Path) -> None:
    probes.note(tmp_path, {"what": "begins"})
    with (tmp_path / probes.FILE).open("a") as lines:
        lines.write("\x00\xff{]\n[1]\n")
    assert [b["what"] for b in probes.pending(tmp_path)] == ["begins", "unreadable", "unreadable"]
    probes.taken(tmp_path)
    probes.taken(tmp_path)
    assert probes.pending(tmp_path) == []


@pytest.mark.parametrize("words", [("--seconds", "0"), ("--seconds", "3601"), ("--table", "a b")])
def test_nonsense_is_a_usage_error(file: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(output.UsageRefusal):
        probe.run(parsed(tmp_path, str(file), *words))
    assert probes.pending(tmp_path) == []


@pytest.mark.kernel
def test_the_distributions_own_bcc(file: Path) -> None:
    """For real: it compiles and runs, or says that this kernel's headers are missing."""
    if os.geteuid():
        pytest.skip("needs root")
    try:
        python = bcc_probe.find_interpreter()
    except KernelError as absent:
        pytest.skip(f"{absent.message}: {absent.hint}")
    file.write_text("int unused(void *ctx) { return 0; }\n")
    rows: list[dict[str, Any]] = []
    if Path(f"/lib/modules/{os.uname().release}/build").exists() or Path("/sys/kernel/kheaders.tar.xz").exists():
        bcc_probe.run(file, 0.1, [], rows.append, python)
        assert rows == [{"attached": False}]
        return
    with pytest.raises(KernelError) as refused:
        bcc_probe.run(file, 0.1, [], rows.append, python)
    assert refused.value.id == "kernel.bcc.headers"
    assert os.uname().release in refused.value.want
