"""What evidence must show to be acceptable to us. Data only: nothing here verifies. Spec: docs/spec/trust.md.

An empty policy, `{}`, is the strict default. What each unset value means is written beside it; a value that is unset
never hides a check: the verdict then lists that check as not checked.
Unknown keys are refused, and the digest of the trust policy that holds this object is part of REPORT_DATA.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from pointcall_attest import exact_json
from pointcall_attest.errors import MalformedError

Platform = Literal["snp", "tdx"]
Line = Literal["Milan", "Genoa", "Turin", "Venice"]
TcbStatus = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "Revoked",
    "TCBNotSupported",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
]
Byte = Annotated[int, Field(ge=0, le=0xFF)]
U32 = Annotated[int, Field(ge=0, le=0xFFFF_FFFF)]
U64 = Annotated[int, Field(ge=0, le=0xFFFF_FFFF_FFFF_FFFF)]


def _hex(size: int) -> StringConstraints:
    return StringConstraints(pattern=rf"^[0-9a-f]{{{2 * size}}}$")


Hex8 = Annotated[str, _hex(8)]
Hex16 = Annotated[str, _hex(16)]
Hex32 = Annotated[str, _hex(32)]
Hex48 = Annotated[str, _hex(48)]
Hex64 = Annotated[str, _hex(64)]
Advisory = Annotated[str, StringConstraints(pattern=r"^INTEL-[A-Z]{2}-[0-9]{5}$")]

MAX_POLICY_BYTES: Final = 64 * 1024  # a policy is some twenty lines; chip lists of a large fleet fit


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TcbMinimum(_Strict):
    """Least security version of each SNP firmware part. Unset parts are 0: any version. Compared part by part."""

    fmc: Byte = 0
    bl: Byte = 0
    tee: Byte = 0
    snp: Byte = 0
    ucode: Byte = 0


class Bits(_Strict):
    """Bits that must be set and bits that must be clear. Unset: none; bits named in neither are tolerated."""

    required: U64 = 0
    forbidden: U64 = 0


class SnpPolicy(_Strict):
    """What an SNP report must show beyond a right signature."""

    allow_report_v2: bool = False  # v2 does not authenticate the product: opt in
    min_abi: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,3}\.[0-9]{1,3}$")] = "0.0"  # of the guest policy
    min_guest_svn: U32 = 0
    allow_migration_agent: bool = False  # a migration agent may move the guest's secrets
    allow_smt: bool = True
    require_single_socket: bool = False
    guest_policy: Bits = Bits()  # further bits of POLICY
    platform_info: Bits = Bits()  # e.g. required 32: ALIAS_CHECK_COMPLETE, AMD-SB-3015
    min_tcb: dict[Line, TcbMinimum] = {}  # of REPORTED_TCB; a line that is not named has no minimum
    min_committed_tcb: dict[Line, TcbMinimum] = {}
    min_launch_tcb: dict[Line, TcbMinimum] = {}
    launch_mitigations: Bits = Bits()  # v5 only: a required bit refuses older reports
    current_mitigations: Bits = Bits()
    host_data: Hex32 | None = None  # None: not checked
    family_id: Hex16 | None = None
    image_id: Hex16 | None = None
    id_key_digests: tuple[Hex48, ...] | None = None  # None: not checked; empty: nothing matches
    author_key_digests: tuple[Hex48, ...] | None = None
    chip_ids: tuple[Hex64 | Hex8, ...] | None = None
    csp_ids: tuple[str, ...] | None = None  # of a VLEK
    require_crl: bool = False  # False: a missing CRL is listed as not checked


class TdxPolicy(_Strict):
    """What a TDX quote must show beyond a right signature."""

    statuses: tuple[TcbStatus, ...] = ("UpToDate",)
    advisories_allowed: tuple[Advisory, ...] | None = None  # None: whatever an accepted status brings
    advisories_denied: tuple[Advisory, ...] = ()
    min_tcb_evaluation_number: U32 = 0
    min_tcb_date: date | None = Field(default=None, strict=False)  # None: no baseline
    out_of_date_grace_days: Annotated[int, Field(ge=0, le=366)] = 0  # after the newer level's date
    require_sept_ve_disable: bool = True
    mrservicetd: tuple[Hex48, ...] = ("00" * 48,)  # the default means: no service TD
    mrseam: tuple[Hex48, ...] | None = None  # None: not checked beyond Intel's module identity
    mrconfigid: Hex48 | None = None
    mrowner: Hex48 | None = None
    mrownerconfig: Hex48 | None = None
    rtmr0: tuple[Hex48, ...] | None = None
    rtmr1: tuple[Hex48, ...] | None = None
    rtmr2: tuple[Hex48, ...] | None = None
    rtmr3: tuple[Hex48, ...] | None = None
    td_attributes: Bits = Bits()
    xfam: Bits = Bits()
    allow_dynamic_platform: bool | None = None  # PCK configuration; None: not checked
    allow_cached_keys: bool | None = None
    allow_smt: bool | None = None


class TeePolicy(_Strict):
    """The whole policy for evidence of either platform."""

    platforms: tuple[Platform, ...] = ("snp", "tdx")
    allow_emulated: bool = False  # True: a software-emulated TEE passes, always labelled so
    allow_debug: bool = False  # has effect in the emulated tier only: hardware debug guests are always refused
    vmpl: tuple[Annotated[int, Field(ge=0, le=3)], ...] = (0,)
    snp: SnpPolicy = SnpPolicy()
    tdx: TdxPolicy = TdxPolicy()

    @classmethod
    def parse(cls, raw: bytes) -> TeePolicy:
        """The policy in JSON; MalformedError `tee.policy.malformed` for anything else."""
        exact_json.loads(raw, id="tee.policy.malformed", max_bytes=MAX_POLICY_BYTES, what="the TEE policy")
        try:
            return cls.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise MalformedError(
                f"not a TEE policy: {where}: {first['msg']}",
                id="tee.policy.malformed",
                hint="docs/spec/trust.md lists every key and what unset means",
            ) from None
