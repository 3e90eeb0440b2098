"""Intel's TCB algorithm: versions of a platform against signed tables, to one of ten statuses. Pure.

Spec: Intel TDX DCAP Quote Verification, 4.1.2.5 (converged evaluation, and TD relaunch for TD 1.5); docs/spec/tdx.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import ge
from typing import Final

from pointcall_attest.collateral import Level, Module, QeIdentity, TcbInfo
from pointcall_attest.pck import SgxExtension
from pointcall_attest.tee_policy import TcbStatus

_CURRENT: Final = ("UpToDate", "SWHardeningNeeded")
_CURRENT_BUT_CONFIGURATION: Final = ("ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded")
_OUTDATED: Final = ("OutOfDate", "OutOfDateConfigurationNeeded")
_CONFIGURATION: Final = (*_CURRENT_BUT_CONFIGURATION, "OutOfDateConfigurationNeeded")


@dataclass(frozen=True, slots=True)
class Assessment:
    """The converged status and what led to it; None where no level of a table fits."""

    status: TcbStatus
    platform: TcbStatus | None  # by SGX components, PCESVN and TDX components
    sgx: TcbStatus | None  # by SGX components and PCESVN alone
    module: TcbStatus | None  # None also for a module of version 0, which has no table
    qe: TcbStatus | None
    date: datetime | None  # the oldest date of the levels that fit
    advisories: tuple[str, ...]
    superseded: datetime | None  # when the oldest newer level of the platform or module was dated


def assess(
    info: TcbInfo, identity: QeIdentity, pck: SgxExtension, qe_svn: int, svn: bytes, svn2: bytes | None
) -> Assessment:
    """The status of a TD launched at `svn` (16 bytes) and now running at `svn2` (TD 1.5; None in TD 1.0).

    (6) A TD whose launch versions are out of date while its present ones are not is advised to relaunch.
    """
    launched = _evaluate(info, identity, pck, qe_svn, svn)
    if svn2 is None or launched.status not in _OUTDATED:
        return launched
    present = _evaluate(info, identity, pck, qe_svn, svn2)
    if present.status not in (*_CURRENT, *_CURRENT_BUT_CONFIGURATION):
        return launched
    configuration = launched.status in _CONFIGURATION or present.status in _CONFIGURATION
    status: TcbStatus = "TDRelaunchAdvisedConfigurationNeeded" if configuration else "TDRelaunchAdvised"
    return Assessment(
        status,
        launched.platform,
        launched.sgx,
        launched.module,
        launched.qe,
        launched.date,
        launched.advisories,
        launched.superseded,
    )


def _evaluate(info: TcbInfo, identity: QeIdentity, pck: SgxExtension, qe_svn: int, svn: bytes) -> Assessment:
    """(1) to (5): platform, module and quoting enclave, each by its table, then converged."""
    fitting = [level for level in info.levels if _covers(pck, level)]
    first = 2 if svn[1] else 0  # a module of version 1 and up has a table of its own
    platform = next((level for level in fitting if _at_least(svn[first:], level.tdx[first:])), None)
    module_table = _module_levels(info, svn[1])
    module = _by_svn(module_table, svn[0])
    qe = _by_svn(identity.levels, qe_svn)
    found = [level for level in (platform, qe, module) if level is not None]
    newer = [*_above(info.levels, platform), *_above(module_table, module), *_above(identity.levels, qe)]
    return Assessment(
        _converged(platform, module, qe, has_module=bool(svn[1])),
        platform.status if platform else None,
        fitting[0].status if fitting else None,
        module.status if module else None,
        qe.status if qe else None,
        min((level.date for level in found), default=None),
        tuple(dict.fromkeys(advisory for level in found for advisory in level.advisories)),
        min((level.date for level in newer), default=None),
    )


def _converged(platform: Level | None, module: Level | None, qe: Level | None, *, has_module: bool) -> TcbStatus:
    if platform is None or qe is None or (has_module and module is None):
        return "TCBNotSupported"
    parts = [level.status for level in (qe, module) if level is not None]
    if "Revoked" in (*parts, platform.status):
        return "Revoked"
    if any(status in _OUTDATED for status in parts):
        if platform.status in _CURRENT:
            return "OutOfDate"
        if platform.status in _CURRENT_BUT_CONFIGURATION:
            return "OutOfDateConfigurationNeeded"
    return platform.status


def find_module(info: TcbInfo, version: int) -> Module | None:
    """The identity that a TDX module of this version must have: the unnumbered one for 0, else TDX_<version>."""
    if version == 0:
        return info.module
    return next((module for module in info.modules if module.id == f"TDX_{version:02X}"), None)


def _module_levels(info: TcbInfo, version: int) -> tuple[Level, ...]:
    module = find_module(info, version) if version else None
    return module.levels if module else ()


def _covers(pck: SgxExtension, level: Level) -> bool:
    return _at_least(pck.components, level.sgx) and pck.pcesvn >= level.pcesvn


def _at_least(have: bytes, want: bytes) -> bool:
    """Byte by byte; both have the same length: 16, or what is left of 16."""
    return all(map(ge, have, want))


def _by_svn(levels: Sequence[Level], svn: int) -> Level | None:
    return next((level for level in levels if svn >= level.isvsvn), None)


def _above(levels: Sequence[Level], fitting: Level | None) -> Sequence[Level]:
    return levels[: levels.index(fitting)] if fitting in levels else ()
