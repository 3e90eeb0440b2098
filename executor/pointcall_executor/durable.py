"""Write a small file so that it is there whole or not at all, also after a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, body: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by `body`: a reader sees the old file or the new one. OSError where it is not durable.

    The folder is made where it is missing, for its owner only if the file is.
    """
    path.parent.mkdir(mode=0o755 if mode & 0o077 else 0o700, parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.unlink(missing_ok=True)  # of a process that was killed; or a link, by somebody who may write here and we more
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
