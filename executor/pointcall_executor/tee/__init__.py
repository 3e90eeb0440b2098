"""Where evidence comes from: what this machine offers, and the emulated platform. Appraising is for the attest room.

`probe()` says what there is and why not. There is no automatic fallback: the platform is named by configuration, and
emulation starts only where no real TEE exists.
"""

from pointcall_executor.tee.platform import Finding, Platform, PlatformError, probe

__all__ = ["Finding", "Platform", "PlatformError", "probe"]
