"""Which roots are believed, and as what. The only module of this room that opens files.

Hardware roots are pinned here by the SHA-256 of their DER and nothing can add to them. Emulated roots are values:
they come from the trust folder of the node. The tier of evidence follows from the root that verified it and from
nothing else.
Spec: docs/spec/trust.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final

from pointcall_attest import pem
from pointcall_attest.errors import AttestError
from pointcall_attest.verdict import Tier

HARDWARE_ROOTS: Final[Mapping[str, str]] = {
    "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd": "AMD ARK-Milan",
    "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1": "AMD ARK-Genoa",
    "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a": "AMD ARK-Turin",
    "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3": "Intel SGX Root CA",
}
# AMD's intermediates as we ship them. They are believed because a root signed them; the pin keeps our copy honest.
_INTERMEDIATES: Final = frozenset(
    {
        "67d303bd3905fd38db8b20e0793699870e7fa612eaad5dec358293fd8c0bac1b",  # ASK Milan
        "c5e081f59b7efab1fe2f8b505e159704e72f29cab7ef7cf628a05a42439082f5",  # ASVK Milan
        "5464738c1546aed5f2cecf1dc98c5c960a92e8913238a61711bc90ec6e828521",  # ASK Genoa
        "197e610743a917d6b9bb982a5a9226ccc0a15b611be0619e626aca9151457372",  # ASVK Genoa
        "5b77ef5fe7a7a004fd9032668fba9d0fda22f88c4442069a479636a6ae3b3185",  # ASK Turin
        "104e10a8bd060a3c20a434261a57d0588fd65a88915b4f65b08bdecaf8df1a3c",  # ASVK Turin
    }
)
_EMULATED_FOLDER: Final = "emulated"


class RootError(AttestError):
    """A root that may not be believed as what it was given for."""

    id = "tee.root"


@dataclass(frozen=True)
class Roots:
    """Hardware roots (always the pinned ones) and the emulated roots of this installation, by SHA-256 of the DER."""

    emulated: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, emulated: Iterable[bytes] = ()) -> Roots:
        """Roots with these emulated root certificates (DER); RootError where one is a hardware root."""
        found = {hashlib.sha256(root).hexdigest(): root for root in emulated}
        for digest in found.keys() & HARDWARE_ROOTS.keys():
            raise RootError("a hardware root was given as an emulated one", got=HARDWARE_ROOTS[digest])
        return cls(found)

    @classmethod
    def open(cls, trust_dir: Path) -> Roots:
        """Roots with every `emulated/*.der` of a trust folder: who can write there can make emulated evidence."""
        return cls.of(path.read_bytes() for path in sorted((trust_dir / _EMULATED_FOLDER).glob("*.der")))

    def tier_of(self, root: bytes) -> Tier:
        """The tier that this exact root certificate (DER) stands for; `none` for an unknown one."""
        digest = hashlib.sha256(root).hexdigest()
        if digest in HARDWARE_ROOTS:
            return "hardware"
        return "emulated" if digest in self.emulated else "none"


@cache
def vendor_certificates() -> tuple[bytes, ...]:
    """The CA certificates that we ship (DER), each one matched against its pinned digest."""
    folder = resources.files("pointcall_attest") / "vendor_ca"
    found = [der for name in ("amd.pem", "intel.pem") for der in pem.certificates((folder / name).read_bytes())]
    for certificate in found:
        digest = hashlib.sha256(certificate).hexdigest()
        if digest not in HARDWARE_ROOTS and digest not in _INTERMEDIATES:
            raise RootError("a shipped CA certificate is not the pinned one", got=digest, hint="reinstall pointcall")
    return tuple(found)
