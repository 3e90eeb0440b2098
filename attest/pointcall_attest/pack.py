"""A pack: everything that proves one run, in one folder, checkable offline by somebody who has no access to the node.

It holds the entries of the run with their proofs under one checkpoint, what opens their personal parts, the openings of
the epochs whose keys signed them, and the content that these name by digest. Nothing else may lie in it, and nothing in
it is believed before `pack_check.verify_pack`. Not here: the checks (pack_check.py), the journal (executor).
Spec: docs/spec/pack.md.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, Self

from pointcall_attest import canonical
from pointcall_attest.entry import Entry, EpochOpen, Erase, Kind
from pointcall_attest.errors import AttestError, MalformedError
from pointcall_attest.log.checkpoint import LOG, Checkpoint, Verifier
from pointcall_attest.log.proof import Consistency, Proof
from pointcall_attest.run_id import is_run_id
from pointcall_attest.trust import Roots

FORMAT: Final = "pointcall-pack/v1"
NOTHING: Final = "0" * 64  # the manifest of an epoch in which nothing was armed
MAX_FILE_BYTES: Final = 4 * 1024 * 1024  # evidence with an event log is the largest, below 2 MiB
MAX_FILES: Final = 256  # a run with 8 actions has below 60
_FOLDERS: Final = ("entries", "openings", "blobs", "emulated")
_NAMES: Final = (
    re.compile(r"pack\.json"),
    re.compile(r"checkpoint"),
    re.compile(r"witnesses"),
    re.compile(r"consistency"),
    re.compile(r"openings/(?P<opening>0|[1-9][0-9]{0,18})\.json"),
    re.compile(r"entries/(?P<entry>0|[1-9][0-9]{0,18})\.json"),
    re.compile(r"entries/(?P<proof>0|[1-9][0-9]{0,18})\.tlog-proof"),
    re.compile(r"blobs/(?P<blob>[0-9a-f]{64})"),
    re.compile(r"emulated/(?P<root>[0-9a-f]{64})\.der"),
)


class PackError(AttestError):
    """A pack cannot be made."""

    id = "pack.error"


class Reader(Protocol):
    """What a journal offers: pointcall_executor.journal.JournalReader."""

    def receipt(self, run: str) -> Entry: ...
    def entries(
        self, kind: Kind | None = None, run: str | None = None, start: int = 0, limit: int = 1000
    ) -> Sequence[Entry]: ...
    def checkpoints(self) -> Sequence[Checkpoint]: ...
    def cosigned(self) -> Sequence[tuple[Checkpoint, tuple[str, ...]]]: ...
    def proof(self, index: int, checkpoint: Checkpoint) -> Proof: ...
    def consistency(self, since: Checkpoint, checkpoint: Checkpoint) -> Consistency: ...
    def blob(self, sha256: str) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Pack:
    """Well-formed: every file has a name of the format, and content-addressed files have their digest."""

    run: str
    checkpoint: bytes
    entries: Mapping[int, bytes]
    proofs: Mapping[int, bytes]
    blobs: Mapping[str, bytes]
    emulated: tuple[bytes, ...]  # root certificates (DER) of the emulated platform, for who trusts the pack itself
    openings: Mapping[int, bytes] = field(default_factory=dict)  # of sealed entries
    witnesses: tuple[str, ...] = ()  # verifier keys of who cosigned the checkpoint, in the order of their lines
    consistency: bytes | None = None  # that the checkpoint is a growth of an earlier one

    def files(self) -> dict[str, bytes]:
        """Every file of the folder by its relative name."""
        out = {"pack.json": canonical.dumps({"format": FORMAT, "run": self.run}), "checkpoint": self.checkpoint}
        out |= {f"entries/{i}.json": raw for i, raw in self.entries.items()}
        out |= {f"entries/{i}.tlog-proof": raw for i, raw in self.proofs.items()}
        out |= {f"openings/{i}.json": raw for i, raw in self.openings.items()}
        out |= {f"blobs/{sha256}": raw for sha256, raw in self.blobs.items()}
        if self.witnesses:
            out["witnesses"] = "".join(f"{key}\n" for key in self.witnesses).encode()
        if self.consistency is not None:
            out["consistency"] = self.consistency
        return out | {f"emulated/{_sha256(der)}.der": der for der in self.emulated}

    @classmethod
    def of(cls, files: Mapping[str, bytes]) -> Self:
        """MalformedError `pack.form` for an unknown or missing file, or content that has not the digest of its name."""
        entries: dict[int, bytes] = {}
        proofs: dict[int, bytes] = {}
        openings: dict[int, bytes] = {}
        blobs: dict[str, bytes] = {}
        roots: dict[str, bytes] = {}
        for name, raw in files.items():
            found = _named(name).groupdict()
            if "entry" in found:
                entries[int(found["entry"])] = raw
            elif "proof" in found:
                proofs[int(found["proof"])] = raw
            elif "opening" in found:
                openings[int(found["opening"])] = raw
            elif "blob" in found:
                blobs[_addressed(name, found["blob"], raw)] = raw
            elif "root" in found:
                roots[_addressed(name, found["root"], raw)] = raw
        if "pack.json" not in files or "checkpoint" not in files:
            raise _form("pack.json and checkpoint", "a missing file")
        if strangers := sorted(openings.keys() - entries.keys()):
            raise _form("openings of entries that are there", f"openings/{strangers[0]}.json")
        return cls(
            _run(files["pack.json"]),
            files["checkpoint"],
            entries,
            proofs,
            blobs,
            tuple(roots[r] for r in sorted(roots)),
            openings,
            _witnesses(files.get("witnesses")),
            files.get("consistency"),
        )

    def write(self, folder: Path) -> None:
        """Write the files into a new or empty folder. PackError `pack.folder` if something lies there."""
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise PackError("the folder is not empty", id="pack.folder", want="a new folder", got=str(folder))
        for name, raw in self.files().items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The pack in a folder: regular files only, within the caps. MalformedError `pack.form`."""
        return cls.of(dict(_read(folder)))


def export(reader: Reader, run: str, *, roots: Roots | None = None, since: Checkpoint | None = None) -> Pack:
    """The pack of one run. PackError `pack.checkpoint` while no checkpoint covers it yet.

    `roots`: the emulated roots of the node, so that the pack can show what it verified against. `since`: a checkpoint
    of this log that was seen before; the pack then proves growth from it. PackError `pack.consistency` where the log
    has become smaller since.
    """
    receipt = reader.receipt(run)
    of_run = list(_all(reader, run=run))
    members = [*of_run, *_erasing(reader, of_run)]
    openings = list(_all(reader, kind="epoch-open"))
    last = max(max(e.index for e in members), since.size - 1 if since else 0)
    checkpoint, witnesses = _covering(reader, last, openings, receipt.epoch, since)
    needed = {e.epoch for e in members}
    chosen = [o for o in openings if o.epoch in needed or _signs(o, checkpoint)]
    entries = {e.index: e for e in (*chosen, *members)}
    wanted = {sha256 for o in chosen for sha256 in content_of(opening_of(o), whole=o.epoch == receipt.epoch)}
    wanted.add(receipt.receipt().runbook.module)
    return Pack(
        run,
        checkpoint.text,
        {index: e.raw for index, e in entries.items()},
        {index: reader.proof(index, checkpoint).encode() for index in entries},
        {sha256: reader.blob(sha256) for sha256 in sorted(wanted)},
        tuple(roots.emulated.values()) if roots and receipt.receipt().attestation.tier == "emulated" else (),
        {index: e.opening.encode() for index, e in entries.items() if e.opening is not None},
        witnesses,
        reader.consistency(since, checkpoint).encode() if since else None,
    )


def erase_of(entry: Entry) -> Erase:
    """The body of an erase entry. AssertionError for another kind."""
    body = entry.typed()
    assert isinstance(body, Erase), f"entry {entry.index} is a {entry.kind}"
    return body


def _erasing(reader: Reader, members: Sequence[Entry]) -> Iterator[Entry]:
    """The entries that say why something of the run cannot be opened; the first one for each."""
    closed = [e for e in members if e.closed]
    for erase in _all(reader, kind="erase") if closed else ():
        covered = [e for e in closed if erase_of(erase).covers(e)]
        if covered:
            yield erase
        closed = [e for e in closed if e not in covered]


def content_of(opening: EpochOpen, *, whole: bool) -> set[str]:
    """Digests of the content that an epoch needs: its evidence; `whole` adds all that it was armed with."""
    if not whole or opening.manifest == NOTHING:
        return {opening.evidence}
    return {opening.evidence, opening.manifest, *opening.bundles, opening.policy, opening.trusted_root}


def signer_of(opening: EpochOpen) -> Verifier:
    """The checkpoint key of an epoch. MalformedError `checkpoint.key`."""
    return Verifier.parse(opening.checkpoint_key)


def opening_of(entry: Entry) -> EpochOpen:
    """The body of an epoch-open entry. AssertionError for another kind."""
    body = entry.typed()
    assert isinstance(body, EpochOpen), f"entry {entry.index} is a {entry.kind}"
    return body


def _signs(entry: Entry, checkpoint: Checkpoint) -> bool:
    key_id = signer_of(opening_of(entry)).key_id
    return any(key_id == line.key_id for line in checkpoint.signatures)


def _all(reader: Reader, *, kind: Kind | None = None, run: str | None = None) -> Iterator[Entry]:
    start = 0
    while page := reader.entries(kind, run, start=start):
        yield from page
        start = page[-1].index + 1


def _covering(
    reader: Reader, last: int, openings: Sequence[Entry], epoch: str, since: Checkpoint | None
) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint to prove under, and who cosigned it: one that witnesses signed, if there is one; of those that
    cover the run the one of its own epoch, else the smallest."""
    own = [o for o in openings if o.epoch == epoch]
    plain = [(c, ()) for c in reader.checkpoints()]
    for candidates in (list(reader.cosigned()), plain):
        covering = sorted(((c, w) for c, w in candidates if c.size > last), key=lambda row: row[0].size)
        for found in [row for row in covering if any(_signs(o, row[0]) for o in own)] + covering:
            return found
    held = max((c.size for c, _ in plain), default=0)
    if since is not None and since.size > held:
        raise PackError(
            "the log is smaller than the checkpoint that was seen before",
            id="pack.consistency",
            want=f"{since.size} entries or more",
            got=str(held),
            hint="it was rolled back, or the checkpoint is of another log",
        )
    raise PackError(
        "no checkpoint covers the run yet",
        id="pack.checkpoint",
        want=f"a checkpoint above entry {last}",
        got=str(held),
        hint="the executor signs one within a second; if it has ended, the next start signs one",
    )


def _read(folder: Path) -> Iterator[tuple[str, bytes]]:
    found = sorted(itertools.islice(folder.rglob("*"), MAX_FILES + 16))
    paths = [p for p in found if p.is_symlink() or not p.is_dir()]
    for stray in sorted({*found} - {*paths} - {folder / name for name in _FOLDERS}):
        raise _form("a folder of docs/spec/pack.md", stray.relative_to(folder).as_posix()[:80])
    for name in _FOLDERS:
        if (folder / name).is_dir() and not any(p.parent == folder / name for p in paths):
            raise _form("no empty folder", name)
    if len(paths) > MAX_FILES:
        raise _form(f"at most {MAX_FILES} files", str(len(paths)))
    for path in paths:
        name, status = path.relative_to(folder).as_posix(), path.lstat()
        _named(name)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            raise _form(f"a regular file of at most {MAX_FILE_BYTES} bytes", name)
        yield name, path.read_bytes()


def _named(name: str) -> re.Match[str]:
    for pattern in _NAMES:
        found = pattern.fullmatch(name)
        if found:
            return found
    raise _form("a file of docs/spec/pack.md", name[:80])


def _addressed(name: str, sha256: str, raw: bytes) -> str:
    if _sha256(raw) != sha256:
        raise _form(f"{name} with that digest", _sha256(raw))
    return sha256


def _run(raw: bytes) -> str:
    value = canonical.loads(raw, max_bytes=256, what="pack.json")
    run = value.get("run") if isinstance(value, dict) else None
    if not isinstance(run, str) or not is_run_id(run) or value != {"format": FORMAT, "run": run}:
        raise _form(f"format {FORMAT} and run", raw[:80].decode("latin-1"))
    return run


def _witnesses(raw: bytes | None) -> tuple[str, ...]:
    """One verifier key a line, at least one; whether they signed is checked later."""
    if raw is None:
        return ()
    lines = raw.decode("latin-1").split("\n")
    try:
        keys = [Verifier.parse(line) for line in lines[:-1]]
    except MalformedError as error:
        raise _form("one verifier key of a witness a line", error.got) from None
    if not keys or lines[-1] or any(key.kind == LOG for key in keys):
        raise _form("one verifier key of a witness a line", f"{len(keys)} keys")
    return tuple(map(str, keys))


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _form(want: str, got: str) -> MalformedError:
    return MalformedError("not a pack", id="pack.form", want=want, got=got, hint="`pointcall log export` makes one")
