"""Finding the v2 tree on both layouts, and reading BTF."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointcall_executor.kernel import btf
from pointcall_executor.kernel.cgroup import Cgroup, find_root
from pointcall_executor.kernel.errors import KernelError

HYBRID = """tmpfs /sys/fs/cgroup tmpfs rw 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0
"""
PURE = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n"


@pytest.mark.parametrize(
    ("mounts", "root"),
    [(HYBRID, "/sys/fs/cgroup/unified"), (PURE, "/sys/fs/cgroup"), ("cgroup2 /a\\040b cgroup2 rw 0 0", "/a b")],
)
def test_the_tree_is_found_on_both_layouts(mounts: str, root: str) -> None:
    assert find_root(mounts) == Path(root)


@pytest.mark.parametrize("mounts", ["", "cgroup /sys/fs/cgroup/memory cgroup rw 0 0", "short line"])
def test_no_tree_is_an_error_that_says_so(mounts: str) -> None:
    with pytest.raises(KernelError) as refused:
        find_root(mounts)
    assert refused.value.id == "kernel.cgroup.absent"


def test_a_folder_outside_the_tree_is_no_cgroup(tmp_path: Path) -> None:
    if "cgroup2" not in Path("/proc/self/mounts").read_text():
        pytest.skip("no cgroup v2 tree is mounted")
    with pytest.raises(KernelError) as refused:
        _ = Cgroup(tmp_path).level
    assert refused.value.id == "kernel.cgroup.outside"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x"])
def test_a_name_cannot_leave_the_tree(name: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        Cgroup.create(name, tmp_path)


def test_btf_ids_of_this_kernel() -> None:
    if not btf.VMLINUX.exists():
        pytest.skip("no BTF: /sys/kernel/btf/vmlinux")
    raw = btf.VMLINUX.read_bytes()
    wanted = [(btf.Kind.STRUCT, "task_struct"), (btf.Kind.FUNC, "task_struct"), (btf.Kind.STRUCT, "no_such_thing")]
    assert set(btf.find(raw, wanted)) == {(btf.Kind.STRUCT, "task_struct")}
    with pytest.raises(KernelError):
        btf.find(raw[: len(raw) // 3], wanted)


@given(st.binary(max_size=120))
@settings(max_examples=200, deadline=None)
def test_noise_is_not_btf(noise: bytes) -> None:
    for raw in (noise, b"\x9f\xeb\x01\x00\x18\0\0\0" + noise):
        try:
            btf.find(raw, [(btf.Kind.FUNC, "f")])
        except KernelError:
            continue


def test_a_folder_that_somebody_else_removes_at_the_same_moment_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Cgroup(tmp_path / "g")
    group.path.mkdir()
    (group.path / "cgroup.events").write_text("populated 0\n")

    def taken(path: Path, _pattern: str) -> Iterator[Path]:
        (path / "cgroup.events").unlink()
        path.rmdir()
        raise FileNotFoundError(2, "gone", str(path))
        yield path

    monkeypatch.setattr(Path, "rglob", taken)
    group.remove()
    assert not group.path.exists()
    monkeypatch.undo()

    def no_device(_group: Cgroup) -> None:
        group.path.rmdir()
        raise OSError(19, "No such device")  # what cgroup.kill says then

    group.path.mkdir()
    monkeypatch.setattr(Cgroup, "populated", lambda _group: True)
    monkeypatch.setattr(Cgroup, "kill", no_device)
    group.remove()
    monkeypatch.undo()
    group.path.mkdir()  # without a file that says whether it is populated, as one that goes
    group.remove()
    assert not group.path.exists()
