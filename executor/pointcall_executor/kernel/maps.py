"""A BPF map as bytes -> bytes. It owns no meaning: keys and values are packed and parsed by the module that uses it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Final

from pointcall_executor.kernel import bpf

BATCH: Final = 1024  # entries a call: more than a bucket of any map of ours has


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

    def batch(self) -> list[tuple[bytes, bytes]]:
        """Every entry of a hash map that was there all the time, also while others come and go; a thousand a call."""
        found: list[tuple[bytes, bytes]] = []
        position, key_size, value_size = None, self.info.key_size, self.info.value_size
        while True:
            position, keys, values = bpf.map_batch(self.fd, position, BATCH, key_size, value_size)
            found += zip(_split(keys, key_size), _split(values, value_size), strict=True)
            if position is None:
                return found


def _split(raw: bytes, size: int) -> list[bytes]:
    return [raw[at : at + size] for at in range(0, len(raw), size)]
