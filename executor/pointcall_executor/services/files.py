"""Declared files: opened, and read to see that they are what was declared."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence

from pointcall_attest.declaration import DeclaredFile
from pointcall_executor.services.managed import ServiceError


def open_verified(path: str, sha256: str) -> int:
    """A descriptor of the file, whose content has just been read and has this digest. The caller closes it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ServiceError(f"cannot read {path}", id="service.file", want=sha256, got=str(error)) from error
    try:
        with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != sha256:
            hint = "the file changed after it was declared; build and sign a new manifest, or put the file back"
            raise ServiceError(f"{path} is not what was declared", id="service.digest", want=sha256, got=got, hint=hint)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise ServiceError(f"cannot read {path}", id="service.file", want=sha256, got=str(error)) from error
        raise
    return fd


@contextlib.contextmanager
def opened_verified(files: Sequence[DeclaredFile], program: str) -> Iterator[int]:
    """Verify every file; yields a descriptor of `program`, which is one of them."""
    opened: dict[str, int] = {}
    try:
        for file in files:
            opened[file.path] = open_verified(file.path, file.sha256)
        yield opened[program]
    finally:
        for fd in opened.values():
            os.close(fd)


def verify(files: Sequence[DeclaredFile]) -> None:
    """Verify every file. ServiceError `service.file`, `service.digest`."""
    for file in files:
        os.close(open_verified(file.path, file.sha256))
