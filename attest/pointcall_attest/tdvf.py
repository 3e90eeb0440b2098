"""MRTD of a TD from its firmware image, as the TDX module computes it. bytes -> digests. No I/O.

SHA-384 over one 128-byte record for every page that is added, and one with 256 bytes of data for every chunk that is
extended. Two orders are in use (page by page, or all pages of a section first): both are computed.
Spec: Intel TDX Virtual Firmware Design Guide, metadata; TDX module ABI, TDH.MEM.PAGE.ADD and TDH.MR.EXTEND.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from dataclasses import dataclass
from typing import Final

from pointcall_attest.errors import MalformedError

MAX_IMAGE_BYTES: Final = 64 * 1024 * 1024  # firmware images have 2 to 16 MiB
MAX_ADDED_BYTES: Final = 64 * 1024 * 1024  # bounds the work: 16,384 pages
MAX_SECTIONS: Final = 64
PAGE: Final = 4096
CHUNK: Final = 256
EXTEND, PAGE_AUG = 1, 2  # section attributes
_FOOTER: Final = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
_METADATA: Final = uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le
_TABLE_END: Final = 32  # the reset vector follows the table
_ENTRY: Final = struct.Struct("<H16s")  # its size with this trailer, its GUID; the data lies before it
_DESCRIPTOR: Final = struct.Struct("<4sIII")  # TDVF, length, version, number of sections
_SECTION: Final = struct.Struct("<IIQQII")  # data offset, data size, address, memory size, type, attributes


@dataclass(frozen=True, slots=True)
class Section:
    """One range of memory that the firmware describes. Sizes in bytes."""

    offset: int
    size: int
    address: int
    memory: int
    type: int
    attributes: int


@dataclass(frozen=True, slots=True)
class Mrtd:
    """The two values that one image can give, by the order in which the host adds and extends pages."""

    one_pass: bytes
    two_pass: bytes
    sections: tuple[Section, ...]


def measure(image: bytes) -> Mrtd:
    """Both MRTDs of a firmware image; MalformedError `tdvf.malformed` where it has no TDX metadata that we know."""
    if not PAGE <= len(image) <= MAX_IMAGE_BYTES:
        raise _refused(f"{len(image)} bytes")
    sections = _sections(image)
    one, two = hashlib.sha384(), hashlib.sha384()
    for section in sections:
        pages = [] if section.attributes & PAGE_AUG else range(section.address, section.address + section.memory, PAGE)
        for page in pages:
            one.update(_added(page) + _extended(image, section, page))
        two.update(b"".join(map(_added, pages)))
        for page in pages:
            two.update(_extended(image, section, page))
    return Mrtd(one.digest(), two.digest(), sections)


def _added(page: int) -> bytes:
    return b"MEM.PAGE.ADD".ljust(16, b"\0") + struct.pack("<Q", page).ljust(112, b"\0")


def _extended(image: bytes, section: Section, page: int) -> bytes:
    """The 16 records of one page and its data; nothing where the section is not measured."""
    if not section.attributes & EXTEND:
        return b""
    start = page - section.address
    data = image[section.offset : section.offset + section.size][start : start + PAGE].ljust(PAGE, b"\0")
    return b"".join(
        b"MR.EXTEND".ljust(16, b"\0") + struct.pack("<Q", page + at).ljust(112, b"\0") + data[at : at + CHUNK]
        for at in range(0, PAGE, CHUNK)
    )


def _sections(image: bytes) -> tuple[Section, ...]:
    at = len(image) - _metadata_offset(image)
    if not 0 <= at <= len(image) - _DESCRIPTOR.size:
        raise _refused("its metadata lies outside")
    magic, length, version, count = _DESCRIPTOR.unpack_from(image, at)
    if magic != b"TDVF" or version != 1 or not 1 <= count <= MAX_SECTIONS:
        raise _refused("its metadata is not of a form that we know")
    if length != _DESCRIPTOR.size + count * _SECTION.size or at + length > len(image):
        raise _refused("its metadata is not whole")
    first = at + _DESCRIPTOR.size
    found = tuple(Section(*_SECTION.unpack_from(image, first + i * _SECTION.size)) for i in range(count))
    if sum(section.memory for section in found if not section.attributes & PAGE_AUG) > MAX_ADDED_BYTES:
        raise _refused(f"it adds more than {MAX_ADDED_BYTES} bytes")
    for section in found:
        _check(section, len(image))
    return found


def _check(section: Section, size: int) -> None:
    inside = section.offset + section.size <= size and section.size <= section.memory
    aligned = section.address % PAGE == 0 and section.memory % PAGE == 0 and section.address < 1 << 52
    if not inside or not aligned:
        raise _refused(f"a section at {section.address:#x} is not aligned or has data outside the image")


def _metadata_offset(image: bytes) -> int:
    """Distance of the metadata from the end of the image, out of the GUID table before the reset vector."""
    end = len(image) - _TABLE_END
    size, guid = _ENTRY.unpack_from(image, end - _ENTRY.size)
    if guid != _FOOTER or not _ENTRY.size <= size <= end:
        raise _refused("it has no GUID table")
    start, at = end - size, end - _ENTRY.size
    while at - _ENTRY.size >= start:
        size, guid = _ENTRY.unpack_from(image, at - _ENTRY.size)
        if not _ENTRY.size <= size <= at - start:
            raise _refused("its GUID table is not whole")
        if guid == _METADATA and size == _ENTRY.size + 4:
            return int.from_bytes(image[at - size : at - size + 4], "little")
        at -= size
    raise _refused("its GUID table names no TDX metadata")


def _refused(why: str) -> MalformedError:
    return MalformedError("not a TDX firmware image", id="tdvf.malformed", got=why)
