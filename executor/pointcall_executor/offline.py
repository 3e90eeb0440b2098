"""Work on the log of a stopped executor: an epoch of its own with fresh evidence, in which the work is recorded.

What prunes or erases says so in a signed entry, so it needs a key that evidence binds, as the executor does. The epoch
arms nothing. While an executor runs it is the one writer, and this refuses. Spec: docs/spec/journal.md section 8.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pointcall_attest.entry import EpochOpen
from pointcall_attest.pack import opening_of
from pointcall_attest.receipt import Engine
from pointcall_executor import wasm
from pointcall_executor.beginning import platform_of
from pointcall_executor.config import Config
from pointcall_executor.daemon import load_trust
from pointcall_executor.epoch import attest, opening
from pointcall_executor.journal import Journal
from pointcall_executor.journal_reader import JournalError
from pointcall_executor.recorder import Recorder


@contextlib.contextmanager
def recording(state: Path, reason: str) -> Iterator[Recorder]:
    """A recorder for the journal in this state folder, which must exist; everything there is under a checkpoint.

    JournalError `log.busy` while an executor runs, `journal.absent`, or whatever opening it may raise;
    EnvironmentRefusal where the platform of the last epoch is not here any more. `reason` stands in the close.
    """
    path = state / "journal.db"
    if not path.is_file():
        raise JournalError(
            "there is no journal", id="journal.absent", want=str(path), hint="has the executor run here?"
        )
    with contextlib.closing(_opened(path)) as journal:
        last = _last_epoch(journal)
        recorder = Recorder(journal)
        _open_epoch(recorder, journal, state, last)
        recorder.reconcile()
        recorder.checkpoint(force=True)
        try:
            yield recorder
        finally:
            recorder.close(reason)


def _opened(path: Path) -> Journal:
    try:
        return Journal.open(path, origin=None)
    except JournalError as error:
        if error.id != "journal.busy":
            raise
        raise JournalError(
            "an executor writes this log",
            id="log.busy",
            want="a stopped executor",
            got=str(path),
            hint="a log has one writer: stop the executor, repeat this, start it; what is too old it erases itself",
        ) from error


def _last_epoch(journal: Journal) -> EpochOpen:
    found, start = None, 0
    while page := journal.entries("epoch-open", start=start):
        found, start = page[-1], page[-1].index + 1
    if found is None:
        raise JournalError("the log has no epoch yet", id="log.empty", hint="run the executor first")
    return opening_of(found)


def _open_epoch(recorder: Recorder, journal: Journal, state: Path, last: EpochOpen) -> None:
    """As the node and on the platform of the last epoch; nothing is armed."""
    tee = "emulated" if last.tier == "emulated" else {"snp": "sev-snp", "tdx": "tdx"}[last.platform]
    platform = platform_of(Config.model_validate({"node": last.node, "tee": tee}), state)
    trust = load_trust(state / "trust")
    attested = attest(platform, trust, None, nonce=os.urandom(32), at=datetime.now(UTC))
    for content in (attested.evidence.encode(), trust.policy.raw, trust.trusted_root):
        journal.put_blob(content)
    engine = Engine(name="wasmtime", version=str(wasm.engine_settings()["wasmtime"]), config=wasm.engine_digest())

    def leaf(previous: str | None) -> bytes:
        return opening(
            attested, trust, None, (), node=last.node, origin=journal.origin, engine=engine,
            previous=previous, at=datetime.now(UTC), ktime_ns=time.monotonic_ns(),
        )  # fmt: skip

    recorder.roll(attested.keys, leaf, "offline")
