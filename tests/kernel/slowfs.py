"""An honest slow file system: a FUSE server straight on /dev/fuse, with a delay per operation. Needs root.

One file `data` in memory. The delay happens where a slow disk's would: inside the kernel's wait for the reply. A shim
in the application would fake the time, and detectors would rightly see nothing. Spec: include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import mmap
import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.lab import CLONE_NEWNS, unshare

CLONE_FS = 0x200

ROOT, DATA, DIRECT_IO, POSIX_LOCKS = 1, 2, 1, 2
NOSUID_NODEV, DETACH = 6, 2
SIZE = 64 << 20
HEADER = struct.Struct("<IIQQ")
_libc = ctypes.CDLL(None, use_errno=True)


class Op(enum.IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    RELEASEDIR = 29
    FSYNCDIR = 30
    SETLK = 32
    SETLKW = 33
    INTERRUPT = 36
    BATCH_FORGET = 42


class SlowFs:
    """The mounted file system; the server is another process, because a client's calls may hold the GIL."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "data"
        self._delays = mmap.mmap(-1, 8 * 64)  # shared with the server
        self._waits = mmap.mmap(-1, 64)

    def delay(self, op: Op, seconds: float) -> None:
        """From now on; what waits already waits so long, too."""
        struct.pack_into("<d", self._delays, 8 * op, seconds)

    def fail(self, op: Op) -> None:
        """Answer EIO from now on."""
        self.delay(op, -1.0)

    def waits(self, op: Op) -> bool:
        """Whether the server keeps such an operation waiting now."""
        return self._waits[op] != 0

    def serve(self, fd: int) -> None:
        server = _Server(fd)
        while True:
            try:
                request = os.read(fd, (1 << 20) + 8192)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                return
            op = HEADER.unpack_from(request)[1]
            server.answer(request, broken=self._waited(op) < 0)

    def _waited(self, op: int) -> float:
        """Wait as long as is wanted of this operation; how long that was wanted."""
        start = time.monotonic()
        while True:
            (seconds,) = struct.unpack_from("<d", self._delays, 8 * op) if op < 64 else (0.0,)
            left = start + seconds - time.monotonic()
            if op < 64:
                self._waits[op] = left > 0
            if left <= 0:
                return float(seconds)
            time.sleep(min(left, 0.05))


class _Server:
    def __init__(self, fd: int) -> None:
        self.fd, self.content = fd, bytearray(SIZE)

    def answer(self, request: bytes, *, broken: bool) -> None:
        length, op, unique, node = HEADER.unpack_from(request)
        if op in (Op.FORGET, Op.INTERRUPT, Op.BATCH_FORGET):
            return
        data = None if broken else self._data(op, node, request[40:length])
        error = errno.EIO if broken else 0 if data is not None else errno.ENOENT if op == Op.LOOKUP else errno.ENOSYS
        data = data or b""
        with contextlib.suppress(FileNotFoundError):  # the request was interrupted
            os.writev(self.fd, [struct.pack("<IiQ", 16 + len(data), -error, unique), data])

    def _data(self, op: int, node: int, body: bytes) -> bytes | None:
        match op:
            case Op.INIT:
                return struct.pack("<IIIIHHIIHHI", 7, 31, 65536, POSIX_LOCKS, 12, 10, 1 << 20, 1, 256, 0, 0) + bytes(24)
            case Op.LOOKUP:
                known = body.rstrip(b"\0") == b"data"
                return struct.pack("<QQQQII", DATA, 0, 1, 1, 0, 0) + _attributes(DATA) if known else None
            case Op.GETATTR | Op.SETATTR:
                return struct.pack("<QII", 1, 0, 0) + _attributes(node)
            case Op.OPEN | Op.OPENDIR:
                return struct.pack("<QII", 0, DIRECT_IO if op == Op.OPEN else 0, 0)
            case Op.READ:
                _handle, offset, size = struct.unpack_from("<QQI", body)
                return bytes(self.content[offset : offset + size])
            case Op.WRITE:
                _handle, offset, size = struct.unpack_from("<QQI", body)
                self.content[offset : offset + size] = body[40 : 40 + size]
                return struct.pack("<II", size, 0)
            case Op.RELEASE | Op.FSYNC | Op.FLUSH | Op.RELEASEDIR | Op.FSYNCDIR | Op.SETLK | Op.SETLKW:
                return b""
            case Op.STATFS:
                return struct.pack("<QQQQQIIII24x", 1, 1, 1, 1, 1, 4096, 255, 4096, 0)
            case _:
                return None


def _attributes(node: int) -> bytes:
    mode, size = (0o40755, 0) if node == ROOT else (0o100644, SIZE)
    return struct.pack("<6Q10I", node, size, (size + 511) // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[SlowFs]:
    """The slow file system at `folder`, in this process's mount namespace."""
    if not Path("/dev/fuse").exists():
        pytest.skip("no /dev/fuse")
    fs, fd = SlowFs(folder), os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if _libc.mount(b"pctest", os.fsencode(folder), b"fuse", NOSUID_NODEV, options):
        raise OSError(ctypes.get_errno(), "mount fuse")
    pid = os.fork()
    if pid == 0:
        try:
            fs.serve(fd)
        finally:
            os._exit(0)
    os.close(fd)
    try:
        yield fs
    finally:
        _libc.umount2(os.fsencode(folder), DETACH)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextlib.contextmanager
def loop_ext4(fs: SlowFs, folder: Path) -> Iterator[Path]:
    """ext4 on a loop device over the slow file: a slow block device with real block requests. Yields the device."""
    try:
        device = run("losetup", "-f", "--show", str(fs.path))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no loop device")
    try:
        run("mkfs.ext4", "-q", "-O", "^has_journal", device)
        run("mount", "-t", "ext4", device, str(folder))
        try:
            yield Path(device)
        finally:
            run("umount", str(folder))
    finally:
        run("losetup", "-d", device)


def kernel_device(number: int) -> int:
    """A device number of stat(2) in the kernel's own form: major << 20 | minor."""
    return os.major(number) << 20 | os.minor(number)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def private_mounts() -> Iterator[None]:
    """A mount namespace of our own for the length of the block: no mount of ours outlives it."""
    home = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    folder = os.open(".", os.O_RDONLY)
    unshare(CLONE_NEWNS)
    try:
        run("mount", "--make-rprivate", "/")
        yield
    finally:
        unshare(CLONE_FS)  # threads that were started in here share this thread's folder and root: then it is refused
        if _libc.setns(home, CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "setns")
        os.fchdir(folder)
        os.close(folder)
        os.close(home)
