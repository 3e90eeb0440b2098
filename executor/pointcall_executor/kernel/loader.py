"""Load a blob: one array map with its data, one loader program, one run. Descriptors out, everything or nothing.

The build turned the object into a small BPF program that creates the maps, does the CO-RE relocation against the
kernel's own BTF and loads the programs. No ELF, no libbpf, four bpf(2) calls. The caller has already compared the
blob's digest with the manifest. Spec: docs/spec/kernel-abi.md section 2; kernel tools/lib/bpf/skel_internal.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pointcall_executor.kernel import bpf
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.errors import LoadError

HEAD_BYTES: Final = 24  # struct bpf_loader_ctx: size, flags, log level, log size, log buffer
MAP_BYTES: Final = 16  # struct bpf_map_desc: descriptor, max_entries, initial value
PROGRAM_BYTES: Final = 4  # struct bpf_prog_desc: descriptor
LOG_BYTES: Final = 1 << 20  # 8x the log of our largest program
LOAD_TRIES: Final = 5  # the verifier gives up with EAGAIN when a signal comes; libbpf tries as often
_LOG_TAIL: Final = 4000  # of a verifier log, what an error carries; the end says why


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the kernel took: name -> descriptor. The owner closes them."""

    maps: Mapping[str, int]
    programs: Mapping[str, int]

    def close(self) -> None:
        """Close every descriptor; what nothing else holds leaves the kernel."""
        for fd in (*self.maps.values(), *self.programs.values()):
            os.close(fd)


def load(blob: Blob, constants: Mapping[str, int] | None = None) -> Loaded:
    """Load all maps and programs of the blob.

    `constants` overrides defaults before the verifier sees them. Raises BlobError where one does not fit, LoadError
    with the verifier's log where the kernel refuses, and then nothing stays loaded.
    """
    image = blob.with_constants(constants or {})
    for _ in range(LOAD_TRIES):
        try:
            return _run(blob, image, None)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise _refused(blob, image, error) from None
    raise LoadError(f"{blob.name} could not be loaded", got="EAGAIN", hint="signals interrupt the verifier; try again")


def _refused(blob: Blob, image: bytes, error: OSError) -> LoadError:
    """The same once more, now with a log buffer: the log costs nothing where loading works."""
    log = ctypes.create_string_buffer(LOG_BYTES)
    try:
        _run(blob, image, log).close()
    except OSError as again:
        error = again
    text = log.value.decode("utf-8", "replace")[-_LOG_TAIL:]
    return LoadError(
        f"the kernel refused {blob.name}", log=text, got=f"{_name(error)}: {error.strerror}", hint=_hint(error, text)
    )


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))


def _hint(error: OSError, log: str) -> str:
    reasons = [line for line in log.splitlines() if line.strip() and not line.startswith("processed ")]
    if reasons:
        return "the verifier says why: " + reasons[-1].strip()[:200]
    if error.errno == errno.EPERM:
        return "needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, or this kernel does not grant the hook: pointcall doctor"
    return "pointcall doctor says which kernel feature is missing"


def _run(blob: Blob, image: bytes, log: ctypes.Array[ctypes.c_char] | None) -> Loaded:
    constants = ctypes.create_string_buffer(image, len(image)) if image else None
    context = _context(blob, ctypes.addressof(constants) if constants else 0, log)
    data_fd = _data_map(blob.data)
    try:
        prog_fd = bpf.prog_load(
            bpf.ProgramType.SYSCALL, blob.insns, name="__loader.prog", flags=bpf.PROG_SLEEPABLE, fds=(data_fd,)
        )
        try:
            result, context = bpf.prog_run(prog_fd, context)
        finally:
            os.close(prog_fd)
    finally:
        os.close(data_fd)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return _descriptors(blob, context)


def _data_map(data: bytes) -> int:
    fd = bpf.map_create(bpf.MAP_TYPE_ARRAY, key_size=4, value_size=len(data), max_entries=1, name="__loader.map")
    try:
        bpf.map_update(fd, bytes(4), data)
    except OSError:
        os.close(fd)
        raise
    return fd


def _context(blob: Blob, constants: int, log: ctypes.Array[ctypes.c_char] | None) -> bytes:
    size = HEAD_BYTES + MAP_BYTES * len(blob.maps) + PROGRAM_BYTES * len(blob.programs)
    out = bytearray(size)
    struct.pack_into(
        "<IIIIQ", out, 0, size, 0, 1 if log else 0, len(log) if log else 0, ctypes.addressof(log) if log else 0
    )
    if constants:
        struct.pack_into("<Q", out, HEAD_BYTES + MAP_BYTES * blob.maps.index("rodata") + 8, constants)
    return bytes(out)


def _descriptors(blob: Blob, context: bytes) -> Loaded:
    first = HEAD_BYTES + MAP_BYTES * len(blob.maps)
    maps = {n: _fd(context, HEAD_BYTES + MAP_BYTES * i) for i, n in enumerate(blob.maps)}
    programs = {p.name: _fd(context, first + PROGRAM_BYTES * i) for i, p in enumerate(blob.programs)}
    assert all(fd > 0 for fd in (*maps.values(), *programs.values()))
    return Loaded(maps, programs)


def _fd(context: bytes, at: int) -> int:
    return int(struct.unpack_from("<i", context, at)[0])
