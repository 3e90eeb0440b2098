"""The build is reproducible, and the pages that describe it agree with it."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pointcall_executor.core.event import Kind
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.kernel_object import CGROUP_ATTACH
from pointcall_executor.kernel.probe import BLOBS

ROOT = Path(__file__).resolve().parents[3]
TOOLS = ("clang-14", "llvm-strip", "llvm-objdump", "make")


def test_the_same_digest_in_another_folder(tmp_path: Path) -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or not (shutil.which("bpftool") or Path("/usr/sbin/bpftool").exists()):
        pytest.skip(f"not installed: {' '.join(missing) or 'bpftool'}")
    here = BLOBS / "breaker.blob"
    if not here.exists():
        pytest.skip("blob breaker is not built: make -C bpf")
    tree = tmp_path / "somewhere" / "else"
    shutil.copytree(ROOT / "bpf", tree / "bpf", ignore=shutil.ignore_patterns("build"))
    for room in ("executor/pointcall_executor", "attest/pointcall_attest", "runbooks/pointcall_runbook"):
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("blobs", "__pycache__", "generated"))
    out = tree / "bpf" / ".." / "executor" / "pointcall_executor" / "blobs" / "breaker.blob"
    subprocess.run(["make", "-s", "-C", tree / "bpf", out], check=True)
    assert Blob.parse(out.read_bytes()).sha256 == Blob.parse(here.read_bytes()).sha256


@pytest.mark.parametrize("path", sorted(BLOBS.glob("*.blob")), ids=lambda path: path.stem)
def test_every_program_attaches_in_a_way_that_we_know(path: Path) -> None:
    known = {*CGROUP_ATTACH, "syscall", "iter/tcp", "lsm/bpf"}
    sections = {program.section for program in Blob.parse(path.read_bytes()).programs}
    assert {s for s in sections if s not in known and not s.startswith(("tp_btf/", "fentry/", "fexit/"))} == set()


def test_the_page_lists_every_kind_of_record() -> None:
    page = (ROOT / "docs" / "spec" / "kernel-abi.md").read_text()
    rows = {(int(n), name) for n, name in re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", page, re.MULTILINE)}
    assert rows == {(kind.value, kind.name) for kind in Kind}


@pytest.mark.parametrize("path", sorted(BLOBS.glob("*.blob")), ids=lambda path: path.stem)
def test_the_page_has_every_constant_with_its_default(path: Path) -> None:
    page, ours = (ROOT / "docs" / "spec" / "kernel-abi.md").read_text(), {"scope_cgroup", "scope_level", "executor"}
    defaults = Blob.parse(path.read_bytes()).defaults
    assert [n for n, v in defaults.items() if n not in ours and not re.search(rf"`{n}` {v}\b", page)] == []


def test_the_readme_lists_every_file_of_the_room() -> None:
    named = set(re.findall(r"`([\w./-]+\.(?:c|h|py))`", (ROOT / "bpf" / "README.md").read_text()))
    files = {str(p.relative_to(ROOT / "bpf")) for p in (ROOT / "bpf").rglob("*") if p.suffix in (".c", ".h", ".py")}
    assert {f for f in files if not f.startswith("build/")} <= named


def test_error_ids_of_the_room_have_one_form() -> None:
    ids = set()
    for path in (ROOT / "executor" / "pointcall_executor" / "kernel").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "id" and isinstance(node.value, ast.Constant):
                ids.add(node.value.value)
    assert ids
    assert {i for i in ids if not re.fullmatch(r"kernel\.[a-z]+(\.[a-z_]+)?", i)} == set()
