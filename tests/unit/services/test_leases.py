"""Leases as the spawner keeps them, on files that stand for those of a cgroup."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointcall_executor.services.spawner import Files, Leases

HOUR_NS = 3_600_000_000_000


def files(folder: Path, name: str = "cgroup.freeze") -> Files:
    (folder / name).write_text("0")
    return [[str(folder / name), "1", "0"]]


def test_a_lease_is_ended_at_its_time_and_the_next_end_is_known(tmp_path: Path) -> None:
    leases, one = Leases(), files(tmp_path)
    assert leases.end() is None
    leases.begin(one, time.monotonic_ns() + HOUR_NS)
    seconds = leases.end()
    assert seconds is not None
    assert 3500 < seconds <= 3600
    assert (tmp_path / "cgroup.freeze").read_text()[0] == "1"
    leases.begin(one, time.monotonic_ns() - 1)
    assert leases.end() is None
    assert (tmp_path / "cgroup.freeze").read_text()[0] == "0"


def test_everything_ends_with_the_executor(tmp_path: Path) -> None:
    leases = Leases()
    for name in "abc":
        leases.begin(files(tmp_path, name), time.monotonic_ns() + HOUR_NS)
    assert leases.end(all=True) is None
    assert [(tmp_path / n).read_text()[0] for n in "abc"] == ["0", "0", "0"]


def test_one_that_cannot_begin_leaves_nothing_stopped_and_nothing_due(tmp_path: Path) -> None:
    leases, one = Leases(), files(tmp_path)
    absent = str(tmp_path / "absent" / "x")
    with pytest.raises(FileNotFoundError):
        leases.begin([*one, [absent, "1", "0"]], time.monotonic_ns() + HOUR_NS)
    assert (tmp_path / "cgroup.freeze").read_text()[0] == "0"
    assert leases.end() is None


def test_a_cgroup_that_is_gone_is_freed(tmp_path: Path) -> None:
    leases, one = Leases(), files(tmp_path)
    leases.begin(one, time.monotonic_ns() - 1)
    (tmp_path / "cgroup.freeze").unlink()
    assert leases.end() is None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(-5, 5)), max_size=30))
def test_only_what_is_leased_is_stopped(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, bool, int]]
) -> None:
    folder = tmp_path_factory.mktemp("leases")
    leases, all_files, model = Leases(), {n: files(folder, n) for n in "abc"}, dict.fromkeys("abc", False)
    for name, begins, hours in steps:
        if begins:
            leases.begin(all_files[name], time.monotonic_ns() + hours * HOUR_NS - 1)
        else:
            leases.free(all_files[name])
        model[name] = begins and hours > 0
        leases.end()
        assert {n: (folder / n).read_text()[0] == "1" for n in "abc"} == model
