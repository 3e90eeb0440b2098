"""What a report finds out by itself: manifests by digest, signatures by the reader's own policy, replays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from pointcall_attest.report import build
from pointcall_attest.report.known import Trust, known
from pointcall_attest.trust import Roots
from pointcall_keys.private_sigstore import PrivateSigstore
from pointcall_runbook import Interpreter, compile_source
from pointcall_runbook import vocabulary as v
from pointcall_runbook.errors import PointcallError
from tests.unit.report.sample_log import SampleLog, circuit_opened
from tests.unit.signing.world import ALICE, BOB, NOW, World, statement

ALWAYS = """\
from pointcall_runbook import CircuitOpened, Decision, Recreate, runbook


@runbook
def on_circuit_opened(e: CircuitOpened) -> Decision:
    return [Recreate(service=e.service, grace=0)]
"""


class Content(dict[str, bytes]):
    """A content store: SHA-256 -> bytes."""

    def add(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self[digest] = data
        return digest

    def __missing__(self, digest: str) -> bytes:
        raise PointcallError("no such content", id="journal.no_blob", got=digest)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with PrivateSigstore.start(tmp_path_factory.mktemp("sigstore"), clock=lambda: datetime.now(UTC)) as sigstore:
        yield World(sigstore)


@pytest.fixture(scope="module")
def bundle(world: World) -> bytes:
    return world.sign(statement())


def armed(content: Content, bundle: bytes, payload: bytes | None = None) -> SampleLog:
    manifest = content.add(statement() if payload is None else payload)
    log = SampleLog(start=NOW + timedelta(minutes=1), manifest=manifest, bundles=(content.add(bundle),))
    log.recover()
    return log


def trust(world: World, *signers: str) -> Trust:
    policy = world.policy(signers=[world.signer(who) for who in signers])
    return Trust(policy, world.sigstore.trusted_root(), Roots())


def test_a_manifest_is_named_and_its_signature_verified(world: World, bundle: bytes) -> None:
    content = Content()
    log = armed(content, bundle)
    made = build(
        log.log, log.checkpoint(), now=log.now, known=known(log.log, content.__getitem__, trust=trust(world, ALICE))
    )
    (row,) = made.armed
    assert (row.name, row.sequence, row.signers_verified) == ("edge", 3, True)
    assert row.signers == (f"{ALICE} ({world.sigstore.issuer})",)
    assert [(b.name, b.mode, b.actions, b.targets) for b in row.runbooks] == [
        ("restart", "enforce", ("recreate",), ("db",))
    ]
    assert row.services == ("db",)


def test_a_signer_whom_the_reader_does_not_trust_is_only_stated(world: World, bundle: bytes) -> None:
    content = Content()
    log = armed(content, bundle)
    found = known(log.log, content.__getitem__, trust=trust(world, BOB))
    assert found.signers == {}
    (row,) = build(log.log, log.checkpoint(), now=log.now, known=found).armed
    assert not row.signers_verified


def test_a_bundle_over_another_manifest_verifies_nothing(world: World, bundle: bytes) -> None:
    content = Content()
    log = armed(content, bundle, statement(sequence=8))
    assert known(log.log, content.__getitem__, trust=trust(world, ALICE)).signers == {}


def test_without_trust_or_content_nothing_is_claimed(bundle: bytes) -> None:
    content = Content()
    log = armed(content, bundle)
    assert known(log.log, content.__getitem__).signers == {}
    empty = known(log.log, Content().__getitem__)
    assert (empty.manifests, empty.signers, empty.replays) == ({}, {}, {})


@pytest.mark.parametrize(("grace", "identical"), [(0, True), (5, False)])
def test_runs_are_replayed_where_their_module_is_there(grace: int, identical: bool) -> None:
    content = Content()
    wasm = compile_source(ALWAYS).wasm
    log = SampleLog(module=content.add(wasm))
    fuel = Interpreter(wasm).run("CircuitOpened", v.slots(circuit_opened())).fuel
    made = log.recover(actions=(v.Recreate(service=v.service("db"), grace=grace),), fuel=fuel)
    assert known(log.log, content.__getitem__).replays == {made.run: identical}
