"""A file that is slow to read, write and sync for a while: FUSE mounted over that one file. For drills. Needs root.

    python -m pointcall_executor.kernel.slow_file FILE DELAY_MS SECONDS

Two processes hold it, none of them the executor: a server, which answers from the original file after the delay, and
a guardian, which ends the lease: in time, or when its standard input ends, because the executor is gone. They say when
the file is slow, and at the end how many operations there were and how many of them took the delay. Each takes the
mount off as soon as the other is gone. Who has the file open then goes on with it, without the delay, until it is
closed. What the kernel promises by itself: when the server is gone no request waits any longer. Spec:
include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from pointcall_executor.kernel.errors import KernelError

LEASE_MAX_SECONDS: Final = 600.0
DELAY_MAX_SECONDS: Final = 60.0
ANSWER_SECONDS: Final = 10.0  # to mount, and to end
READY: Final = b"mounted"
Launch = Callable[[Sequence[str], tuple[int, int, int]], None]  # the words of a module, its standard descriptors

SOURCE: Final = "pointcall-drill"
NOSUID_NODEV, MNT_DETACH, DIRECT_IO = 6, 2, 1
GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH, INIT = 3, 4, 14, 15, 16, 17, 18, 20, 25, 26
FORGET, INTERRUPT, BATCH_FORGET, DESTROY = 2, 36, 42, 38
FATTR_MODE, FATTR_SIZE = 1, 8
REQUEST: Final = struct.Struct("<IIQQIIII")  # struct fuse_in_header
ATTRIBUTES: Final = struct.Struct("<6Q10I")  # struct fuse_attr
MAX_WRITE: Final = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


class Slowed(NamedTuple):
    """What was done with the file while it was slow: reads, writes and syncs, and those that took the delay."""

    operations: int = 0
    slowed: int = 0


def launch(words: Sequence[str], standard: tuple[int, int, int]) -> None:
    """A module as a process of its own, with the rights of this one. Whoever starts it reaps it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(standard)]
    os.posix_spawn(sys.executable, [sys.executable, *words], environment, file_actions=actions, setsid=True)


class SlowFile:
    """A slow file that is being served. It ends by itself; `end` ends it now."""

    def __init__(self, path: Path, delay_s: float, seconds: float, launch: Launch = launch) -> None:
        """`launch` starts the guardian, which needs CAP_SYS_ADMIN.

        KernelError `kernel.drill.file` where it is no regular file, or FUSE or the rights are missing."""
        if not path.is_file() or path.is_symlink():
            raise _refused("only a regular file can be made slow", str(path))
        if not (0 < delay_s <= DELAY_MAX_SECONDS and 0 < seconds <= LEASE_MAX_SECONDS):
            raise _refused("a slow file has a delay and an end", f"{delay_s} s for {seconds} s")
        self.path, self._said = path, b""
        theirs, self._asks = os.pipe()
        self._told, out = os.pipe()
        try:
            launch(["-m", __name__, str(path), str(int(delay_s * 1000)), str(seconds)], (theirs, out, out))
        except BaseException:
            os.close(self._told)
            os.close(self._asks)
            raise
        finally:
            os.close(theirs)
            os.close(out)
        said = self._line()
        if said != READY:
            self._close()
            raise _refused("the file cannot be made slow", said.decode("utf-8", "replace") or "nothing said")

    def end(self) -> Slowed:
        """Take it off now; what was done with it. Twice does no harm, and says nothing any more."""
        if self._asks < 0:
            return Slowed()
        os.close(self._asks)
        self._asks = -1
        said = self._line().split()
        self._close()
        return Slowed(*map(int, said)) if len(said) == len(Slowed._fields) else Slowed()

    def _line(self) -> bytes:
        """The next thing that the guardian says; nothing where it says none in time."""
        end = time.monotonic() + ANSWER_SECONDS
        while b"\n" not in self._said:
            poll = select.poll()
            poll.register(self._told, select.POLLIN)
            if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                break
            data = os.read(self._told, 4096)
            if not data:
                break
            self._said += data
        line, _, self._said = self._said.partition(b"\n")
        return line

    def _close(self) -> None:
        for fd in (self._told, self._asks):
            if fd >= 0:
                os.close(fd)
        self._told = self._asks = -1


def _refused(message: str, got: str) -> KernelError:
    return KernelError(
        message, id="kernel.drill.file", want="a regular file, /dev/fuse, CAP_SYS_ADMIN", got=got,
        hint="the mount is made in the executor's mount namespace",
    )  # fmt: skip


# ---- the guardian ----------------------------------------------------------------------------------------------------


def guard(path: Path, delay_s: float, seconds: float) -> int:
    """Mount, let a child serve, and take it off when the time is over, when told to, or when the child is gone."""
    fd, original = os.open("/dev/fuse", os.O_RDWR), os.open(path, os.O_RDWR)
    options = f"fd={fd},rootmode=100644,user_id=0,group_id=0,allow_other".encode()
    if _libc.mount(SOURCE.encode(), os.fsencode(path), b"fuse", NOSUID_NODEV, options):
        sys.stderr.write(f"mount: {os.strerror(ctypes.get_errno())}\n")
        return 1
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    stop, stopping = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(stopping)
        _serve(path, fd, original, stop, delay_s)
        os._exit(0)
    os.close(fd)
    os.close(stop)
    os.write(1, READY + b"\n")
    server = os.pidfd_open(child)
    _wait(server, seconds)
    os.close(stopping)  # the server unmounts, and goes on without the delay for those who have it open
    select.select([server], [], [])
    os.waitpid(child, 0)
    _unmount(path)  # where the server could not
    return 0


def _unmount(path: Path) -> None:
    """Take our mount off, and never another one that may lie below it."""
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        fields = line.split()
        if fields[4].encode().decode("unicode_escape") == str(path):
            if SOURCE in fields[fields.index("-") :]:
                _libc.umount2(os.fsencode(path), MNT_DETACH)
            return


def _wait(server: int, seconds: float) -> None:
    """Until the time is over, SIGTERM comes, or the server or who asked for it is gone."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if signal.sigtimedwait({signal.SIGTERM, signal.SIGINT}, 0) or select.select([server, 0], [], [], 0.02)[0]:
            return


# ---- the server ------------------------------------------------------------------------------------------------------


def _serve(path: Path, fd: int, original: int, stop: int, delay_s: float) -> None:
    """Answer until nobody has the file open any more; unmount when the guardian says so or is gone."""
    waiting, operations, slowed = [fd, stop], 0, 0
    while True:
        if stop in select.select(waiting, [], [])[0]:
            waiting = [fd]
            _unmount(path)
            with contextlib.suppress(OSError):  # nobody wants to know any more
                os.write(1, f"{operations} {slowed}\n".encode())
            os.close(1)
            continue
        try:
            request = os.read(fd, MAX_WRITE + 8192)
        except OSError as error:
            if error.errno in (errno.EINTR, errno.ENOENT):
                continue
            return  # ENODEV: unmounted and closed by everybody
        _length, op, unique, _node, *_ = REQUEST.unpack_from(request)
        if op in (FORGET, INTERRUPT, BATCH_FORGET):
            continue
        if op in (READ, WRITE, FSYNC) and stop in waiting:
            operations += 1
            slowed += not select.select([stop], [], [], delay_s)[0]  # readable at once when it is over
        try:
            code, data = 0, _answer(op, request[REQUEST.size :], original)
        except OSError as error:
            code, data = error.errno or errno.EIO, b""
        try:
            os.writev(fd, [struct.pack("<IiQ", 16 + len(data), -code, unique), data])
        except FileNotFoundError:
            continue  # the request was interrupted


def _answer(op: int, body: bytes, original: int) -> bytes:
    match op:
        case 26:  # INIT
            return struct.pack("<IIIIHHIIHHI", 7, 31, 65536, 0, 12, 10, MAX_WRITE, 1, 256, 0, 0) + bytes(24)
        case 3:  # GETATTR
            return struct.pack("<QII", 0, 0, 0) + _attributes(original)
        case 4:  # SETATTR
            valid, _pad, _handle, size = struct.unpack_from("<IIQQ", body)
            if valid & FATTR_SIZE:
                os.ftruncate(original, size)
            if valid & FATTR_MODE:
                os.fchmod(original, struct.unpack_from("<I", body, 68)[0] & 0o7777)
            return struct.pack("<QII", 0, 0, 0) + _attributes(original)
        case 14:  # OPEN
            return struct.pack("<QII", 0, DIRECT_IO, 0)
        case 15:  # READ
            _handle, offset, size = struct.unpack_from("<QQI", body)
            return os.pread(original, size, offset)
        case 16:  # WRITE
            _handle, offset, size = struct.unpack_from("<QQI", body)
            return struct.pack("<II", os.pwrite(original, body[40 : 40 + size], offset), 0)
        case 20:  # FSYNC
            os.fsync(original)
            return b""
        case 17:  # STATFS
            return struct.pack("<QQQQQIIII24x", 1, 1, 1, 1, 1, 4096, 255, 4096, 0)
        case 18 | 25 | 38:  # RELEASE, FLUSH, DESTROY
            return b""
        case _:
            raise OSError(errno.ENOSYS, "not implemented")


def _attributes(original: int) -> bytes:
    s = os.fstat(original)
    times = [ns // 10**9 for ns in (s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns)]
    parts = [ns % 10**9 for ns in (s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns)]
    return ATTRIBUTES.pack(
        1, s.st_size, s.st_blocks, *times, *parts, s.st_mode, s.st_nlink, s.st_uid, s.st_gid, 0, s.st_blksize, 0
    )


if __name__ == "__main__":
    sys.exit(guard(Path(sys.argv[1]), int(sys.argv[2]) / 1000, float(sys.argv[3])))
