"""The emulated platform of one installation: its keys on disk, its reports on demand. EMULATED: it protects nothing.

Keys are made on first use, lie in one file with mode 0600 and are replaced, root and all, when they have expired.
Trusted by whoever registers its root: who can read the folder can make emulated evidence. It refuses to work beside
a real TEE, and nothing falls back to it. Spec: docs/spec/trust.md, section Emulation.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

from pointcall_attest.certs import RSA_BITS
from pointcall_attest.emulated import TCBS, EmulatedSnp, Keys
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.tee_policy import Line
from pointcall_executor.durable import write_whole
from pointcall_executor.tee.measurement import executor_measurement
from pointcall_executor.tee.platform import PlatformError, real_tee

VALIDITY: Final = timedelta(days=7)
RENEW_BEFORE: Final = timedelta(hours=1)  # an epoch never starts on a root that is about to expire
BACKDATE: Final = timedelta(minutes=5)  # clocks of one machine's programs agree; of two machines nearly
Clock = Callable[[], datetime]


@dataclass(frozen=True)
class EmulatedPlatform:
    """Gives SNP evidence under this installation's own root."""

    machine: EmulatedSnp
    certificates: tuple[bytes, bytes, bytes]  # leaf, intermediate, root
    launch_digest: bytes

    @classmethod
    def open(
        cls, directory: Path, *, clock: Clock, product: Line = "Milan", system: Path = Path("/")
    ) -> EmulatedPlatform:
        """The platform whose keys lie in `directory`; made there where absent or expired (about half a second).

        PlatformError `tee.emulated.beside_hardware` where a real TEE exists. `clock` gives aware UTC times.
        """
        refuse_beside_hardware(system)
        path = directory / f"emulated-snp-{product.lower()}.json"
        now = clock().astimezone(UTC).replace(microsecond=0)
        loaded = _load(path, product)
        if loaded is None or not loaded.machine.not_before <= now < loaded.machine.not_after - RENEW_BEFORE:
            write_whole(path, _make(product, now))
            loaded = _load(path, product)
        assert loaded is not None, "what was written can be read"
        return loaded

    def evidence(self, report_data: bytes, version: int | None = None) -> EvidenceBundle:
        """An emulated report that binds these 64 bytes, with its chain. Version 3 or 5; None: the line's own."""
        assert len(report_data) == 64, "REPORT_DATA has 64 bytes"
        fields = {} if version is None else {"version": version}
        report = self.machine.report(report_data, self.launch_digest, secrets.token_bytes(32), **fields)
        return EvidenceBundle("snp", report, self.certificates)

    def register(self, trust_dir: Path) -> Path:
        """Write the root into a trust folder, where Roots.open finds it. From then on its evidence verifies there."""
        path = trust_dir / "emulated" / f"snp-{self.machine.line.lower()}.der"
        write_whole(path, self.root_der)
        return path

    @property
    def root_der(self) -> bytes:
        """The root to register as emulated/<name>.der in the trust folder."""
        return self.certificates[2]

    @property
    def measurement(self) -> str:
        """The launch digest that its evidence carries, in hex."""
        return self.launch_digest.hex()


def refuse_beside_hardware(system: Path) -> None:
    """PlatformError `tee.emulated.beside_hardware` where a real TEE exists: never a lesser one beside it."""
    if seen := real_tee(system):
        raise PlatformError(
            "a real TEE is present: emulation refuses to start",
            id="tee.emulated.beside_hardware",
            got=seen,
            hint="set the platform to snp or tdx",
        )


def _make(product: Line, now: datetime) -> bytes:
    """A new machine as a file: keys, certificates, chip and validity."""
    keys = Keys(
        rsa.generate_private_key(65537, RSA_BITS),
        rsa.generate_private_key(65537, RSA_BITS),
        ec.generate_private_key(ec.SECP384R1()),
    )
    chip = secrets.token_bytes(8)
    machine = EmulatedSnp(product, keys, chip, now - BACKDATE, now + VALIDITY, TCBS[product])
    body = {
        "keys": [_private(key).hex() for key in (keys.ark, keys.ca, keys.leaf)],
        "certificates": [der.hex() for der in machine.certificates],
        "chip": chip.hex(),
        "not_before": machine.not_before.isoformat(),
        "not_after": machine.not_after.isoformat(),
    }
    return json.dumps(body).encode()


def _load(path: Path, product: Line) -> EmulatedPlatform | None:
    """The machine in a file, or None where there is none or it is not whole: it is then made anew."""
    try:
        body = json.loads(path.read_bytes())
        ark, ca, leaf = (_loaded(bytes.fromhex(text)) for text in body["keys"])
        first, second, third = (bytes.fromhex(text) for text in body["certificates"])
        dates = [datetime.fromisoformat(body[key]) for key in ("not_before", "not_after")]
        chip = bytes.fromhex(body["chip"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    assert isinstance(ark, rsa.RSAPrivateKey)
    assert isinstance(ca, rsa.RSAPrivateKey)
    assert isinstance(leaf, ec.EllipticCurvePrivateKey)
    machine = EmulatedSnp(product, Keys(ark, ca, leaf), chip, dates[0], dates[1], TCBS[product])
    return EmulatedPlatform(machine, (first, second, third), executor_measurement())


def _private(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def _loaded(der: bytes) -> PrivateKeyTypes:
    """Our own key: the primality test, some 0.2 s a key, was done when it was made."""
    return load_der_private_key(der, None, unsafe_skip_rsa_key_validation=True)
