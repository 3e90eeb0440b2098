"""A service's captured output: a pipe that the spawner reads, and two files that together never exceed a bound.

The service's end is open for reading as well, so it never gets SIGPIPE: if every reader died, it waits when 64 KiB are
unread, and the next executor reads on (`/proc/PID/fd/1`). A disk that is full loses output, never the service.
Runs in the spawner only: the standard library.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

MAX_OUTPUT_BYTES: Final = 1 << 20  # of output.log and output.log.1 together
_PART_BYTES: Final = MAX_OUTPUT_BYTES // 2
_READ_BYTES: Final = 64 * 1024  # the size of a pipe


def pipe() -> tuple[int, int]:
    """(the spawner's end, the service's end) of a new pipe."""
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        both = os.open(f"/proc/self/fd/{write}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.close(write)
    os.set_blocking(read, False)
    return read, both


class Output:
    """Moves what comes through a pipe into `output.log` of a folder; the older half of it is `output.log.1`."""

    def __init__(self, pipe: int, folder: str) -> None:
        self.pipe, self._path = pipe, Path(folder) / "output.log"
        self._file, self._size, self.lost = -1, 0, 0
        with contextlib.suppress(OSError):  # a full disk; tried again with the first output
            self._open()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._file).st_size

    def move(self) -> bool:
        """Move what there is now. False once nobody can write any more."""
        try:
            data = os.read(self.pipe, _READ_BYTES)
        except BlockingIOError:
            return True
        if data:
            self._keep(data)
        return bool(data)

    def _keep(self, data: bytes) -> None:
        try:
            if self._size + len(data) > _PART_BYTES:
                os.close(self._file)
                self._file = -1
                self._path.replace(f"{self._path}.1")
            if self._file < 0:
                self._open()
            if self.lost:
                self._size += os.write(self._file, b"\n[pointcall: %d bytes of output were lost]\n" % self.lost)
                self.lost = 0
            written = os.write(self._file, data)
            self._size += written
            self.lost += len(data) - written
        except OSError:
            self.lost += len(data)

    def close(self) -> None:
        """Twice without harm."""
        for fd in (self.pipe, self._file):
            if fd >= 0:
                os.close(fd)
        self.pipe = self._file = -1
