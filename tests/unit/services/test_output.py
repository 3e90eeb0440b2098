"""Captured output is bounded while the service runs, and losing it never hurts the service."""

from __future__ import annotations

import os
import select
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointcall_executor.services import output
from pointcall_executor.services.output import MAX_OUTPUT_BYTES, Output


def kept(folder: Path) -> bytes:
    return b"".join(p.read_bytes() for p in (folder / "output.log.1", folder / "output.log") if p.exists())


def filled(folder: Path, chunks: list[bytes]) -> Output:
    read, write = output.pipe()
    found = Output(read, str(folder))
    for chunk in chunks:
        os.write(write, chunk)
        assert found.move()
    os.close(write)
    while found.move():
        pass
    return found


@given(sizes=st.lists(st.integers(1, 60_000), max_size=60))
def test_the_newest_output_is_kept_and_the_bound_holds(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("output")
    written = [bytes([n % 251]) * size for n, size in enumerate(sizes)]
    found = filled(folder, written)
    found.close()
    found.close()
    got = kept(folder)
    assert len(got) <= MAX_OUTPUT_BYTES
    assert b"".join(written).endswith(got)
    assert len(got) >= min(sum(sizes), MAX_OUTPUT_BYTES // 2 - 60_000)


def test_a_folder_that_is_gone_loses_output_and_says_how_much_later(tmp_path: Path) -> None:
    read, write = output.pipe()
    found = Output(read, str(tmp_path / "absent"))
    os.write(write, b"x" * 100)
    assert found.move()
    assert found.lost == 100
    (tmp_path / "absent").mkdir()
    os.write(write, b"back")
    assert found.move()
    assert kept(tmp_path / "absent") == b"\n[pointcall: 100 bytes of output were lost]\nback"
    found.close()
    os.close(write)


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep")
    (tmp_path / "output.log").symlink_to(tmp_path / "precious")
    found = filled(tmp_path, [b"evil"])
    assert found.lost == 4
    assert (tmp_path / "precious").read_text() == "keep"
    found.close()


def test_the_services_end_has_a_reader_even_if_every_other_is_gone() -> None:
    read, write = output.pipe()
    os.close(read)
    assert os.write(write, b"no SIGPIPE") == 10
    waiting = select.poll()
    waiting.register(write, select.POLLERR)
    assert waiting.poll(0) == []
    os.close(write)
