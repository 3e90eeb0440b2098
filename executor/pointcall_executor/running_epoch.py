"""The running epoch: whose keys sign, on which evidence, under which trust, for which manifest; and for how long.

What one is made of, and its first entry: epoch.py. Not here: when the next one takes over (daemon.py).
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from pointcall_attest.admission import Admitted, Candidate
from pointcall_attest.binding import report_data
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.receipt import Engine, Signer
from pointcall_executor import wasm
from pointcall_executor.arming import names_of
from pointcall_executor.config import Config
from pointcall_executor.epoch import LIVES, NOTHING, Attested, Trust, attest, opening
from pointcall_executor.recorder import Recorder
from pointcall_executor.run import Epoch
from pointcall_executor.tee.platform import Platform

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
WITHOUT_BLOB: Final = ("timer", "action", "approval")  # what starts a run besides sensors
MINUTE_NS: Final = 60_000_000_000


@dataclass(frozen=True, slots=True)
class _Now:
    """Replaced whole: who asks from another thread gets one epoch, not parts of two."""

    attested: Attested
    trust: Trust
    admitted: Admitted | None


class RunningEpoch:
    """One after the other, from `open` on. `config` gives the settings of now. Times are CLOCK_MONOTONIC ns."""

    def __init__(self, platform: Platform, recorder: Recorder, origin: str, config: Callable[[], Config]) -> None:
        self._platform, self._recorder, self._origin, self._config = platform, recorder, origin, config
        self._engine = Engine(
            name="wasmtime", version=str(wasm.engine_settings()["wasmtime"]), config=wasm.engine_digest()
        )
        self.boot_id = BOOT_ID.read_text().strip() if BOOT_ID.exists() else "unknown"
        self._now: _Now
        self.receipts: Epoch | None = None  # what every receipt of it says alike, where something is armed
        self.numbers = itertools.count()  # of its runs
        self.opened_ns = 0
        self.due_ns = 0  # when the next one is

    @property
    def attested(self) -> Attested:
        """Its keys with their evidence, and what that is worth."""
        return self._now.attested

    @property
    def life_ns(self) -> int:
        """How long one lasts."""
        return self._config().epoch_minutes * MINUTE_NS

    @property
    def evidence_until_ns(self) -> int:
        """Until when what is armed stays armed where no fresh evidence can be had."""
        return self.opened_ns + LIVES * self.life_ns

    def attest(self, admitted: Candidate | Admitted | None, trust: Trust, at: datetime) -> Attested:
        """Keys and evidence for the next epoch. PlatformError or OSError where the platform gives none."""
        manifest = admitted.manifest if admitted else None
        return attest(self._platform, trust, manifest, nonce=os.urandom(32), at=at)

    def open(
        self, attested: Attested, trust: Trust, admitted: Admitted | None, signatures: tuple[bytes, ...], reason: str
    ) -> None:
        """New keys from now on. Only while no run is in flight."""
        manifest, journal = admitted.manifest if admitted else None, self._recorder.journal
        stored = tuple(journal.put_blob(b) for b in signatures)
        for content in (attested.evidence.encode(), trust.policy.raw, trust.trusted_root):
            journal.put_blob(content)

        def leaf(previous: str | None) -> bytes:
            return opening(
                attested, trust, manifest, stored,
                node=self._config().node, origin=self._origin, engine=self._engine,
                previous=previous, at=datetime.now(UTC), ktime_ns=time.monotonic_ns(),
            )  # fmt: skip

        self._recorder.roll(attested.keys, leaf, reason)
        self._now, self.receipts = _Now(attested, trust, admitted), self._said_alike(attested, admitted)
        self.numbers = itertools.count()
        self.opened_ns = time.monotonic_ns()
        self.due_ns = self.opened_ns + self.life_ns

    def fresh_evidence(self, nonce: bytes) -> tuple[EvidenceBundle, Attested, Trust, Admitted | None]:
        """Evidence over the caller's nonce (32 bytes), and what it binds: the epoch, its trust, its manifest."""
        now = self._now
        digest = bytes.fromhex(now.admitted.manifest.sha256 if now.admitted else NOTHING)
        bound = report_data(digest, bytes.fromhex(now.trust.policy.sha256), now.attested.keys.spki, nonce)
        return self._platform.evidence(bound), now.attested, now.trust, now.admitted

    def _said_alike(self, attested: Attested, admitted: Admitted | None) -> Epoch | None:
        if admitted is None:
            return None
        manifest = admitted.manifest
        return Epoch(
            node=self._config().node,
            key=attested.keys.id,
            manifest=manifest.sha256,
            signers=tuple(Signer(issuer=s.issuer, identity=s.identity) for s in admitted.signed.signers),
            tier=attested.verdict.tier,
            platform=attested.evidence.platform,
            evidence=attested.evidence.sha256,
            engine=self._engine,
            blobs={**manifest.sensor_blobs, **dict.fromkeys(WITHOUT_BLOB, NOTHING)},
            boot_id=self.boot_id,
            names=names_of(manifest),
        )
