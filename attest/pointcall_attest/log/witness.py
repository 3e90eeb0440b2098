"""What a witness does: it signs a checkpoint only if it is a growth of the last one that it signed. Pure.

The rules and status codes are those of C2SP tlog-witness `add-checkpoint`; the caller keeps the state durably, in one
step with the answer, before it answers. Also the policy of who must have signed: C2SP tlog-policy.
Not here: HTTP and storage (executor). Spec: C2SP tlog-witness, -cosignature, -policy; docs/spec/log.md section 5.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pointcall_attest.errors import MalformedError, VerifyError
from pointcall_attest.log import checkpoint as checkpoints
from pointcall_attest.log.checkpoint import LOG, MAX_CHECKPOINT_BYTES, WITNESS_KINDS, Checkpoint, Verifier
from pointcall_attest.log.tree import EMPTY_ROOT, MAX_PROOF, verify_consistency

MAX_REQUEST_BYTES: Final = MAX_CHECKPOINT_BYTES + 32 + 45 * MAX_PROOF
MAX_POLICY_BYTES: Final = 64 * 1024
_REQUEST = re.compile(rb"old (0|[1-9][0-9]{0,18})\n((?:[A-Za-z0-9+/]{43}=\n){0,63})\n(.*)", re.DOTALL)
_QUORUM_WORDS: Final = ("any", "all")


@dataclass(frozen=True, slots=True)
class Seen:
    """The largest tree of a log that a witness has signed."""

    size: int = 0
    root: bytes = EMPTY_ROOT


class WitnessRefusal(VerifyError):
    """The witness does not sign. `status` is the HTTP status of the specification, `body` what goes with it."""

    id = "witness.refused"

    def __init__(self, status: int, why: str, *, body: str = "", want: str = "", got: str = "") -> None:
        super().__init__(f"the witness refuses: {why}", id=f"witness.{_NAMES[status]}", want=want, got=got)
        self.status, self.body = status, body


_NAMES: Final[Mapping[int, str]] = {
    400: "malformed",
    403: "unsigned",
    404: "unknown_log",
    409: "conflict",
    422: "inconsistent",
}


@dataclass(frozen=True, slots=True)
class Request:
    """A well-formed add-checkpoint request."""

    old: int
    proof: tuple[bytes, ...]
    checkpoint: Checkpoint

    def encode(self) -> bytes:
        hashes = "".join(base64.b64encode(h).decode() + "\n" for h in self.proof)
        return f"old {self.old}\n{hashes}\n".encode() + self.checkpoint.text

    @classmethod
    def parse(cls, raw: bytes) -> Request:
        """WitnessRefusal 400 for anything else."""
        found = _REQUEST.fullmatch(raw) if len(raw) <= MAX_REQUEST_BYTES else None
        if found is None:
            raise WitnessRefusal(400, "not an add-checkpoint request")
        try:
            proof = tuple(base64.b64decode(line, validate=True) for line in found[2].split())
            request = cls(int(found[1]), proof, Checkpoint.parse(found[3]))
        except (MalformedError, ValueError) as error:
            raise WitnessRefusal(400, "not a checkpoint", got=str(error)[:80]) from None
        if request.encode() != raw:
            raise WitnessRefusal(400, "another form of the request")
        return request


def judge(request: Request, seen: Seen, keys: Sequence[Verifier]) -> Seen:
    """The state after signing this request. WitnessRefusal where it must not be signed.

    `seen` is the state for the checkpoint's origin, `keys` the log's keys: none for a log that is unknown.
    """
    note = request.checkpoint
    if not keys:
        raise WitnessRefusal(404, "the log is unknown", got=note.origin)
    if not any(_signed(note, key) for key in keys):
        raise WitnessRefusal(403, "no signature of a known key of the log", got=note.origin)
    if request.old > note.size:
        raise WitnessRefusal(
            400, "the old size is above that of the checkpoint", want=str(note.size), got=str(request.old)
        )
    if request.old != seen.size:
        want = str(seen.size)
        raise WitnessRefusal(409, "another size was signed last", body=f"{want}\n", want=want, got=str(request.old))
    if not verify_consistency(seen.size, note.size, seen.root, note.root, request.proof) or _false_empty(note):
        raise WitnessRefusal(422, "the log is not a growth of what was signed", want=str(seen.size), got=str(note.size))
    return Seen(note.size, note.root)


@dataclass(frozen=True, slots=True)
class Group:
    """At least `least` of these must have signed. A member is a witness's name or a group's."""

    least: int
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WitnessPolicy:
    """Whose cosignatures make a checkpoint believable. Not met by any checkpoint while `quorum` names nobody."""

    logs: tuple[Verifier, ...]
    witnesses: Mapping[str, tuple[Verifier, str | None]]  # name in the policy -> key and address
    groups: Mapping[str, Group]
    quorum: str | None  # None: the policy says `quorum none`

    @classmethod
    def parse(cls, raw: bytes) -> WitnessPolicy:
        """A C2SP tlog-policy file. MalformedError `witness.policy` names the line."""
        if len(raw) > MAX_POLICY_BYTES:
            raise _policy(0, "too long")
        made = _Policy()
        try:
            lines = raw.decode().split("\n")
        except UnicodeDecodeError:
            raise _policy(0, "not UTF-8") from None
        for number, line in enumerate(lines, 1):
            words = [] if line.startswith("#") else line.split()
            if words:
                made.line(number, words)
        if made.quorum == "":
            raise _policy(len(lines), "no quorum line")
        return cls(tuple(made.logs), made.witnesses, made.groups, made.quorum)

    def met_by(self, note: Checkpoint) -> bool:
        """Whether enough witnesses signed this checkpoint."""
        return self.quorum is None or self._holds(self.quorum, note)

    def signers(self, note: Checkpoint) -> dict[str, int]:
        """Which witnesses signed it, and when (Unix seconds)."""
        times = {name: checkpoints.cosigned_at(note, key) for name, (key, _) in self.witnesses.items()}
        return {name: at for name, at in times.items() if at is not None}

    def _holds(self, name: str, note: Checkpoint) -> bool:
        if name in self.witnesses:
            return checkpoints.cosigned_at(note, self.witnesses[name][0]) is not None
        group = self.groups[name]
        return sum(self._holds(member, note) for member in group.members) >= group.least


class _Policy:
    """A policy while its lines are read; a name must be defined before it is used, so there are no cycles."""

    def __init__(self) -> None:
        self.logs: list[Verifier] = []
        self.witnesses: dict[str, tuple[Verifier, str | None]] = {}
        self.groups: dict[str, Group] = {}
        self.quorum: str | None = ""

    def line(self, number: int, words: list[str]) -> None:
        match words:
            case ["log", key] | ["log", key, _]:
                self.logs.append(_key(number, key, (LOG,)))
            case ["witness", name, key, *address] if len(address) <= 1 and self._new(name):
                self.witnesses[name] = (_key(number, key, WITNESS_KINDS), address[0] if address else None)
            case ["group", name, least, *members] if members and self._new(name):
                self.groups[name] = self._group(number, least, members)
            case ["quorum", "none"] if self.quorum == "":
                self.quorum = None
            case ["quorum", name] if self.quorum == "" and not self._new(name):
                self.quorum = name
            case _:
                raise _policy(number, " ".join(words)[:80])

    def _new(self, name: str) -> bool:
        return name not in self.witnesses and name not in self.groups and name not in ("none", *_QUORUM_WORDS)

    def _group(self, number: int, least: str, members: list[str]) -> Group:
        known = [m for m in members if m in self.witnesses or m in self.groups]
        count = {"any": "1", "all": str(len(members))}.get(least, least)
        good = count.isascii() and count.isdecimal() and len(count) < 4
        if known != members or len(set(members)) != len(members) or not good or not 1 <= int(count) <= len(members):
            raise _policy(number, f"group of {least} of {len(members)}")
        return Group(int(count), tuple(members))


def _signed(note: Checkpoint, key: Verifier) -> bool:
    try:
        checkpoints.verify(note, key)
    except VerifyError:
        return False
    return True


def _false_empty(note: Checkpoint) -> bool:
    return note.size == 0 and note.root != EMPTY_ROOT


def _key(number: int, text: str, kinds: tuple[bytes, ...]) -> Verifier:
    try:
        key = Verifier.parse(text)
    except MalformedError:
        raise _policy(number, text[:80]) from None
    if key.kind not in kinds:
        raise _policy(number, "a key of the other kind")
    return key


def _policy(number: int, got: str) -> MalformedError:
    return MalformedError(f"line {number} of the witness policy", id="witness.policy", want="C2SP tlog-policy", got=got)
