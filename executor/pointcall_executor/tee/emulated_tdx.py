"""The emulated TDX platform of one installation: quotes with their whole collateral. EMULATED: it protects nothing.

Keys and renewal as in emulated.py: one private file, replaced root and all when it has expired, refused beside a real
TEE. The collateral of an emulated vendor travels in the evidence bundle. Spec: docs/spec/trust.md, section Emulation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_private_key

from pointcall_attest import tdx
from pointcall_attest.emulated_tdx import EmulatedTdx, Keys
from pointcall_attest.evidence import EvidenceBundle
from pointcall_executor.durable import write_whole
from pointcall_executor.tee.emulated import BACKDATE, RENEW_BEFORE, VALIDITY, Clock, refuse_beside_hardware
from pointcall_executor.tee.measurement import executor_measurement

_KEYS: Final = ("root", "ca", "pck", "signer", "attestation")


@dataclass(frozen=True)
class EmulatedTdxPlatform:
    """Gives TDX evidence under this installation's own root."""

    machine: EmulatedTdx
    launch_digest: bytes

    @classmethod
    def open(cls, directory: Path, *, clock: Clock, system: Path = Path("/")) -> EmulatedTdxPlatform:
        """The platform whose keys lie in `directory`; made there where absent or expired.

        PlatformError `tee.emulated.beside_hardware` where a real TEE exists. `clock` gives aware UTC times.
        """
        refuse_beside_hardware(system)
        path = directory / "emulated-tdx.json"
        now = clock().astimezone(UTC).replace(microsecond=0)
        loaded = _load(path)
        if loaded is None or not loaded.machine.not_before <= now < loaded.machine.not_after - RENEW_BEFORE:
            loaded = _made(path, now)
        return loaded

    def evidence(self, report_data: bytes, version: int | None = None) -> EvidenceBundle:
        """An emulated quote that binds these 64 bytes, with its collateral: version 5 with TD 1.5, or 4 with TD 1.0."""
        assert len(report_data) == 64, "REPORT_DATA has 64 bytes"
        body_type = tdx.TD10 if version == 4 else tdx.TD15
        quote = self.machine.quote(report_data, self.launch_digest, version=version or 5, body_type=body_type)
        return self.machine.bundle(quote)

    def register(self, trust_dir: Path) -> Path:
        """Write the root into a trust folder, where Roots.open finds it."""
        path = trust_dir / "emulated" / "tdx.der"
        write_whole(path, self.root_der)
        return path

    @property
    def root_der(self) -> bytes:
        """The root to register as emulated/<name>.der in the trust folder."""
        return self.machine.root

    @property
    def measurement(self) -> str:
        """The MRTD that its evidence carries, in hex."""
        return self.launch_digest.hex()


def _made(path: Path, now: datetime) -> EmulatedTdxPlatform:
    keys = Keys(*(ec.generate_private_key(ec.SECP256R1()) for _ in _KEYS))
    machine = EmulatedTdx(keys, now - BACKDATE, now + VALIDITY)
    body = {
        "keys": [
            getattr(keys, name).private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()).hex() for name in _KEYS
        ],
        "root": machine.root.hex(),
        "not_before": machine.not_before.isoformat(),
        "not_after": machine.not_after.isoformat(),
    }
    write_whole(path, json.dumps(body).encode())
    return EmulatedTdxPlatform(machine, executor_measurement())


def _load(path: Path) -> EmulatedTdxPlatform | None:
    """The machine in a file, or None where there is none or it is not whole: it is then made anew."""
    try:
        body = json.loads(path.read_bytes())
        keys = [load_der_private_key(bytes.fromhex(text), None) for text in body["keys"]]
        dates = [datetime.fromisoformat(body[key]) for key in ("not_before", "not_after")]
        root = bytes.fromhex(body["root"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    curve = [key for key in keys if isinstance(key, ec.EllipticCurvePrivateKey)]
    machine = EmulatedTdx(Keys(*curve), dates[0], dates[1])
    machine.__dict__["root"] = root  # ECDSA signs differently each time: the root is the one that was registered
    return EmulatedTdxPlatform(machine, executor_measurement())
