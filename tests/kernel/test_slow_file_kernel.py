"""A slow file: slow for a while, the same bytes, and it ends whoever dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pointcall_executor.kernel import slow_file
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.slow_file import Slowed, SlowFile, launch
from tests.kernel.slowfs import private_mounts

pytestmark = pytest.mark.kernel


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() or not Path("/dev/fuse").exists():
        pytest.skip("needs root and /dev/fuse")
    path = tmp_path / "data"
    path.write_bytes(b"0123456789")
    with private_mounts():
        yield path


def is_mounted(path: Path) -> bool:
    return str(path) in Path("/proc/self/mountinfo").read_text()


def took(what: object) -> float:
    start = time.monotonic()
    assert callable(what)
    what()
    return time.monotonic() - start


def until_gone(path: Path, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while is_mounted(path):
        assert time.monotonic() < deadline, "the mount is still there"
        time.sleep(0.01)


def children(pid: int, thread: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split()))


class Launched:
    """Starts the guardian as the spawner would, and knows its process."""

    def __init__(self) -> None:
        self.pid = 0

    def __call__(self, words: Sequence[str], standard: tuple[int, int, int]) -> None:
        before = children(os.getpid(), threading.get_native_id())
        launch(words, standard)
        (self.pid,) = children(os.getpid(), threading.get_native_id()) - before


@pytest.fixture
def launched() -> Iterator[Launched]:
    found = Launched()
    yield found
    if found.pid:
        os.waitpid(found.pid, 0)


def test_it_ends_with_who_asked_for_it(file: Path, launched: Launched) -> None:
    slow = SlowFile(file, 0.1, 30, launched)
    assert is_mounted(file)
    os.close(slow._asks)  # as the kernel does when the executor is killed
    slow._asks = -1
    until_gone(file)
    assert slow.end() == Slowed()


def test_a_guardian_that_cannot_begin_or_says_nothing_is_refused_and_leaves_no_descriptor(file: Path) -> None:
    def refuses(_words: Sequence[str], _standard: tuple[int, int, int]) -> None:
        raise OSError(1, "Operation not permitted")

    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(OSError, match="not permitted"):
        SlowFile(file, 0.1, 30, refuses)
    with pytest.raises(KernelError) as silent:
        SlowFile(file, 0.1, 30, lambda *_: None)
    assert (silent.value.id, silent.value.got) == ("kernel.drill.file", "nothing said")
    assert set(Path("/proc/self/fd").iterdir()) == before
    assert not is_mounted(file)


def test_one_that_does_not_answer_is_not_waited_for_without_an_end(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_file, "ANSWER_SECONDS", 0.1)
    kept: list[int] = []
    with pytest.raises(KernelError) as silent:
        SlowFile(file, 0.1, 30, lambda _, standard: kept.append(os.dup(standard[1])))
    os.close(kept[0])
    assert silent.value.got == "nothing said"


def test_what_was_slow_is_counted(file: Path, launched: Launched) -> None:
    slow = SlowFile(file, 0.05, 30, launched)
    with file.open("r+b", buffering=0) as handle:
        for _ in range(3):
            os.pread(handle.fileno(), 4, 0)
        os.fsync(handle.fileno())
        assert slow.end() == Slowed(4, 4)
        assert slow.end() == Slowed()


def test_it_is_slow_and_the_same_until_it_ends(file: Path, launched: Launched) -> None:
    slow = SlowFile(file, 0.1, 30, launched)
    try:
        assert file.stat().st_size == 10
        with file.open("r+b", buffering=0) as handle:
            assert took(lambda: os.pread(handle.fileno(), 4, 0)) >= 0.1
            assert took(lambda: os.pwrite(handle.fileno(), b"ab", 8)) >= 0.1
            assert took(lambda: os.fsync(handle.fileno())) >= 0.1
            assert os.pread(handle.fileno(), 20, 0) == b"01234567ab"
            os.kill(launched.pid, signal.SIGTERM)
            until_gone(file)
            assert took(lambda: os.pread(handle.fileno(), 4, 0)) < 0.1  # who has it open goes on, without the delay
            assert os.pwrite(handle.fileno(), b"zz", 0) == 2
    finally:
        slow.end()
        slow.end()
    assert not is_mounted(file)
    assert file.read_bytes() == b"zz234567ab"


def test_the_lease_ends_it_without_anybody(file: Path, launched: Launched) -> None:
    slow = SlowFile(file, 0.05, 0.4, launched)
    assert is_mounted(file)
    until_gone(file)
    assert file.read_bytes() == b"0123456789"
    slow.end()


@pytest.mark.parametrize("who", ["guardian", "server"])
def test_whoever_is_killed_it_ends(file: Path, who: str, launched: Launched) -> None:
    slow = SlowFile(file, 0.05, 30, launched)
    (server,) = children(launched.pid, launched.pid)
    os.kill(launched.pid if who == "guardian" else server, signal.SIGKILL)
    until_gone(file)
    assert file.read_bytes() == b"0123456789"
    slow.end()


@pytest.mark.parametrize(("delay", "seconds"), [(0, 10), (61, 10), (1, 0), (1, 601)])
def test_one_without_an_end_is_refused(file: Path, delay: float, seconds: float) -> None:
    with pytest.raises(KernelError) as refused:
        SlowFile(file, delay, seconds)
    assert refused.value.id == "kernel.drill.file"
    with pytest.raises(KernelError):
        SlowFile(file.parent, 1, 10)
    assert not is_mounted(file)
