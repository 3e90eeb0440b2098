"""The real TEE of this machine, through the first of its interfaces that is there. Never the emulated one.

Spec: docs/spec/evidence.md, section Getting evidence.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pointcall_attest.tee_policy import Platform as PlatformName
from pointcall_executor.tee import quote_service
from pointcall_executor.tee.configfs import PROVIDERS, ConfigfsPlatform, KernelTsmFiles
from pointcall_executor.tee.guest_device import SnpDevice, TdxDevice
from pointcall_executor.tee.platform import (
    SNP_DEVICE,
    TDX_DEVICE,
    TSM_FOLDER,
    Platform,
    PlatformError,
    probe,
)


def open_hardware(platform: PlatformName, system: Path = Path("/")) -> Platform:
    """Evidence of this platform: configfs-tsm if it has the right provider, else the guest device.

    PlatformError `tee.unavailable` with everything that was looked at; there is no fallback to emulation.
    """
    findings = probe(system)
    provider = next((name for name, of in PROVIDERS.items() if of == platform), "")
    if findings[0].available and findings[0].why.endswith(provider):
        return ConfigfsPlatform(KernelTsmFiles(system / TSM_FOLDER))
    if platform == "snp" and (system / SNP_DEVICE).exists():
        return SnpDevice(system / SNP_DEVICE)
    if platform == "tdx" and (system / TDX_DEVICE).exists():
        return TdxDevice(partial(quote_service.quote, connect=quote_service.vsock), system / TDX_DEVICE)
    raise PlatformError(
        f"this machine offers no {platform} evidence",
        got="; ".join(f"{finding.what}: {finding.why}" for finding in findings),
        hint="emulation must be asked for by name",
    )
