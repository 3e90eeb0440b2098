"""A BPF map as bytes -> bytes. It owns no meaning: keys and values are packed and parsed by the module that uses it."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from pointcall_executor.kernel import bpf


class Map:
    """One map by a descriptor that it borrows. Sizes are the kernel's own; a wrong size is our bug."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.info = bpf.map_info(fd)

    def get(self, key: bytes) -> bytes | None:
        """The value, None where there is none."""
        assert len(key) == self.info.key_size
        try:
            return bpf.map_lookup(self.fd, key, self.info.value_size)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def set(self, key: bytes, value: bytes) -> None:
        """Insert or replace. OSError E2BIG where the map is full."""
        assert (len(key), len(value)) == (self.info.key_size, self.info.value_size)
        bpf.map_update(self.fd, key, value)

    def add(self, key: bytes, value: bytes) -> bool:
        """Insert only: False where the key was there, and its value is left alone."""
        assert (len(key), len(value)) == (self.info.key_size, self.info.value_size)
        try:
            bpf.map_update(self.fd, key, value, bpf.NOEXIST)
        except OSError as error:
            if error.errno == errno.EEXIST:
                return False
            raise
        return True

    def delete(self, key: bytes) -> bool:
        """False where there was nothing."""
        try:
            bpf.map_delete(self.fd, key)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every entry once, at most `max_entries`; one that is deleted meanwhile is left out."""
        key: bytes | None = None
        for _ in range(self.info.max_entries):
            try:
                key = bpf.map_next_key(self.fd, key, self.info.key_size)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return
                raise
            value = self.get(key)
            if value is not None:
                yield key, value
