"""What a machine offers for attestation, and the one shape of everything that gives evidence.

Looks at device nodes and at configfs; asks the kernel for nothing but a configfs item that it removes again.
Spec: Linux Documentation/ABI/testing/configfs-tsm-report; docs/spec/evidence.md, section Getting evidence.
"""

from __future__ import annotations

import errno
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Protocol

from pointcall_attest.evidence import EvidenceBundle
from pointcall_runbook.errors import PointcallError

SNP_DEVICE: Final = "dev/sev-guest"
TDX_DEVICE: Final = "dev/tdx_guest"
TSM_FOLDER: Final = "sys/kernel/config/tsm/report"
VSOCK_DEVICE: Final = "dev/vsock"
TDX_REGISTERS: Final = "sys/devices/virtual/misc/tdx_guest/measurements"
_PROBE_ITEM: Final = f"pointcall-probe-{os.getpid()}"


class PlatformError(PointcallError):
    """The platform cannot give evidence here and now."""

    id = "tee.unavailable"


class Platform(Protocol):
    """Something that gives evidence: hardware through one of its interfaces, or the emulated platform."""

    def evidence(self, report_data: bytes) -> EvidenceBundle:
        """Evidence for these 64 bytes, with what its verification needs; PlatformError where it cannot be had."""
        ...


@dataclass(frozen=True, slots=True)
class Finding:
    """One interface: whether it is usable here, and what was seen."""

    what: str
    available: bool
    why: str

    def as_dict(self) -> dict[str, str | bool]:
        return asdict(self)


def probe(system: Path = Path("/")) -> list[Finding]:
    """Every interface to a real TEE, each with the reason where it is absent. `system` is the folder to look in."""
    return [
        _configfs(system / TSM_FOLDER),
        _device("SNP guest device", system / SNP_DEVICE, "sev-guest"),
        _device("TDX guest device", system / TDX_DEVICE, "tdx-guest"),
        _device("vsock for a TDX quote service", system / VSOCK_DEVICE, "vmw_vsock_virtio_transport"),
        _registers(system / TDX_REGISTERS),
    ]


def real_tee(system: Path = Path("/")) -> str | None:
    """What shows that a real TEE is here, or None. vsock alone is no TEE."""
    for device in (SNP_DEVICE, TDX_DEVICE):
        if (system / device).exists():
            return f"/{device}"
    finding = _configfs(system / TSM_FOLDER)
    return finding.why if finding.available else None


def _device(what: str, path: Path, module: str) -> Finding:
    shown = f"/{path.parent.name}/{path.name}"
    if not path.exists():
        return Finding(what, False, f"{shown} does not exist: not such a guest, or module {module} is not loaded")
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding(what, False, f"{shown} exists, but this user may not open it")
    return Finding(what, True, f"{shown} can be opened")


def _registers(path: Path) -> Finding:
    what = "TDX measurement registers"
    if not path.is_dir():
        return Finding(what, False, "no measurements folder of tdx_guest: not a TDX guest, or a kernel before 6.16")
    return Finding(what, True, ", ".join(sorted(entry.name for entry in path.iterdir())))


def _configfs(folder: Path) -> Finding:
    """Whether configfs-tsm has a provider: only making an item tells (ENXIO without one)."""
    what = "configfs-tsm reports"
    if not folder.is_dir():
        return Finding(
            what, False, "no tsm/report in configfs: kernel before 6.7, configfs not mounted, or no tsm module"
        )
    item = folder / _PROBE_ITEM
    try:
        item.mkdir()
    except OSError as error:
        reason = "no provider is registered" if error.errno == errno.ENXIO else os.strerror(error.errno or 0)
        return Finding(what, False, f"an item cannot be made: {reason}")
    try:
        provider = (item / "provider").read_text().strip()
    except OSError as error:
        return Finding(what, False, f"the provider does not say its name: {os.strerror(error.errno or 0)}")
    finally:
        item.rmdir()
    return Finding(what, True, f"provider {provider}")
