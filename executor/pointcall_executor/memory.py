"""Memory that starting or arming needed once goes back to the kernel: free heap, and code that ran once.

glibc keeps free heap otherwise; other C libraries do as they like, and nothing depends on it. A library's code is in
the kernel's page cache, where it stays: it only leaves our page tables, and what is used again is mapped again by a
minor fault. So this never belongs between an event and its action. Sources: malloc_trim(3), madvise(2), proc(5).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# The compiler of Wasm; what gRPC, the parser of certificates and the maker of models do only while they start.
ONCE: Final = ("_libwasmtime.", "cygrpc.", "_rust.", "_pydantic_core.", "libcrypto.")
MADV_DONTNEED: Final = 4
SMAPS: Final = Path("/proc/self/smaps")
_MAPPING: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) [0-9a-f]+ \S+ (\d+) *(.*)")


def give_back() -> bool:
    """Return free heap pages of every arena to the kernel; False where the C library cannot. Other threads go on."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))


def forget_code(libraries: Collection[str] = ONCE) -> int:
    """Unmap the executable pages of the libraries whose file names begin so; the bytes that were resident.

    Only pages that are the file's own: a mapping of which anything was written (a breakpoint) is left alone.
    """
    try:
        smaps = SMAPS.read_text()
    except OSError:
        return 0
    libc, forgotten = ctypes.CDLL(None), 0
    for found in mapped_code(smaps, libraries):
        if libc.madvise(ctypes.c_void_p(found.address), ctypes.c_size_t(found.length), MADV_DONTNEED) == 0:
            forgotten += found.resident
    return forgotten


@dataclass(frozen=True, slots=True)
class Code:
    """One executable mapping; all in bytes."""

    address: int
    length: int
    resident: int


def mapped_code(smaps: str, libraries: Collection[str]) -> list[Code]:
    """The libraries' executable mappings that nothing was written to, from the text of smaps."""
    found = []
    for part in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", smaps):
        head, _, body = part.partition("\n")
        mapping = _MAPPING.fullmatch(head)
        if mapping is None or mapping[3] != "r-xp" or mapping[4] == "0":
            continue
        kib = {name: int(size) for name, size in re.findall(r"(?m)^(\w+): +(\d+) kB$", body)}
        named = Path(mapping[5]).name.startswith(tuple(libraries))
        if named and kib.get("Private_Dirty") == kib.get("Anonymous") == 0:
            start = int(mapping[1], 16)
            found.append(Code(start, int(mapping[2], 16) - start, kib.get("Rss", 0) * 1024))
    return found
