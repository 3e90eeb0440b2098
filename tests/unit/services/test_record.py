"""The record of a running service: written whole or not at all, and whatever is read of it is a record or nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointcall_executor.services import record as records
from pointcall_executor.services.record import RunRecord, born

GOOD = RunRecord(
    boot="b", name="svc", declaration="a" * 64, pid=1, born=1, cgroup="p/svc.1", cgroup_id=1, device=0, inode=1,
    spawner=1, spawner_born=1,
)  # fmt: skip


def test_what_is_written_is_read_back_and_forgotten(tmp_path: Path) -> None:
    records.write(tmp_path, GOOD)
    assert records.read(tmp_path) == GOOD
    for _ in range(2):
        records.forget(tmp_path, GOOD.cgroup_id)
        assert records.read(tmp_path) is None


def test_the_record_of_another_instance_is_not_forgotten(tmp_path: Path) -> None:
    records.write(tmp_path, GOOD)
    records.forget(tmp_path, GOOD.cgroup_id + 1)
    assert records.read(tmp_path) == GOOD


def test_a_number_that_no_process_can_have_is_no_record(tmp_path: Path) -> None:
    """It would fail where the kernel is asked for that process, and arming with it, at every start."""
    for field in ("pid", "spawner"):
        records.write(tmp_path, GOOD.model_copy(update={field: 2**31}))
        assert records.read(tmp_path) is None


@given(st.binary(max_size=300), st.integers(0, 300))
def test_noise_is_no_record_or_one_in_form(tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int) -> None:
    folder = tmp_path_factory.mktemp("record")
    raw = GOOD.model_dump_json().encode()
    (folder / records.FILE).write_bytes(raw[:at] + noise + raw[at + len(noise) :])
    found = records.read(folder)
    assert found is None or RunRecord.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_write_that_fails_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    records.write(tmp_path, GOOD)

    def fail(*_words: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, fail)
        with pytest.raises(OSError, match="full"):
            records.write(tmp_path, GOOD.model_copy(update={"pid": 2}))
    assert records.read(tmp_path) == GOOD


def test_birth_is_a_time_for_the_living_and_nothing_for_others() -> None:
    assert born(os.getpid()) == born(os.getpid()) > 0
    assert born(2**22 + 1) == 0
