"""Checking a pack: from the receipt down to the root key, every check named. Offline, pure; trust and time are values.

 (1) form        every entry and proof is well-formed, and nothing in the pack is not covered
 (2) keys        every epoch key is bound by evidence that the verifier's own policy accepts
 (3) signatures  every entry is signed by the key of its epoch
 (4) receipt     its digest, epoch, runbook, module, trigger and grants are those of the signed manifest
 (5) run         its intents and outcomes say what the receipt says
 (6) log         every entry is in the tree of a checkpoint that an epoch key signed
 (7) replay      the module decides the same again

The caller's trust decides, never the pack's: whose policy, which trusted root, which emulated roots.
Spec: docs/spec/pack.md section 3.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from pointcall_attest import dsse
from pointcall_attest.appraise import appraise_bundle
from pointcall_attest.binding import report_data
from pointcall_attest.entry import Entry, EpochOpen, Intent, OutcomeBody, parse_entry
from pointcall_attest.errors import AttestError, MalformedError
from pointcall_attest.evidence import EvidenceBundle
from pointcall_attest.log import checkpoint as checkpoints
from pointcall_attest.log.checkpoint import Checkpoint, Verifier
from pointcall_attest.log.proof import Consistency, Proof
from pointcall_attest.log.witness import WitnessPolicy
from pointcall_attest.manifest import Manifest
from pointcall_attest.pack import NOTHING, Pack, content_of, erase_of, opening_of, signer_of
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.receipt import Acted, Receipt, subject_digest
from pointcall_attest.replay import interpreter, replay
from pointcall_attest.sealing import HIDDEN, Opening
from pointcall_attest.signature import SignedStatement, verify_bundles
from pointcall_attest.trust import Roots
from pointcall_attest.verdict import Check, Verdict
from pointcall_runbook.errors import PointcallError

SPEC: Final = "docs/spec/pack.md"
INTERNAL_SENSORS: Final = ("timer", "action")  # events that the executor makes itself: no blob saw them


@dataclass(frozen=True, slots=True)
class Trust:
    """What the verifier believes: the bytes of a trust policy and a trusted root, and the emulated roots."""

    policy: bytes
    trusted_root: bytes
    roots: Roots


@dataclass(frozen=True, slots=True)
class _Opened:
    """A pack with every part parsed. Still nothing is authentic."""

    pack: Pack
    entries: Mapping[int, Entry]
    proofs: Mapping[int, Proof]
    checkpoint: Checkpoint
    consistency: Consistency | None
    entry: Entry  # the receipt
    receipt: Receipt
    openings: Mapping[str, Entry]  # by epoch

    @property
    def opening(self) -> EpochOpen:
        """The epoch of the receipt."""
        return opening_of(self.openings[self.entry.epoch])


def verify_pack(
    pack: Pack,
    *,
    trust: Trust,
    at: datetime | None = None,
    in_process: bool = False,
    witnesses: WitnessPolicy | None = None,
    since: Checkpoint | None = None,
) -> Verdict:
    """Every check on a pack; never raises for what is in it.

    `at` judges certificates, expiry and signatures; by default it is the time that the receipt's epoch states for its
    opening. `in_process` verifies Sigstore bundles in this process instead of a short-lived child. `witnesses` says
    whose cosignatures are asked for, `since` is a checkpoint that was seen before: without them these two checks are
    listed as not made. MalformedError only for the caller's own trust policy.
    """
    policy = TrustPolicy.parse(trust.policy)
    try:
        opened = _open(pack)
    except MalformedError as error:
        return Verdict((_failed("pack.entries", error),))
    moment = at or opened.openings[opened.entry.epoch].at
    evidence = _evidence(opened, opened.opening, policy, trust.roots, moment)
    signed, manifest_checks = _manifest(opened, policy, trust, moment, in_process=in_process)
    rest = (
        *_form(opened),  # (1)
        *_keys(opened, evidence, policy, trust.roots, moment),  # (2)
        *_signatures(opened),  # (3)
        *manifest_checks,
        *_receipt(opened, signed, policy, moment),  # (4)
        *_run(opened),  # (5)
        *_log(opened, witnesses, since),  # (6)
        _replay(opened),  # (7)
    )
    return Verdict((*rest, *evidence.checks), evidence.tier, evidence.platform, evidence.claims)


def own_trust(pack: Pack) -> Trust:
    """The trust that the pack itself brings. It shows that the parts agree, never who made them.

    MalformedError `pack.entries` where the epoch's policy or trusted root is not in the pack.
    """
    opening = _open(pack).opening
    policy, root = (pack.blobs.get(sha256) for sha256 in (opening.policy, opening.trusted_root))
    if policy is None or root is None:
        raise MalformedError("the pack lacks the trust of its epoch", id="pack.entries", want="policy and trusted root")
    return Trust(policy, root, Roots.of(pack.emulated))


def evidence_of(pack: Pack) -> bytes:
    """The bundle that binds the key of the run's epoch. MalformedError `pack.entries` where the pack lacks it."""
    found = pack.blobs.get(_open(pack).opening.evidence)
    if found is None:
        raise MalformedError("the pack lacks its evidence", id="pack.entries", want="the evidence of its epoch")
    return found


def _open(pack: Pack) -> _Opened:
    texts = {index: Opening.parse(raw) for index, raw in pack.openings.items()}
    entries = {index: parse_entry(index, raw, texts.get(index)) for index, raw in sorted(pack.entries.items())}
    proofs = {index: Proof.parse(raw) for index, raw in sorted(pack.proofs.items())}
    openings = {e.epoch: e for e in entries.values() if e.kind == "epoch-open"}
    receipts = [e for e in entries.values() if e.kind == "receipt"]
    if len(receipts) != 1 or receipts[0].epoch not in openings:
        raise MalformedError(
            "a pack proves one run",
            id="pack.entries",
            want="one receipt and the opening of its epoch",
            got=f"{len(receipts)} receipts, {len(openings)} openings",
        )
    return _Opened(
        pack,
        entries,
        proofs,
        Checkpoint.parse(pack.checkpoint),
        None if pack.consistency is None else Consistency.parse(pack.consistency),
        receipts[0],
        receipts[0].receipt(),
        openings,
    )


# ---- (1) form


def _form(opened: _Opened) -> Iterator[Check]:
    receipt, entries = opened.receipt, opened.entries
    yield _check("pack.run", receipt.run.id == opened.pack.run, want=opened.pack.run, got=receipt.run.id)
    strangers = [
        f"entry {e.index} ({e.kind})"
        for e in entries.values()
        if e.run != receipt.run.id
        and not (e.kind == "epoch-open" and _needed(opened, e))
        and not (e.kind == "erase" and any(erase_of(e).covers(c) for c in entries.values() if c.closed))
    ]
    yield _none("pack.members", strangers, "only entries of the run, what erased parts of them, and their epochs")
    yield _check("pack.proofs", opened.proofs.keys() == entries.keys(), want=_list(entries), got=_list(opened.proofs))
    wanted = {
        sha256
        for o in opened.openings.values()
        for sha256 in content_of(opening_of(o), whole=o.epoch == opened.entry.epoch)
    } | {receipt.runbook.module}
    have = opened.pack.blobs.keys()
    missing = [f"missing {d}" for d in sorted(wanted - have)] + [f"unexpected {d}" for d in sorted(have - wanted)]
    yield _none("pack.content", missing, f"the {len(wanted)} files that signed entries name")
    broken = [f"entry {e.index}" for e in entries.values() if e.kind != "receipt" and not e.subject_holds]
    yield _none("entry.subject", broken, "subject digests of the bodies")
    yield from _openings(opened)


def _openings(opened: _Opened) -> Iterator[Check]:
    """Every sealed entry is opened, or an entry of the log says that its text was erased."""
    closed = [e for e in opened.entries.values() if e.closed]
    erased = {e.index: _eraser(opened, e) for e in closed}
    missing = [f"entry {index}" for index, by in erased.items() if by is None]
    yield _none("entry.opening", missing, "what opens each sealed entry, or the entry that erased it")
    told = [f"entry {e.index} ({e.kind}) by entry {erased[e.index]}" for e in closed if erased[e.index] is not None]
    if told:
        parts = "addresses, inputs, arguments and texts were erased"
        yield Check.skipped("entry.erased", f"{parts}: {', '.join(told)}"[:400], spec=SPEC)


def _eraser(opened: _Opened, closed: Entry) -> int | None:
    return next((e.index for e in _of(opened, "erase") if erase_of(e).covers(closed)), None)


def _needed(opened: _Opened, opening: Entry) -> bool:
    if opened.openings[opening.epoch] is not opening:
        return False  # an epoch opens once
    signed = {e.epoch for e in opened.entries.values() if e.kind != "epoch-open"}
    return opening.epoch in signed or _signs_checkpoint(opened, opening)


def _signs_checkpoint(opened: _Opened, opening: Entry) -> bool:
    try:
        checkpoints.verify(opened.checkpoint, signer_of(opening_of(opening)))
    except AttestError:
        return False
    return True


# ---- (2) keys


def _keys(opened: _Opened, evidence: Verdict, policy: TrustPolicy, roots: Roots, at: datetime) -> Iterator[Check]:
    wrong = [f"entry {o.index}" for o in opened.openings.values() if _spki(opening_of(o), o.epoch) is None]
    yield _none("epoch.key", wrong, "openings that carry the key of their epoch")
    yield _check(
        "epoch.tier",
        evidence.tier == opened.opening.tier and evidence.platform == opened.opening.platform,
        want=f"{opened.opening.tier} {opened.opening.platform}, as the epoch states",
        got=f"{evidence.tier} {evidence.platform}, as verified",
    )
    yield _check(
        "epoch.evidence",
        evidence.passed,
        want="evidence that binds key, manifest, policy and nonce",
        got=", ".join(c.id for c in evidence.failed) or evidence.tier,
    )
    for other in opened.openings.values():
        if other.epoch != opened.entry.epoch:
            verdict = _evidence(opened, opening_of(other), policy, roots, at, measured=False)
            bad = [c.id for c in verdict.failed]
            yield _check(
                "epoch.other",
                not bad and verdict.passed and verdict.tier == evidence.tier,
                want=f"the same tier and good evidence for entry {other.index}",
                got=", ".join(bad) or verdict.tier,
            )


def _evidence(
    opened: _Opened, opening: EpochOpen, policy: TrustPolicy, roots: Roots, at: datetime, *, measured: bool = True
) -> Verdict:
    """The appraisal of an epoch's evidence by the verifier's policy, with REPORT_DATA computed from the entry."""
    raw, spki = opened.pack.blobs.get(opening.evidence), _spki(opening, None)
    if raw is None or spki is None:
        return Verdict((Check("epoch.evidence", "fail", "evidence and key", "missing", SPEC),))
    try:
        bundle = EvidenceBundle.parse(raw)
    except MalformedError as error:
        return Verdict((_failed("epoch.evidence", error),))
    bound = report_data(
        bytes.fromhex(opening.manifest), bytes.fromhex(opening.policy), spki, bytes.fromhex(opening.nonce)
    )
    references = _references(opened, opening, bundle.platform) if measured else None
    return appraise_bundle(bundle, policy=policy.tee, roots=roots, at=at, report_data=bound, measurements=references)


def _references(opened: _Opened, opening: EpochOpen, platform: str) -> tuple[str, ...]:
    """The measurements that the manifest allows; none where there is no manifest: then nothing is acceptable."""
    try:
        return Manifest.parse(opened.pack.blobs.get(opening.manifest, b"")).measurements(platform)
    except MalformedError:
        return ()


def _spki(opening: EpochOpen, epoch: str | None) -> bytes | None:
    """The key of an epoch, if it is one and is the key of that name."""
    try:
        spki = base64.b64decode(opening.public_key, validate=True)
        dsse.public_key(spki)
    except (MalformedError, binascii.Error):
        return None
    return spki if epoch is None or dsse.keyid_of(spki) == epoch else None


# ---- (3) signatures


def _signatures(opened: _Opened) -> Iterator[Check]:
    others = [e for e in opened.entries.values() if e is not opened.entry]
    yield _none("receipt.signature", _unsigned(opened, [opened.entry]), f"a signature of epoch {opened.entry.epoch}")
    yield _none("entry.signature", _unsigned(opened, others), f"{len(others)} entries signed by their epochs")


def _unsigned(opened: _Opened, entries: Iterable[Entry]) -> list[str]:
    keys = {e: _spki(opening_of(o), e) for e, o in opened.openings.items()}
    return [f"entry {e.index} ({e.kind})" for e in entries if not _is_signed(e, keys.get(e.epoch))]


def _is_signed(entry: Entry, spki: bytes | None) -> bool:
    if spki is None:
        return False
    try:
        dsse.verify(dsse.parse(entry.raw), dsse.public_key(spki))
    except AttestError:
        return False
    return True


# ---- (4) the receipt and the manifest


def _manifest(
    opened: _Opened, policy: TrustPolicy, trust: Trust, at: datetime, *, in_process: bool
) -> tuple[SignedStatement | None, list[Check]]:
    """The manifest of the epoch, if the verifier's policy accepts who signed it."""
    opening = opened.opening
    bundles = [opened.pack.blobs.get(sha256, b"") for sha256 in opening.bundles]
    own = "your own" if policy.sha256 == opening.policy else f"another than yours, {policy.sha256}"
    checks = [_check("epoch.armed", opening.manifest != NOTHING, want="an armed epoch", got=f"its policy is {own}")]
    try:
        signed = verify_bundles(bundles, trusted_root=trust.trusted_root, policy=policy, at=at, in_process=in_process)
    except AttestError as error:
        return None, [*checks, _failed("epoch.manifest", error)]
    same = signed.payload == opened.pack.blobs.get(opening.manifest)
    who = ", ".join(s.identity for s in signed.signers)
    return signed, [
        *checks,
        _check("epoch.manifest", same, want=opening.manifest, got=who if same else "another payload"),
    ]


def _receipt(opened: _Opened, signed: SignedStatement | None, policy: TrustPolicy, at: datetime) -> Iterator[Check]:
    receipt, opening = opened.receipt, opened.opening
    yield _check(
        "receipt.subject", opened.entry.subject_holds, want=opened.entry.subject, got=subject_digest(opened.entry.leaf)
    )
    yield _same(
        "receipt.epoch",
        {
            "node": (opening.node, receipt.run.node),
            "manifest": (opening.manifest, receipt.runbook.manifest),
            "evidence": (opening.evidence, receipt.attestation.evidence),
            "platform": (opening.platform, receipt.attestation.platform),
            "tier": (opening.tier, receipt.attestation.tier),
        },
    )
    signers = [(s.issuer, s.identity) for s in signed.signers] if signed else None
    named = [(s.issuer, s.identity) for s in receipt.runbook.signers]
    if opened.entry.closed:
        yield Check.skipped(
            "receipt.signers", "the names were erased; the manifest's own signature is checked", spec=SPEC
        )
    else:
        yield _check("receipt.signers", sorted(named) == signers, want=signers, got=sorted(named))
    yield from _listed(opened, policy, at)


def _listed(opened: _Opened, policy: TrustPolicy, at: datetime) -> Iterator[Check]:
    """What the receipt names is what the manifest lists, and the manifest was in force."""
    receipt = opened.receipt
    try:
        manifest = Manifest.parse(opened.pack.blobs.get(opened.opening.manifest, b""))
        book = manifest.runbook(receipt.runbook.name)
    except (MalformedError, KeyError) as error:
        yield Check("manifest.lists", "fail", f"runbook {receipt.runbook.name}", str(error)[:200], SPEC)
        return
    yield _same(
        "manifest.lists",
        {
            "module": (manifest.subjects.get(book.module), receipt.runbook.module),
            "version": (str(book.version), receipt.runbook.version),
            "mode": (book.mode, receipt.run.mode),
        },
    )
    life = manifest.predicate
    yield _check(
        "manifest.dates", life.not_before <= at <= life.expires, want=f"{life.not_before} to {life.expires}", got=at
    )
    revoked = {manifest.sha256, *manifest.subjects.values()} & {*policy.revoked}
    yield _none("manifest.revoked", sorted(revoked), "nothing that your policy revokes")
    event = receipt.trigger.event
    sensed = (
        NOTHING if receipt.trigger.sensor in INTERNAL_SENSORS else manifest.sensor_blobs.get(receipt.trigger.sensor)
    )
    own = event in ("ActionDone", "Timer")
    yield _same(
        "receipt.trigger",
        {
            "event": (True, event in book.events or own),
            "handler": (f"decide_{event}", receipt.inputs.handler),
            "blob": (sensed, receipt.trigger.blob),
        },
    )
    allowed = set(book.grants.actions)
    beyond = [a.action for a in receipt.actions if a.guard.outcome == "permit" and a.action not in allowed]
    yield _none("receipt.grants", beyond, f"actions within {', '.join(sorted(allowed))}")


# ---- (5) the run


def _run(opened: _Opened) -> Iterator[Check]:
    receipt = opened.receipt
    calls = [(c.action, i) for i, c in enumerate(receipt.decision.calls)]
    acted = [(a.action, a.index) for a in receipt.actions]
    yield _check("receipt.actions", acted == calls, want=_list(calls), got=_list(acted))
    wrong = [text for action in receipt.actions for text in _disagreements(opened, action)]
    named = {a.intent for a in receipt.actions}
    wrong += [f"intent {e.index} is of no action" for e in _of(opened, "intent") if e.index not in named]
    yield _none("run.entries", wrong, f"intents and outcomes of {len(receipt.actions)} actions")


def _disagreements(opened: _Opened, action: Acted) -> Iterator[str]:
    if action.intent is not None:
        found = opened.entries.get(action.intent)
        body = found.typed() if found is not None and found.kind == "intent" else None
        if not isinstance(body, Intent) or not _about(body, action):
            yield f"action {action.index} has no intent {action.intent}"
        elif found is not None and found.index > opened.entry.index:
            yield f"intent {found.index} follows the receipt"
    said = [e.typed() for e in _of(opened, "outcome")]
    told = [o for o in said if isinstance(o, OutcomeBody) and _about(o, action)]
    if told and not any(o.outcome == action.outcome for o in told):
        yield f"action {action.index} is {action.outcome}, its outcome entry says {told[0].outcome}"
    if action.intent is not None and not told:
        yield f"action {action.index} has an intent and no outcome"


def _about(body: Intent | OutcomeBody, action: Acted) -> bool:
    """Whether it speaks of this action; a target that was erased may be any."""
    same = body.target == action.target or HIDDEN in (body.target, action.target)
    return body.action == action.action and same


def _of(opened: _Opened, kind: str) -> list[Entry]:
    return [e for e in opened.entries.values() if e.kind == kind]


# ---- (6) the log


def _log(opened: _Opened, policy: WitnessPolicy | None, since: Checkpoint | None) -> Iterator[Check]:
    note, signers = opened.checkpoint, [o for o in opened.openings.values() if _signs_checkpoint(opened, o)]
    keys = [Verifier.parse(key) for key in opened.pack.witnesses]
    cosigned = [checkpoints.signed_by(note, line, key) for line, key in zip(note.signatures[1:], keys, strict=False)]
    alone = len(note.signatures) == 1 + len(keys) and all(cosigned)
    who = f"epoch {signers[0].epoch}" if signers else "no epoch of this pack"
    yield _check(
        "log.checkpoint",
        bool(signers) and alone,
        want="signed by the checkpoint key of an epoch in this pack, and by the witnesses that it names",
        got=f"size {note.size}, signed by {who} and {sum(cosigned)} of {len(note.signatures) - 1} others",
    )
    yield _witnessed(note, policy)
    yield _grown(note, opened.consistency, since)
    outside = [
        f"entry {index}"
        for index, entry in opened.entries.items()
        if not _is_included(opened.proofs.get(index), entry, opened.checkpoint)
    ]
    yield _none("log.inclusion", outside, f"{len(opened.entries)} entries in the tree of {opened.checkpoint.size}")


def _witnessed(note: Checkpoint, policy: WitnessPolicy | None) -> Check:
    if policy is None:
        return Check.skipped("log.witnesses", "no witness policy was given", spec=SPEC)
    who = ", ".join(f"{name} at {at}" for name, at in policy.signers(note).items())
    return _check("log.witnesses", policy.met_by(note), want=f"quorum {policy.quorum}", got=who or "nobody")


def _grown(note: Checkpoint, proof: Consistency | None, since: Checkpoint | None) -> Check:
    """A proof in the pack must hold; where the verifier kept a checkpoint, it must be the one that is proven."""
    if proof is None and since is None:
        return Check.skipped("log.consistency", "no earlier checkpoint was given", spec=SPEC)
    if proof is None:
        hint = "export the pack with --since and the same checkpoint"
        return Check("log.consistency", "fail", "a proof from your checkpoint", "none in the pack", SPEC, hint)
    kept = proof if since is None else since
    same = (kept.origin, kept.size, kept.root) == (proof.origin, proof.size, proof.root)
    want = f"a growth of {kept.origin} at {kept.size}"
    return _check("log.consistency", same and proof.holds(note), want=want, got=f"{note.origin} at {note.size}")


def _is_included(proof: Proof | None, entry: Entry, checkpoint: Checkpoint) -> bool:
    if proof is None or proof.index != entry.index or proof.checkpoint.text != checkpoint.text:
        return False
    try:
        proof.verify(entry.raw)
    except AttestError:
        return False
    return True


# ---- (7) replay


def _replay(opened: _Opened) -> Check:
    if opened.entry.closed:
        return Check.skipped("receipt.replay", "the inputs were erased", spec=SPEC)
    module = opened.pack.blobs.get(opened.receipt.runbook.module)
    if module is None:
        return Check("receipt.replay", "fail", "the module", "missing", SPEC)
    try:
        again = replay(opened.receipt, interpreter(module))
    except PointcallError as error:
        return _failed("receipt.replay", error)
    got = "; ".join(map(str, again.differences)) or f"{len(opened.receipt.decision.calls)} calls, the same"
    return _check("receipt.replay", again.identical, want="the recorded decision", got=got)


# ---- rendering of checks


def _check(id: str, passed: bool, *, want: object, got: object) -> Check:
    return Check.of(id, passed, expected=str(want)[:400], observed=str(got)[:400], spec=SPEC)


def _none(id: str, wrong: list[str], want: str) -> Check:
    """Passes where nothing is wrong; `want` says what there should be."""
    return _check(id, not wrong, want=want, got="; ".join(wrong) or want)


def _same(id: str, rows: Mapping[str, tuple[object, object]]) -> Check:
    """Passes where both sides of every row are equal."""
    wrong = {name: pair for name, pair in rows.items() if pair[0] != pair[1]}
    want = ", ".join(f"{name} {pair[0]}" for name, pair in (wrong or rows).items())
    return _check(
        id, not wrong, want=want, got=", ".join(f"{name} {pair[1]}" for name, pair in (wrong or rows).items())
    )


def _failed(id: str, error: PointcallError) -> Check:
    return Check(id, "fail", error.want, f"{error.message} [{error.id}] {error.got}"[:400], SPEC, error.hint)


def _list(items: Iterable[object]) -> str:
    return ", ".join(map(str, items)) or "none"
