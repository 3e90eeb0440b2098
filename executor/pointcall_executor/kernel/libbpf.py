"""The second loader: the distribution's libbpf.so.1 through ctypes, for an object file instead of its blob.

For diagnosis and comparison: after the verifier both loaders' programs are the same, only their tags differ, because a
light skeleton names its maps by index. It loads an ELF file, which a manifest must name as a subject of its own; the
default is kernel/loader.py. Spec: libbpf 1.0 and newer.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Mapping
from typing import Any, Final

from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.errors import KernelError, LoadError
from pointcall_executor.kernel.loader import Loaded

LIBRARY: Final = "libbpf.so.1"
_WARN: Final = 0
_PRINT: Final = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_POINTER: Final = ctypes.c_void_p
_SIGNATURES: Final[Mapping[str, tuple[Any, ...]]] = {  # name -> result, arguments
    "bpf_object__open_mem": (_POINTER, _POINTER, ctypes.c_size_t, _POINTER),
    "bpf_object__load": (ctypes.c_int, _POINTER),
    "bpf_object__close": (None, _POINTER),
    "bpf_object__next_program": (_POINTER, _POINTER, _POINTER),
    "bpf_object__next_map": (_POINTER, _POINTER, _POINTER),
    "bpf_program__name": (ctypes.c_char_p, _POINTER),
    "bpf_program__fd": (ctypes.c_int, _POINTER),
    "bpf_map__name": (ctypes.c_char_p, _POINTER),
    "bpf_map__fd": (ctypes.c_int, _POINTER),
    "bpf_map__initial_value": (_POINTER, _POINTER, ctypes.POINTER(ctypes.c_size_t)),
    "libbpf_set_print": (_POINTER, _PRINT),
}
_heard: Final[list[Any]] = []


def installed() -> str:
    """The library's name. KernelError where it is not installed."""
    _library()
    return LIBRARY


def load(blob: Blob, elf: bytes, constants: Mapping[str, int] | None = None) -> Loaded:
    """Load the object file `elf`, whose names and constants are those of `blob`.

    Raises KernelError where libbpf is not installed, LoadError with libbpf's text where it refuses.
    """
    library, said = _library(), _Said()
    said.listen(library)
    image = blob.with_constants(constants or {})
    buffer = ctypes.create_string_buffer(elf, len(elf))
    handle = library.bpf_object__open_mem(buffer, len(elf), None)
    if not handle:
        raise _refused(blob, ctypes.get_errno(), said)
    try:
        maps = _each(library, handle, "map")
        _patch(library, blob, maps, image)
        code = library.bpf_object__load(handle)
        if code:
            raise _refused(blob, -code, said)
        return _taken(library, blob, maps, _each(library, handle, "program"))
    finally:
        library.bpf_object__close(handle)


class _Said:
    """libbpf's messages of one load; it prints through a variadic callback, formatted here by the C library."""

    def __init__(self) -> None:
        self.text = ""
        self._libc = ctypes.CDLL(None)
        self._callback = _PRINT(self._on_print)

    def listen(self, library: ctypes.CDLL) -> None:
        library.libbpf_set_print(self._callback)
        _heard.append(self._callback)  # libbpf may call it as long as the process lives

    def _on_print(self, level: int, form: bytes, arguments: int) -> int:
        if level == _WARN:
            line = ctypes.create_string_buffer(8192)
            self._libc.vsnprintf(line, ctypes.c_size_t(8192), form, _POINTER(arguments))
            self.text += line.value.decode("utf-8", "replace")
        return 0


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY, use_errno=True)
    except OSError:
        raise KernelError(
            "libbpf is not installed", id="kernel.libbpf", want=LIBRARY, got="not found", hint="apt-get install libbpf1"
        ) from None
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _each(library: ctypes.CDLL, handle: int, what: str) -> dict[str, int]:
    """name -> pointer of every map or program; a map's name loses the object's prefix (`breaker.rodata`)."""
    following, name = getattr(library, f"bpf_object__next_{what}"), getattr(library, f"bpf_{what}__name")
    found, at = {}, following(handle, None)
    while at:
        found[name(at).decode("ascii").split(".")[-1]] = at
        at = following(handle, at)
    return found


def _patch(library: ctypes.CDLL, blob: Blob, maps: Mapping[str, int], image: bytes) -> None:
    if not image:
        return
    size = ctypes.c_size_t()
    target = library.bpf_map__initial_value(maps["rodata"], ctypes.byref(size))
    if not target or size.value != len(image):
        raise LoadError(f"the object is not that of the blob {blob.name}", got=f"{size.value} bytes of constants")
    ctypes.memmove(target, image, len(image))


def _taken(library: ctypes.CDLL, blob: Blob, maps: Mapping[str, int], programs: Mapping[str, int]) -> Loaded:
    """Descriptors of our own, so that the object may be closed."""
    return Loaded(
        {name: _duplicate(library.bpf_map__fd(maps[name])) for name in blob.maps},
        {p.name: _duplicate(library.bpf_program__fd(programs[p.name])) for p in blob.programs},
    )


def _duplicate(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


def _refused(blob: Blob, code: int, said: _Said) -> LoadError:
    name = errno.errorcode.get(code, str(code))
    return LoadError(f"libbpf refused {blob.name}", log=said.text, got=f"{name}: {os.strerror(code)}")
