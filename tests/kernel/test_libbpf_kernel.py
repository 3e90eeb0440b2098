"""The second loader gives the same programs as the first, and the breaker works with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from pointcall_executor.kernel import bpf, libbpf, loader
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.breaker import BreakerSensor
from pointcall_executor.kernel.errors import KernelError, LoadError
from pointcall_executor.kernel.loader import Loaded
from tests.kernel.conftest import FAST
from tests.kernel.lab import BLOCKED, REFUSED, connects, here, member, need_blob, private_network

pytestmark = pytest.mark.kernel
BUILD = Path(__file__).resolve().parents[2] / "bpf" / "build"


def through_libbpf(blob: Blob, constants: Mapping[str, int] | None = None) -> Loaded:
    path = BUILD / f"{blob.name}.bpf.o"
    if not path.exists():
        pytest.skip(f"the object is not built: {path.name}")
    try:
        return libbpf.load(blob, path.read_bytes(), constants)
    except KernelError as error:
        if error.id == "kernel.libbpf":
            pytest.skip("libbpf.so.1 is not installed")
        raise


def sizes(loaded: Loaded) -> dict[str, int]:
    try:
        return {name: bpf.program_info(fd).size for name, fd in loaded.programs.items()}
    finally:
        loaded.close()


@pytest.mark.parametrize("name", ["breaker", "lifecycle", "storage", "syscalls", "transport", "drill"])
def test_both_loaders_give_the_same_programs(name: str) -> None:
    """Tags differ by design: they cover how an instruction names a map, by descriptor or by index."""
    blob = need_blob(name)
    assert sizes(through_libbpf(blob)) == sizes(loader.load(blob))


def test_the_breaker_works_with_it() -> None:
    blob = need_blob("breaker")
    with (
        private_network(),
        member("libbpf") as group,
        BreakerSensor(blob, cgroup=group.path, constants=FAST, loader=through_libbpf) as breaker,
    ):
        breaker.attach()
        breaker.arm(here(30801))
        assert connects(5, 30801) == [REFUSED] * 3 + [BLOCKED] * 2


def test_garbage_is_refused_with_libbpfs_words() -> None:
    blob = need_blob("breaker")
    through_libbpf(blob).close()
    with pytest.raises(LoadError) as refused:
        libbpf.load(blob, b"\x7fELF" + bytes(200))
    assert refused.value.log


def test_the_object_of_another_blob_is_refused() -> None:
    blob, other = need_blob("breaker"), BUILD / "storage.bpf.o"
    through_libbpf(blob).close()
    if not other.exists():
        pytest.skip(f"the object is not built: {other.name}")
    with pytest.raises(LoadError):
        libbpf.load(blob, other.read_bytes())
