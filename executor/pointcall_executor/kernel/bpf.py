"""bpf(2), typed: one function a command, plain descriptors in and out. No policy, no objects, no libbpf.

Layouts are prefixes of `union bpf_attr` (include/uapi/linux/bpf.h); the kernel takes what is missing for zero. Every
failure is an OSError with the kernel's error number. Descriptors are close-on-exec by the kernel's own choice.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import platform
import struct
from dataclasses import dataclass
from typing import Final

NR_BPF: Final = {"x86_64": 321, "aarch64": 280}
ANY: Final = 0
NOEXIST: Final = 1


class Command(enum.IntEnum):
    """enum bpf_cmd, the part that we use."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_TEST_RUN = 10
    PROG_GET_FD_BY_ID = 13
    OBJ_GET_INFO_BY_FD = 15
    RAW_TRACEPOINT_OPEN = 17
    MAP_FREEZE = 22
    MAP_LOOKUP_BATCH = 24
    LINK_CREATE = 28
    ITER_CREATE = 33


class ProgramType(enum.IntEnum):
    """enum bpf_prog_type, the part that we use."""

    CGROUP_SOCK_ADDR = 18
    TRACING = 26
    LSM = 29
    SYSCALL = 31


class AttachType(enum.IntEnum):
    """enum bpf_attach_type, the part that we use."""

    CGROUP_INET_INGRESS = 0
    CGROUP_INET_EGRESS = 1
    CGROUP_INET4_CONNECT = 10
    CGROUP_INET6_CONNECT = 11
    CGROUP_UDP4_SENDMSG = 14
    CGROUP_UDP6_SENDMSG = 15
    TRACE_RAW_TP = 23
    TRACE_FENTRY = 24
    TRACE_FEXIT = 25
    MODIFY_RETURN = 26
    LSM_MAC = 27
    TRACE_ITER = 28


MAP_TYPE_ARRAY: Final = 2
PROG_SLEEPABLE: Final = 1 << 4
MISSED_AT: Final = 208  # recursion_misses in struct bpf_prog_info

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_long)


def bpf(command: Command, attr: bytes) -> tuple[int, bytes]:
    """The raw call: (return value, `attr` as the kernel left it). OSError where it fails."""
    buffer = ctypes.create_string_buffer(attr, len(attr))
    result, error = _call(command, buffer)
    if error:
        raise OSError(error, f"bpf {command.name}: {os.strerror(error)}")
    return result, buffer.raw


def _call(command: Command, attr: ctypes.Array[ctypes.c_char]) -> tuple[int, int]:
    """(return value, error number or 0); the kernel may change `attr` in both cases."""
    number = NR_BPF.get(platform.machine())
    if number is None:
        raise OSError(38, f"bpf(2) on {platform.machine()} is not known here")
    result = int(_libc.syscall(number, command, attr, len(attr)))
    return result, ctypes.get_errno() if result < 0 else 0


class _Memory:
    """Bytes at a fixed address for the length of one call."""

    def __init__(self, content: bytes) -> None:
        self._buffer = ctypes.create_string_buffer(content, len(content))

    @property
    def address(self) -> int:
        return ctypes.addressof(self._buffer)

    @property
    def raw(self) -> bytes:
        return self._buffer.raw


def map_create(map_type: int, *, key_size: int, value_size: int, max_entries: int, name: str) -> int:
    attr = struct.pack(
        "<IIIIIII16s20x", map_type, key_size, value_size, max_entries, 0, 0, 0, name.encode("ascii")[:15]
    )
    return bpf(Command.MAP_CREATE, attr)[0]


def map_update(fd: int, key: bytes, value: bytes, flags: int = ANY) -> None:
    k, v = _Memory(key), _Memory(value)
    bpf(Command.MAP_UPDATE_ELEM, struct.pack("<I4xQQQ", fd, k.address, v.address, flags))


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes:
    k, v = _Memory(key), _Memory(bytes(value_size))
    bpf(Command.MAP_LOOKUP_ELEM, struct.pack("<I4xQQQ", fd, k.address, v.address, 0))
    return v.raw


def map_delete(fd: int, key: bytes) -> None:
    k = _Memory(key)
    bpf(Command.MAP_DELETE_ELEM, struct.pack("<I4xQQQ", fd, k.address, 0, 0))


def map_next_key(fd: int, key: bytes | None, key_size: int) -> bytes:
    """The key after `key`, the first one for None; OSError ENOENT after the last."""
    k, n = _Memory(key or b"\0"), _Memory(bytes(key_size))
    bpf(Command.MAP_GET_NEXT_KEY, struct.pack("<I4xQQ8x", fd, k.address if key else 0, n.address))
    return n.raw


def map_batch(
    fd: int, after: bytes | None, count: int, key_size: int, value_size: int
) -> tuple[bytes | None, bytes, bytes]:
    """At most `count` entries of a hash map after that position (None: from the first): the next position, None after
    the last entry, their keys, their values. OSError ENOSPC where a bucket has more than `count`."""
    position, keys, values = (
        _Memory(after or bytes(4)),
        _Memory(bytes(count * key_size)),
        _Memory(bytes(count * value_size)),
    )
    attr = ctypes.create_string_buffer(
        struct.pack(
            "<QQQQIIQQ",
            position.address if after else 0,
            position.address,
            keys.address,
            values.address,
            count,
            fd,
            0,
            0,
        ),
        56,
    )
    error = _call(Command.MAP_LOOKUP_BATCH, attr)[1]
    if error not in (0, errno.ENOENT):
        raise OSError(error, f"bpf MAP_LOOKUP_BATCH: {os.strerror(error)}")
    (found,) = struct.unpack_from("<I", attr.raw, 32)
    return position.raw if not error else None, keys.raw[: found * key_size], values.raw[: found * value_size]


def map_freeze(fd: int) -> None:
    bpf(Command.MAP_FREEZE, struct.pack("<I", fd))


def prog_load(
    program_type: ProgramType,
    insns: bytes,
    *,
    name: str,
    flags: int = 0,
    attach_type: int = 0,
    btf_id: int = 0,
    fds: tuple[int, ...] = (),
) -> int:
    """Load raw instructions. `fds` is the program's descriptor array; `btf_id` the target of a tracing program."""
    code, license_ = _Memory(insns), _Memory(b"Dual BSD/GPL\0")
    array = _Memory(struct.pack(f"<{len(fds)}i", *fds) or b"\0")
    attr = bytearray(128)
    struct.pack_into(
        "<IIQQIIQII16s", attr, 0, program_type, len(insns) // 8, code.address, license_.address, 0, 0, 0, 0, flags,
        name.encode("ascii")[:15],
    )  # fmt: skip
    struct.pack_into("<I", attr, 68, attach_type)
    struct.pack_into("<I", attr, 108, btf_id)
    if fds:
        struct.pack_into("<Q", attr, 120, array.address)
    return bpf(Command.PROG_LOAD, bytes(attr))[0]


def prog_run(fd: int, context: bytes) -> tuple[int, bytes]:
    """Run a `syscall` program once: (its signed return value, the context as it left it)."""
    ctx = _Memory(context)
    attr = bytearray(80)
    struct.pack_into("<I", attr, 0, fd)
    struct.pack_into("<IIQQ", attr, 40, len(context), 0, ctx.address, 0)
    _, out = bpf(Command.PROG_TEST_RUN, bytes(attr))
    (result,) = struct.unpack_from("<i", out, 4)
    return int(result), ctx.raw


def link_create(prog_fd: int, target_fd: int, attach_type: int) -> int:
    """A link of a program to a cgroup. It dies with its last descriptor unless it is pinned."""
    return bpf(Command.LINK_CREATE, struct.pack("<IIII48x", prog_fd, target_fd, attach_type, 0))[0]


def iter_create(link_fd: int) -> int:
    """A descriptor whose reading runs the iterator program over all objects, once."""
    return bpf(Command.ITER_CREATE, struct.pack("<II", link_fd, 0))[0]


def raw_tracepoint_open(prog_fd: int) -> int:
    """Attach a tp_btf, fentry, fexit or LSM program; its target was fixed when it was loaded."""
    return bpf(Command.RAW_TRACEPOINT_OPEN, struct.pack("<QI4x", 0, prog_fd))[0]


def pin(fd: int, path: str) -> None:
    """Give a link, map or program a name in a bpf file system, so that it outlives its descriptors."""
    name = _Memory(os.fsencode(path) + b"\0")
    bpf(Command.OBJ_PIN, struct.pack("<QII", name.address, fd, 0))


def pinned(path: str) -> int:
    """A new descriptor of what is pinned at `path`."""
    name = _Memory(os.fsencode(path) + b"\0")
    return bpf(Command.OBJ_GET, struct.pack("<QII", name.address, 0, 0))[0]


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """What the kernel says about a loaded program. `tag` is a hash of its relocated instructions: a record of what
    runs, not a value to compare across kernels (SHA-1[:8] before 6.18, SHA-256[:8] since)."""

    id: int
    name: str
    tag: str
    size: int  # bytes of its instructions after the verifier
    missed: int  # how often the kernel skipped it, because it was already running on that CPU


def prog_exists(number: int) -> bool:
    """Whether a program with this kernel id is still loaded, by whomever."""
    try:
        os.close(bpf(Command.PROG_GET_FD_BY_ID, struct.pack("<III", number, 0, 0))[0])
    except FileNotFoundError:
        return False
    return True


def program_info(fd: int) -> ProgramInfo:
    raw = _info(fd, 232)
    _, number, tag, _, size = struct.unpack_from("<II8sII", raw)
    (missed,) = struct.unpack_from("<Q", raw, MISSED_AT)
    return ProgramInfo(number, raw[64:80].split(b"\0")[0].decode("ascii", "replace"), tag.hex(), size, missed)


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """What the kernel says about a link. `target` is the cgroup's id for a cgroup link, 0 for any other or for one
    that was detached behind our back."""

    id: int
    program_id: int
    target: int


LINK_TYPE_CGROUP: Final = 3


def link_info(fd: int) -> LinkInfo:
    raw = _info(fd, 56)
    kind, number, program = struct.unpack_from("<III", raw)
    (cgroup,) = struct.unpack_from("<Q", raw, 16)
    return LinkInfo(number, program, cgroup if kind == LINK_TYPE_CGROUP else 0)


@dataclass(frozen=True, slots=True)
class MapInfo:
    """What the kernel says about a map. Sizes in bytes."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    name: str


def map_info(fd: int) -> MapInfo:
    raw = _info(fd, 88)
    kind, number, key, value, entries, _flags = struct.unpack_from("<6I", raw)
    return MapInfo(kind, number, key, value, entries, raw[24:40].split(b"\0")[0].decode("ascii", "replace"))


def map_hash(fd: int) -> str | None:
    """SHA-256 (hex) that the kernel made of a frozen array map, None where it cannot (before 6.18).

    It covers the value padded with zeros to a multiple of 8.
    """
    out = _Memory(bytes(32))
    try:
        _info(fd, 104, struct.pack("<QI", out.address, 32), 88)
    except OSError:
        return None
    return out.raw.hex() if any(out.raw) else None


def _info(fd: int, size: int, request: bytes = b"", at: int = 0) -> bytes:
    image = bytearray(size)
    image[at : at + len(request)] = request
    memory = _Memory(bytes(image))
    bpf(Command.OBJ_GET_INFO_BY_FD, struct.pack("<IIQ", fd, size, memory.address))
    return memory.raw
