"""Consumer of a ring of 56-byte records (bpf/event.h): two mmaps, one batch a call. No callback from C, no decoding.

Layout of the map file (kernel/bpf/ringbuf.c): page 0 the consumer position, read and write; page 1 the producer
position; then the data, mapped twice in a row, so that a batch never wraps. A record is an 8-byte header (length with
two flag bits, page offset) and its payload; ours are 64 bytes in all, which divides the ring.

Ordering: the kernel publishes a record with a store-release of its header, then of the producer position. Plain loads
are acquire loads on x86-64. Python has none elsewhere, so on another machine `Ring` refuses: a missing barrier would
read half-written records, rarely and silently.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import platform
import select
import struct
from typing import Final

from pointcall_executor.kernel import bpf
from pointcall_executor.kernel.errors import KernelError

RECORD_BYTES: Final = 56
ORDERED_MACHINES: Final = ("x86_64",)
MAP_TYPE_RINGBUF: Final = 27

_SLOT: Final = struct.Struct(f"<II{RECORD_BYTES}s")
_UNFINISHED: Final = 3 << 30  # reserved and not yet submitted, or discarded: ours never discard


class Ring:
    """The one consumer of a ring. It borrows the map's descriptor, which also serves epoll."""

    def __init__(self, fd: int) -> None:
        if platform.machine() not in ORDERED_MACHINES:
            raise KernelError(
                "the ring cannot be read here",
                id="kernel.ring.machine",
                want=", ".join(ORDERED_MACHINES),
                got=platform.machine(),
                hint="Python has no acquire loads on this machine",
            )
        info = bpf.map_info(fd)
        assert info.type == MAP_TYPE_RINGBUF
        page, self._fd, self._mask = mmap.PAGESIZE, fd, info.max_entries - 1
        self._consumer_page = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        self._consumer = ctypes.c_uint64.from_buffer(self._consumer_page)
        self._pages = mmap.mmap(fd, page + 2 * info.max_entries, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._view = memoryview(self._pages)
        self._producer = self._view[:8].cast("Q")
        self._data = self._view[page:]

    def fileno(self) -> int:
        """For select, epoll and asyncio: readable when there is something to drain."""
        return self._fd

    def drain(self, limit: int = 1 << 20) -> list[bytes]:
        """All finished records, oldest first, at most `limit`. Never blocks."""
        start = self._consumer.value
        end = min(self._producer[0], start + limit * _SLOT.size)
        if start == end:
            return []
        at, records = start & self._mask, []
        for head, _page, payload in _SLOT.iter_unpack(self._data[at : at + (end - start)]):
            if head != RECORD_BYTES:
                if head & _UNFINISHED:
                    break
                raise AssertionError(f"a ring record of {head} bytes: not one of our programs")
            records.append(payload)
        self._consumer.value = start + len(records) * _SLOT.size
        return records

    def wait(self, timeout_s: float) -> bool:
        """True as soon as there is something to drain, False after the time."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        try:
            return bool(poll.poll(timeout_s * 1000))
        except OSError as error:
            if error.errno == errno.EINTR:
                return False
            raise

    def close(self) -> None:
        """Unmap. The map's descriptor stays its owner's."""
        self._producer.release()
        self._data.release()
        self._view.release()
        self._pages.close()
        del self._consumer
        self._consumer_page.close()
