"""The probe and the loader agree: a blob loads exactly where no hook of it is absent, and what is absent is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.loader import load
from pointcall_executor.kernel.probe import BLOBS, absent_hooks, probe

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("path", sorted(BLOBS.glob("*.blob")), ids=lambda path: path.stem)
def test_a_blob_loads_where_nothing_is_absent(path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    blob, loads = Blob.parse(path.read_bytes()), True
    try:
        load(blob).close()
    except KernelError:
        loads = False
    absent = absent_hooks(blob)
    assert loads == (not absent), absent
    sections = {program.section for program in blob.programs} | {"bpf_sock_destroy"}
    assert {line.split(" ")[0] for line in absent} <= sections


def test_doctor_says_of_each_blob_what_the_loader_says() -> None:
    if os.geteuid():
        pytest.skip("needs root")
    said = {f.id.removeprefix("blob/"): f.present for f in probe() if f.id.startswith("blob/")}
    assert said == {p.stem: not absent_hooks(Blob.parse(p.read_bytes())) for p in BLOBS.glob("*.blob")}
