"""Epoch keys: made inside the executor, bound by its evidence, replaced, wiped, and never on any disk."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from pointcall_attest.binding import report_data
from pointcall_attest.evidence import EvidenceBundle
from pointcall_executor.recorded import RecordedNode
from pointcall_keys.node import EpochKeys
from tests.lab import Lab
from tests.scenario.test_loop_story import Watched, opened


def secrets_of(keys: EpochKeys) -> tuple[bytes, bytes]:
    """The private halves as raw bytes, while there are any."""
    receipts, checkpoints = keys._receipts, keys._checkpoints
    assert receipts is not None
    assert checkpoints is not None
    return receipts.private_numbers().private_value.to_bytes(32, "big"), checkpoints.private_bytes_raw()


def forms(secret: bytes) -> tuple[bytes, ...]:
    return secret, secret.hex().encode(), base64.b64encode(secret).rstrip(b"="), base64.urlsafe_b64encode(secret)[:40]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EpochKeys, tuple[bytes, bytes]]]:
    """Every pair of keys that the executor makes, with its secrets."""
    out: list[tuple[EpochKeys, tuple[bytes, bytes]]] = []
    real = EpochKeys.generate

    def spied() -> EpochKeys:
        keys = real()
        out.append((keys, secrets_of(keys)))
        return keys

    monkeypatch.setattr(EpochKeys, "generate", spied)
    return out


def test_the_life_of_epoch_keys(lab: Lab, made: list[tuple[EpochKeys, tuple[bytes, bytes]]]) -> None:
    before = files(lab.state)
    node = RecordedNode()
    with lab.executor(node) as executor:
        watched = Watched(lab, executor, node)
        watched.arm()
        executor.roll_epoch()
        watched.happen(opened())
        executor.checkpoint_now()
        assert [keys.wiped for keys, _ in made] == [True, True, False]
        assert executor.keys is made[-1][0]
        openings = [e.body for e in executor.journal.entries(kind="epoch-open")]
        for body, (keys, _) in zip(openings, made, strict=True):
            assert body["public_key"] == keys.public_key
            raw = executor.journal.blob(body["evidence"])
            bound = report_data(
                bytes.fromhex(body["manifest"]), bytes.fromhex(body["policy"]), keys.spki, bytes.fromhex(body["nonce"])
            )
            assert bound in EvidenceBundle.parse(raw).evidence
    assert all(keys.wiped for keys, _ in made)
    written = {path: content for path, content in files(lab.state).items() if before.get(path) != content}
    assert any(path.name.startswith("journal.db") for path in written)
    for _, secrets in made:
        for form in (form for secret in secrets for form in forms(secret)):
            assert [str(path) for path, content in written.items() if form in content] == []


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_socket()}
