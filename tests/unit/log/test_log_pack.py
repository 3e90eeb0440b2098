"""Packs: what is true verifies; every changed bit is found; each single lie fails its own check."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest import canonical, entry
from pointcall_attest.errors import AttestError, MalformedError
from pointcall_attest.log.proof import Consistency, Proof
from pointcall_attest.pack import Pack, PackError, export
from pointcall_attest.pack_check import Trust, own_trust, verify_pack
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.receipt import Receipt
from pointcall_attest.trust import Roots
from pointcall_keys.node import EpochKeys
from tests.unit.log import world

STRIDE = 5  # every fifth byte in the normal run; 1 takes half a minute and finds the same


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """The pack of a clean run in a log with other runs before and after."""
    node = world.Node.boot(tmp_path_factory.mktemp("node"))
    node.run(0)
    run = node.run(1)
    node.run(2)
    node.checkpoint()
    made = export(node.journal, run, roots=world.trust().roots)
    node.journal.close()
    return made


def failed(pack: Pack, trust: Trust | None = None, **over: Any) -> list[str]:
    verdict = verify_pack(pack, trust=trust or world.trust(), in_process=True, **over)
    return [c.id for c in verdict.failed]


def test_a_clean_run_verifies(pack: Pack) -> None:
    verdict = verify_pack(pack, trust=world.trust(), in_process=True)
    assert [c.id for c in verdict.failed] == []
    assert verdict.passed
    assert verdict.tier == "emulated"


def test_a_pack_on_disk_reads_back(pack: Pack, tmp_path: Path) -> None:
    pack.write(tmp_path / "pack")
    again = Pack.read(tmp_path / "pack")
    assert again == pack
    assert failed(again) == []


def test_the_pack_s_own_word_shows_that_its_parts_agree(pack: Pack) -> None:
    assert failed(pack, own_trust(pack)) == []


def flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1 :]


def is_refused(files: dict[str, bytes], trust: Trust | None) -> bool:
    try:
        pack = Pack.of(files)
        verdict = verify_pack(pack, trust=trust or own_trust(pack), in_process=True)
    except AttestError:
        return True
    return not verdict.passed


@pytest.mark.parametrize("own", [False, True], ids=["verifier's trust", "own word"])
def test_every_changed_bit_is_found(pack: Pack, own: bool) -> None:
    files, trust = pack.files(), None if own else world.trust()
    for name, raw in files.items():
        for at in range(len(name) % STRIDE, len(raw), STRIDE if not own else STRIDE * 5):
            assert is_refused({**files, name: flipped(raw, at)}, trust), (name, at)


def test_every_missing_added_or_truncated_file_is_found(pack: Pack) -> None:
    files = pack.files()
    for name, raw in files.items():
        if name.startswith("emulated/"):
            continue  # the verifier's own roots count
        assert is_refused({n: r for n, r in files.items() if n != name}, world.trust()), name
        assert is_refused({**files, name: raw[:-1]}, world.trust()), name
        assert is_refused({**files, name: b""}, world.trust()), name
    more = hashlib.sha256(b"more").hexdigest()
    for name in (f"blobs/{more}", "README", "entries/99.json", "entries/x.json", "blobs/../x", "evil/" + more):
        assert is_refused({**files, name: b"more"}, world.trust()), name


def test_entries_in_each_other_s_place_are_found(pack: Pack) -> None:
    files = pack.files()
    names = [n for n in files if n.startswith("entries/") and n.endswith(".json")]
    for one, other in itertools.pairwise(names):
        assert is_refused({**files, one: files[other], other: files[one]}, world.trust())


@pytest.mark.parametrize("kind", ["symlink", "stranger", "huge", "folder", "empty", "fifo", "renamed", "linked folder"])
def test_only_regular_known_files_are_read(kind: str, pack: Pack, tmp_path: Path) -> None:
    pack.write(tmp_path / "p")
    match kind:
        case "symlink":
            (tmp_path / "p" / "checkpoint").unlink()
            (tmp_path / "p" / "checkpoint").symlink_to("/etc/hostname")
        case "stranger":
            (tmp_path / "p" / "notes.txt").write_text("x")
        case "folder":
            (tmp_path / "p" / "more").mkdir()
        case "empty":
            shutil.rmtree(tmp_path / "p" / "emulated")
            (tmp_path / "p" / "emulated").mkdir()
        case "fifo":
            (tmp_path / "p" / "witnesses").unlink(missing_ok=True)
            os.mkfifo(tmp_path / "p" / "witnesses")
        case "renamed":
            (tmp_path / "p" / "checkpoint").rename(tmp_path / "p" / "checkpoint.txt")
        case "linked folder":
            (tmp_path / "p" / "openings").rename(tmp_path / "o")
            (tmp_path / "p" / "openings").symlink_to(tmp_path / "o")
        case _:
            (tmp_path / "p" / "checkpoint").write_bytes(bytes(5 * 1024 * 1024))
    with pytest.raises(MalformedError) as error:
        Pack.read(tmp_path / "p")
    assert error.value.id == "pack.form"


def test_a_folder_that_is_used_is_not_overwritten(pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with pytest.raises(PackError) as error:
        pack.write(tmp_path)
    assert error.value.id == "pack.folder"


# ---- one lie, one check: the node itself lies here, with its own key, so that every signature and proof holds


@pytest.fixture
def node(tmp_path: Path) -> Iterator[world.Node]:
    made = world.Node.boot(tmp_path)
    yield made
    made.journal.close()


def told(node: world.Node, change: Callable[[Receipt], Receipt]) -> list[str]:
    run = node.run(0, change)
    node.checkpoint()
    return failed(export(node.journal, run))


def part(where: str, /, **over: Any) -> Callable[[Receipt], Receipt]:
    return lambda r: r.model_copy(update={where: getattr(r, where).model_copy(update=over)})


def action(**over: Any) -> Callable[[Receipt], Receipt]:
    return lambda r: r.model_copy(update={"actions": (r.actions[0].model_copy(update=over),)})


OTHER = hashlib.sha256(world.BLOB).hexdigest()
LIES: dict[str, tuple[Callable[[Receipt], Receipt], list[str]]] = {
    "nothing": (lambda r: r, []),
    "another node": (part("run", node="n2"), ["receipt.epoch"]),
    "another manifest": (part("runbook", manifest=OTHER), ["receipt.epoch"]),
    "better evidence": (part("attestation", tier="hardware"), ["receipt.epoch"]),
    "other signers": (part("runbook", signers=()), ["receipt.signers"]),
    "an unlisted runbook": (part("runbook", name="db"), ["manifest.lists"]),
    "another version": (part("runbook", version="2"), ["manifest.lists"]),
    "another mode": (part("run", mode="monitor"), ["manifest.lists"]),
    "another sensor's blob": (part("trigger", blob="0" * 64), ["receipt.trigger"]),
    "another handler": (part("inputs", handler="decide_Timer"), ["receipt.trigger", "receipt.replay"]),
    "an event not armed": (part("trigger", event="OomKilled"), ["receipt.trigger"]),
    "less fuel": (part("decision", fuel_used=1), ["receipt.replay"]),
    "another input": (part("inputs", values=(1,) * 9), ["receipt.replay"]),
    "no calls": (part("decision", calls=()), ["receipt.actions", "receipt.replay"]),
    "another action": (action(action="kill"), ["receipt.grants", "receipt.actions", "run.entries"]),
    "another target": (action(target="service/db"), ["run.entries"]),
    "another outcome": (action(outcome="failed"), ["run.entries"]),
    "an intent that is none": (action(intent=0), ["run.entries"]),
    "no intent": (action(intent=None), ["run.entries"]),
}


@pytest.mark.parametrize("what", LIES)
def test_one_lie_fails_its_check(what: str, node: world.Node) -> None:
    change, expected = LIES[what]
    assert told(node, change) == expected


def test_another_module_fails(node: world.Node) -> None:
    other = node.journal.put_blob(b"\0asm")
    assert told(node, part("runbook", module=other)) == ["manifest.lists", "receipt.replay"]


EPOCH_LIES = {
    "another nonce": ({"nonce": "0" * 64}, ["epoch.evidence", "tee.report_data"]),
    "another tier": ({"tier": "hardware"}, ["epoch.tier", "receipt.epoch"]),
    "another policy": ({"policy": OTHER}, ["epoch.evidence", "tee.report_data"]),
    "a stranger's key": ({"public_key": EpochKeys.generate().public_key}, None),
    "a stranger's checkpoint key": (
        {"checkpoint_key": str(EpochKeys.generate().verifier(world.ORIGIN))},
        None,
    ),
}


@pytest.mark.parametrize("what", EPOCH_LIES)
def test_one_lie_of_an_epoch_fails_its_check(what: str, tmp_path: Path) -> None:
    over, expected = EPOCH_LIES[what]
    node = world.Node.boot(tmp_path, over=over)
    run = node.run()
    node.checkpoint()
    got = failed(export(node.journal, run))
    node.journal.close()
    assert got == expected if expected is not None else got
    assert ("epoch.key" in got) == (what == "a stranger's key")


def test_a_verifier_s_own_policy_decides(pack: Pack) -> None:
    good = world.trust()
    raw = good.policy.replace(b'"allow_emulated": true', b'"allow_emulated": false')
    assert failed(pack, replace(good, policy=raw)) == ["epoch.evidence", "tee.emulated"]
    assert "epoch.evidence" in failed(pack, replace(good, roots=Roots()))
    stranger = world.spki(world.ec.generate_private_key(world.ec.SECP256R1()))
    other = good.policy.replace(
        world.base64.b64encode(world.spki(world.signing_key())), world.base64.b64encode(stranger)
    )
    assert failed(pack, replace(good, policy=other)) == ["epoch.manifest", "receipt.signers"]
    armed = world.manifest().sha256
    revoking = good.policy[:-1] + b', "revoked": ["%s"]}' % armed.encode()
    assert TrustPolicy.parse(revoking).revoked
    assert failed(pack, replace(good, policy=revoking)) == ["manifest.revoked"]


def test_time_decides(pack: Pack) -> None:
    assert failed(pack, at=world.NOW + timedelta(days=2)) == ["manifest.dates"]
    assert "manifest.dates" in failed(pack, at=world.NOW - timedelta(days=2))
    assert "epoch.evidence" in failed(pack, at=world.NOW + timedelta(days=30))


def test_no_pack_before_a_checkpoint_covers_the_run(node: world.Node) -> None:
    node.checkpoint()
    run = node.run()
    with pytest.raises(PackError) as error:
        export(node.journal, run)
    assert error.value.id == "pack.checkpoint"


def test_after_a_crash_the_next_epoch_s_checkpoint_proves_the_run(node: world.Node) -> None:
    run = node.run()
    following = world.Node.epoch(node.journal, previous=None)  # the node died: no close, no checkpoint
    following.checkpoint()
    pack = export(node.journal, run)
    assert failed(pack) == []
    kinds = [entry.parse_entry(i, raw).kind for i, raw in pack.entries.items()]
    assert kinds.count("epoch-open") == 2


def test_a_bad_epoch_behind_the_checkpoint_is_found(node: world.Node) -> None:
    run = node.run()
    following = world.Node.epoch(node.journal, previous=None, over={"nonce": "0" * 64})
    following.checkpoint()
    assert failed(export(node.journal, run)) == ["epoch.other"]


def test_an_unknown_signature_line_is_refused_in_a_pack(pack: Pack) -> None:
    from pointcall_attest.log import checkpoint as c

    note = c.Checkpoint.parse(pack.checkpoint)
    more = c.cosign(note, "witness.example/x", world_key(), at_s=1)
    text = note.text + more.encode()
    proofs = {i: raw.replace(pack.checkpoint, text) for i, raw in pack.proofs.items()}
    assert failed(replace(pack, checkpoint=text, proofs=proofs)) == ["log.checkpoint"]


def test_each_part_of_a_pack_has_its_check(node: world.Node) -> None:
    """Whoever makes a pack cannot take a part of another, leave one out or put one in."""
    run, strange = node.run(5), node.run(6)
    node.checkpoint()
    own, other = export(node.journal, run), export(node.journal, strange)
    receipt = max(own.entries)
    assert failed(replace(own, run=strange)) == ["pack.run"]
    some = next(iter(own.blobs))
    less, more = {k: v for k, v in own.blobs.items() if k != some}, own.blobs | {OTHER: world.BLOB, "0" * 64: b""}
    assert "pack.content" in failed(replace(own, blobs=less))
    assert failed(replace(own, blobs=more)) == ["pack.content"]
    guests = {i: raw for i, raw in other.entries.items() if i not in own.entries and i != max(other.entries)}
    with_guests = replace(
        own,
        entries=own.entries | guests,
        proofs=own.proofs | {i: other.proofs[i] for i in guests},
        openings=own.openings | {i: other.openings[i] for i in guests},
    )
    assert failed(with_guests) == ["pack.members", "run.entries"]
    assert failed(replace(own, proofs=own.proofs | {receipt: own.proofs[receipt - 1]})) == ["log.inclusion"]


def test_a_receipt_that_another_signed(node: world.Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else holds: it is in the log, and says what it should. Only its signature is a stranger's."""
    stranger = EpochKeys.generate()
    sign = EpochKeys.sign

    def forged(keys: EpochKeys, payload: bytes) -> bytes:
        return sign(stranger, payload).replace(stranger.id.encode(), keys.id.encode())

    monkeypatch.setattr(EpochKeys, "sign", forged)
    run = node.run(0)
    monkeypatch.undo()
    node.checkpoint()
    assert failed(export(node.journal, run)) == ["receipt.signature", "entry.signature"]


def test_a_subject_that_is_not_of_the_body(node: world.Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The subject is what other tools look at: signed and in the log, and of something else."""
    sign = EpochKeys.sign

    def lying(keys: EpochKeys, payload: bytes) -> bytes:
        said = canonical.loads(payload, max_bytes=1 << 20, what="the entry")
        said["subject"][0]["digest"]["sha256"] = "0" * 64
        return sign(keys, canonical.dumps(said))

    monkeypatch.setattr(EpochKeys, "sign", lying)
    run = node.run(0)
    monkeypatch.undo()
    node.checkpoint()
    assert failed(export(node.journal, run)) == ["entry.subject", "receipt.subject"]


def test_what_is_no_proof(pack: Pack) -> None:
    good = next(iter(pack.proofs.values()))
    assert Proof.parse(good).encode() == good
    earlier = Consistency(world.ORIGIN, 0, bytes(32), ())
    for parse, raw in (
        (Proof.parse, b""),
        (Proof.parse, good.replace(b"index ", b"index 0", 1)),
        (Proof.parse, good.replace(b"\n\n", b"\n!\n\n", 1)),
        (Consistency.parse, b""),
        (Consistency.parse, earlier.encode() + b"!\n"),
        (Consistency.parse, earlier.encode() + b"AAAA"),
    ):
        with pytest.raises(MalformedError) as error:
            parse(raw)
        assert error.value.id == "proof.form", raw


def test_a_run_of_an_epoch_in_which_nothing_was_armed(tmp_path: Path) -> None:
    node = world.Node.boot(tmp_path, over={"manifest": "0" * 64, "bundles": ()})
    run = node.run()
    node.checkpoint()
    got = failed(export(node.journal, run))
    node.journal.close()
    assert "epoch.armed" in got


def world_key() -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.generate()
