"""Evidence through configfs-tsm: one item, its blobs, its generation. The kernel's files are reached through TsmFiles.

The result of writing a binary attribute comes at close and is discarded by the kernel, so only `generation` proves that
our bytes were taken; another writer on the same item is found the same way.
Spec: Linux Documentation/ABI/testing/configfs-tsm-report and drivers/virt/coco/guest/report.c.
"""

from __future__ import annotations

import errno
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from pointcall_attest import cert_table, certificate_file, snp, tdx
from pointcall_attest.errors import MalformedError
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.tee_policy import Platform as PlatformName
from pointcall_executor.tee.platform import TSM_FOLDER, PlatformError

PROVIDERS: Final[dict[str, PlatformName]] = {"sev_guest": "snp", "tdx_guest": "tdx"}
INBLOB_BYTES: Final = 64  # the ABI says 1 to 64; both drivers demand exactly 64
MAX_BLOB_BYTES: Final = 1 << 20  # the kernel allows 32 KiB, newer ones more
TRIES: Final = 3  # EBUSY means another quote is being made: once is normal, thrice is a fault
_GENERATION_MASK: Final = (1 << 64) - 1


class TsmFiles(Protocol):
    """The items under tsm/report. Every call raises OSError as the kernel does."""

    def make(self, item: str) -> None: ...
    def remove(self, item: str) -> None: ...
    def read(self, item: str, attribute: str) -> bytes: ...
    def write(self, item: str, attribute: str, value: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class KernelTsmFiles:
    """The real ones. One descriptor either reads or writes, is never truncated, and a write is one call."""

    folder: Path = Path("/") / TSM_FOLDER

    def make(self, item: str) -> None:
        (self.folder / item).mkdir()

    def remove(self, item: str) -> None:
        (self.folder / item).rmdir()

    def read(self, item: str, attribute: str) -> bytes:
        descriptor = os.open(self.folder / item / attribute, os.O_RDONLY)
        try:
            blob = b""
            while part := os.read(descriptor, MAX_BLOB_BYTES):
                blob += part
                if len(blob) > MAX_BLOB_BYTES:
                    raise OSError(errno.EFBIG, "the kernel's blob has no end")
            return blob
        finally:
            os.close(descriptor)

    def write(self, item: str, attribute: str, value: bytes) -> None:
        descriptor = os.open(self.folder / item / attribute, os.O_WRONLY)
        try:
            if os.write(descriptor, value) != len(value):
                raise OSError(errno.EIO, "the kernel took only a part")
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class ConfigfsPlatform:
    """Gives SNP or TDX evidence of the machine. `privlevel` is the VMPL to ask for (SNP only)."""

    files: TsmFiles
    privlevel: int | None = None

    def evidence(self, report_data: bytes) -> EvidenceBundle:
        """Evidence that binds these 64 bytes; PlatformError `tee.configfs` where the kernel gives none."""
        assert len(report_data) == INBLOB_BYTES, "REPORT_DATA has 64 bytes"
        return self._tried(report_data, TRIES)

    def _tried(self, report_data: bytes, left: int) -> EvidenceBundle:
        try:
            return self._once(report_data)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EINTR) or left == 1:
                raise _refused(_meaning(error)) from None
        return self._tried(report_data, left - 1)

    def _once(self, report_data: bytes) -> EvidenceBundle:
        item = f"pointcall-{os.getpid()}-{secrets.token_hex(8)}"
        self.files.make(item)
        try:
            provider = self.files.read(item, "provider").decode("ascii", "replace").strip()
            if provider not in PROVIDERS:
                raise _refused(f"an unknown provider: {provider}")
            outblob, auxblob = self._exchange(item, PROVIDERS[provider], report_data)
        finally:
            self.files.remove(item)
        return _bundle(PROVIDERS[provider], outblob, auxblob, report_data)

    def _exchange(self, item: str, platform: PlatformName, report_data: bytes) -> tuple[bytes, bytes]:
        """Write, read, and prove by `generation` that nobody else wrote in between and our write was taken."""
        before = self._generation(item)
        writes = 1
        self.files.write(item, "inblob", report_data)
        if self.privlevel is not None and platform == "snp":
            self.files.write(item, "privlevel", str(self.privlevel).encode())
            writes += 1
        auxblob = self.files.read(item, "auxblob") if platform == "snp" else b""
        outblob = self.files.read(item, "outblob")
        after = self._generation(item)
        if after != (before + writes) & _GENERATION_MASK:
            raise _refused(f"generation went from {before} to {after} with {writes} writes: one was lost, or not ours")
        if not outblob:
            raise _refused("the kernel gave an empty blob without an error")
        return outblob, auxblob

    def _generation(self, item: str) -> int:
        text = self.files.read(item, "generation").strip()
        if not text.isdigit():
            raise _refused("generation is not a number")
        return int(text)


def _bundle(platform: PlatformName, outblob: bytes, auxblob: bytes, report_data: bytes) -> EvidenceBundle:
    """The blobs as a bundle, if they are evidence and bind what we asked for."""
    try:
        if platform == "tdx":
            bound = tdx.parse(outblob).body.report_data
            files = certificate_file.CertificateFile()
        else:
            bound = snp.parse(outblob).report_data
            files = _certificates(auxblob)
    except MalformedError as error:
        raise _refused(f"what the kernel gave is no evidence: {error.id}") from error
    if bound != report_data:
        raise _refused("the evidence binds other bytes than we asked for")
    return EvidenceBundle(platform, outblob, files.certificates, files.crls)


def _certificates(auxblob: bytes) -> certificate_file.CertificateFile:
    """The host's certificate table; a host may give none."""
    if not auxblob.strip(b"\0"):
        return certificate_file.CertificateFile()
    cert_table.parse(auxblob)
    return certificate_file.read(auxblob)


_MEANINGS: Final = {
    errno.ENXIO: "no provider is registered, or the firmware answered with an error status",
    errno.EBUSY: "another quote is still being made",
    errno.EINVAL: "the driver does not take these 64 bytes or this privlevel",
    errno.ETIMEDOUT: "the host or firmware did not answer in time",
    errno.EIO: "the hypercall failed",
    errno.EFBIG: "the blob is larger than the kernel allows",
    errno.EACCES: "this user may not use configfs",
    errno.ENOENT: "configfs-tsm is not there",
    errno.EINTR: "interrupted again and again",
}


def _meaning(error: OSError) -> str:
    known = _MEANINGS.get(error.errno or 0, "the kernel refused")
    return f"{errno.errorcode.get(error.errno or 0, '?')}: {known}"


def _refused(why: str) -> PlatformError:
    return PlatformError("configfs-tsm gives no evidence", id="tee.configfs", got=why, hint="pointcall attest probe")
