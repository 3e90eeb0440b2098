"""A FUSE file system that forgets what was not synced: a power cut on demand. For tests only.

Everything lives in memory. A write goes to the volatile copy of a file, fsync makes a durable one; setting the extended
attribute user.crash on the mount point drops all that is not durable. Like ext4, fsync of a new file keeps its name.
usage: python -m tests.fault.log.drop_fs MOUNTPOINT       needs: mfusepy, /dev/fuse, fusermount3
"""

from __future__ import annotations

import errno
import stat
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

import mfusepy as fuse


@dataclass(slots=True)
class File:
    mode: int
    volatile: bytearray = field(default_factory=bytearray)
    durable: bytes = b""


class DropFS(fuse.Operations):  # type: ignore[misc]
    """One flat folder."""

    use_ns = True

    def __init__(self) -> None:
        self.files: dict[str, File] = {}
        self.names: dict[str, File] = {}  # durable
        self._guard = threading.RLock()

    def getattr(self, path: str, fh: Any = None) -> dict[str, int]:
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
        if path not in self.files:
            raise fuse.FuseOSError(errno.ENOENT)
        file = self.files[path]
        size = len(file.volatile)
        return {"st_mode": file.mode, "st_nlink": 1, "st_size": size, "st_blocks": (size + 511) // 512}

    def readdir(self, path: str, fh: Any) -> list[str]:
        return [".", "..", *(name[1:] for name in self.files)]

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        with self._guard:
            self.files[path] = File(stat.S_IFREG | mode)
        return 1

    def open(self, path: str, flags: int) -> int:
        return 1

    def read(self, path: str, size: int, offset: int, fh: Any) -> bytes:
        return bytes(self.files[path].volatile[offset : offset + size])

    def write(self, path: str, data: bytes, offset: int, fh: Any) -> int:
        with self._guard:
            content = self.files[path].volatile
            content.extend(bytes(max(0, offset - len(content))))
            content[offset : offset + len(data)] = data
        return len(data)

    def truncate(self, path: str, length: int, fh: Any = None) -> int:
        with self._guard:
            content = self.files[path].volatile
            del content[length:]
            content.extend(bytes(length - len(content)))
        return 0

    def fsync(self, path: str, datasync: int, fh: Any) -> int:
        with self._guard:
            file = self.files[path]
            file.durable = bytes(file.volatile)
            self.names[path] = file
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: Any) -> int:
        with self._guard:
            self.names = dict(self.files)
        return 0

    def flush(self, path: str, fh: Any) -> int:
        return 0

    def release(self, path: str, fh: Any) -> int:
        return 0

    def opendir(self, path: str) -> int:
        return 1

    def releasedir(self, path: str, fh: Any) -> int:
        return 0

    def unlink(self, path: str) -> int:
        self.files.pop(path)
        return 0

    def rename(self, old: str, new: str, flags: int = 0) -> int:
        self.files[new] = self.files.pop(old)
        return 0

    def chmod(self, path: str, mode: int) -> int:
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        return 0

    def utimens(self, path: str, times: Any = None) -> int:
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        return {"f_bsize": 4096, "f_frsize": 4096, "f_blocks": 1 << 20, "f_bfree": 1 << 19, "f_bavail": 1 << 19}

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        raise fuse.FuseOSError(errno.ENODATA)

    def setxattr(self, path: str, name: str, value: bytes, options: int, position: int = 0) -> int:
        if name == "user.crash":
            with self._guard:
                self.files = dict(self.names)
                for file in self.files.values():
                    file.volatile = bytearray(file.durable)
        return 0


if __name__ == "__main__":
    fuse.FUSE(
        DropFS(),
        sys.argv[1],
        foreground=True,
        nothreads=True,
        default_permissions=False,
        attr_timeout=0,
        entry_timeout=0,
        direct_io=True,
    )
