"""Evidence through /dev/sev-guest and /dev/tdx_guest: fixed structures, one ioctl each. The ioctl comes in as a value.

A quote cannot be had from /dev/tdx_guest: it gives a TDREPORT, and a quote service (quote_service.py) makes the quote.
ENOTTY on the SNP device means that the guest's message key was wiped: it never works again until the next boot.
Spec: Linux include/uapi/linux/sev-guest.h and tdx-guest.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pointcall_attest import certificate_file, snp, tdreport, tdx
from pointcall_attest.errors import MalformedError
from pointcall_attest.evidence import EvidenceBundle
from pointcall_executor.tee.platform import SNP_DEVICE, TDX_DEVICE, PlatformError

SNP_GET_REPORT: Final = 0xC0205300
SNP_GET_EXT_REPORT: Final = 0xC0205302
TDX_CMD_GET_REPORT0: Final = 0xC4405401
REQUEST: Final = struct.Struct("<B7xQQQ")  # msg_version, request, response, exitinfo2
REPORT_REQUEST: Final = struct.Struct("<64sI28x")  # user_data, vmpl
EXT_REQUEST: Final = struct.Struct("<96sQI4x")  # report request, address and size of the certificate table
RESPONSE_BYTES: Final = 4000
RESPONSE_HEAD: Final = struct.Struct("<II24x")  # status, size of the report
TDX_REQUEST_BYTES: Final = 64 + tdreport.SIZE
FIRST_TABLE_BYTES, MAX_TABLE_BYTES = 4096, 16 * 1024
_UNSET: Final = 0xFFFF_FFFF_FFFF_FFFF
_TABLE_TOO_SMALL: Final = 1  # vmm_error
Ioctl = Callable[[int, int, bytearray], int]


def kernel_ioctl(descriptor: int, request: int, buffer: bytearray) -> int:
    """fcntl.ioctl that writes back into the buffer."""
    result: int = fcntl.ioctl(descriptor, request, buffer, True)
    return result


@dataclass(frozen=True, slots=True)
class SnpDevice:
    """Gives an SNP report and the host's certificate table."""

    path: Path = Path("/") / SNP_DEVICE
    vmpl: int = 0
    ioctl: Ioctl = kernel_ioctl

    def evidence(self, report_data: bytes) -> EvidenceBundle:
        """Evidence that binds these 64 bytes; PlatformError `tee.snp_device` where the device gives none."""
        assert len(report_data) == 64, "REPORT_DATA has 64 bytes"
        with _opened(self.path, "tee.snp_device") as descriptor:
            report, table = self._extended(descriptor, report_data, FIRST_TABLE_BYTES)
        try:
            bound = snp.parse(report).report_data
            files = certificate_file.read(table) if table.strip(b"\0") else certificate_file.CertificateFile()
        except MalformedError as error:
            raise _refused("tee.snp_device", f"what the firmware gave is no evidence: {error.id}") from error
        if bound != report_data:
            raise _refused("tee.snp_device", "the report binds other bytes than we asked for")
        return EvidenceBundle("snp", report, files.certificates, files.crls)

    def _extended(self, descriptor: int, report_data: bytes, table_bytes: int) -> tuple[bytes, bytes]:
        """One request; a second one where the host's table needs more room (it then says how much)."""
        table = ctypes.create_string_buffer(table_bytes)
        inner = REPORT_REQUEST.pack(report_data, self.vmpl)
        request = ctypes.create_string_buffer(
            EXT_REQUEST.pack(inner, ctypes.addressof(table), table_bytes), EXT_REQUEST.size
        )
        response = ctypes.create_string_buffer(RESPONSE_BYTES)
        outer = bytearray(REQUEST.pack(1, ctypes.addressof(request), ctypes.addressof(response), _UNSET))
        try:
            self.ioctl(descriptor, SNP_GET_EXT_REPORT, outer)
        except OSError as error:
            firmware, host = _exit_info(outer)
            needed = EXT_REQUEST.unpack(request.raw)[2]
            if error.errno == errno.EIO and host == _TABLE_TOO_SMALL and table_bytes < needed <= MAX_TABLE_BYTES:
                return self._extended(descriptor, report_data, needed)
            raise _refused("tee.snp_device", _meaning(error, firmware, host)) from None
        return _report(response.raw), table.raw


def _exit_info(outer: bytearray) -> tuple[int, int]:
    """(error of the firmware, error of the host) out of exitinfo2."""
    exit_info: int = REQUEST.unpack(outer)[3]
    return exit_info & 0xFFFF_FFFF, exit_info >> 32


def _report(response: bytes) -> bytes:
    status, size = RESPONSE_HEAD.unpack_from(response)
    if status != 0 or size != snp.SIZE:
        raise _refused("tee.snp_device", f"the firmware answered with status {status:#x} and {size} bytes")
    return response[RESPONSE_HEAD.size : RESPONSE_HEAD.size + size]


def _meaning(error: OSError, firmware: int, host: int) -> str:
    if error.errno == errno.ENOTTY:
        return "ENOTTY: the guest's message key was wiped; only a reboot helps, do not ask again"
    name = errno.errorcode.get(error.errno or 0, "?")
    return f"{name}: firmware error {firmware:#x}, host error {host:#x}"


@dataclass(frozen=True, slots=True)
class TdxDevice:
    """Gives a TDREPORT, and through a quote service a quote."""

    quote: Callable[[bytes], bytes]  # TDREPORT -> quote
    path: Path = Path("/") / TDX_DEVICE
    ioctl: Ioctl = kernel_ioctl

    def evidence(self, report_data: bytes) -> EvidenceBundle:
        """Evidence that binds these 64 bytes; PlatformError `tee.tdx_device` where device or service give none."""
        report = self.report(report_data)
        raw = self.quote(report)
        try:
            body, local = tdx.parse(raw).body, tdreport.parse(report)
        except MalformedError as error:
            raise _refused("tee.tdx_device", f"what was given is no evidence: {error.id}") from error
        if (body.report_data, body.mrtd) != (report_data, local.mrtd):
            raise _refused("tee.tdx_device", "the quote is not of this TD and these bytes")
        return EvidenceBundle("tdx", raw)

    def report(self, report_data: bytes) -> bytes:
        """The TDREPORT (1024 bytes) over these 64 bytes."""
        assert len(report_data) == 64, "REPORT_DATA has 64 bytes"
        buffer = bytearray(report_data.ljust(TDX_REQUEST_BYTES, b"\0"))
        with _opened(self.path, "tee.tdx_device") as descriptor:
            try:
                self.ioctl(descriptor, TDX_CMD_GET_REPORT0, buffer)
            except OSError as error:
                raise _refused("tee.tdx_device", _meaning(error, 0, 0)) from None
        return bytes(buffer[64:])


@contextmanager
def _opened(path: Path, id: str) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(id, f"{path} cannot be opened: {os.strerror(error.errno or 0)}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _refused(id: str, why: str) -> PlatformError:
    return PlatformError("the guest device gives no evidence", id=id, got=why, hint="pointcall attest probe")
