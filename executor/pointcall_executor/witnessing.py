"""Asking witnesses to sign a checkpoint of this node's log, and putting their signatures under it.

A witness that is away costs nothing but its signature: recovery never waits for one. One that reports another size or
refuses as inconsistent is an alarm: the log or the witness was rolled back. Spec: docs/spec/log.md section 5.
"""

from __future__ import annotations

import http.client
import re
import urllib.parse
from dataclasses import dataclass
from typing import Final, Literal

from pointcall_attest.errors import MalformedError
from pointcall_attest.log import checkpoint as checkpoints
from pointcall_attest.log.checkpoint import MAX_CHECKPOINT_BYTES, Checkpoint, Verifier
from pointcall_attest.log.tree import Tree
from pointcall_attest.log.witness import Request, WitnessPolicy

TIMEOUT_S: Final = 30.0  # a link with 2 s latency sends again only after 12 s
_SIZE: Final = re.compile(rb"(0|[1-9][0-9]{0,18})\n?")


@dataclass(frozen=True, slots=True)
class Asked:
    """What one witness answered. `alarm`: it has seen a log that this one is not a growth of."""

    witness: str
    outcome: Literal["signed", "away", "refused", "alarm"]
    detail: str = ""


def cosigned(
    note: Checkpoint, tree: Tree, policy: WitnessPolicy, known: dict[str, int]
) -> tuple[Checkpoint, tuple[Asked, ...]]:
    """The checkpoint with the signatures of all witnesses of the policy that could be reached.

    `tree` holds at least the checkpoint's leaves. `known` is how far each witness was last time; it is updated, and may
    be empty: a witness says how far it is.
    """
    answers = []
    for name, (key, address) in policy.witnesses.items():
        if address is not None:
            line, asked = _ask(name, key, address, note, tree, known)
            note = note.with_lines(line) if line else note
            answers.append(asked)
    return note, tuple(answers)


def _ask(
    name: str, key: Verifier, address: str, note: Checkpoint, tree: Tree, known: dict[str, int]
) -> tuple[str, Asked]:
    """Ask once, and once more from the size that the witness names."""
    old = known.get(name, 0)
    for _ in range(2):
        if old > note.size:
            return "", Asked(name, "alarm", f"it has seen {old} entries, this log has {note.size}")
        request = Request(old, tuple(tree.consistency(old, note.size)), note)
        try:
            status, body = _post(address, request.encode())
        except (OSError, http.client.HTTPException) as error:
            return "", Asked(name, "away", str(error)[:200])
        if status == 200:
            known[name] = note.size
            return _signature(name, key, body, note)
        size = _SIZE.fullmatch(body)
        if status != 409 or size is None:
            return "", Asked(name, "alarm" if status == 422 else "refused", f"status {status}")
        old = int(size[1])
        if old <= note.size:
            known[name] = old  # also if the next request is lost
    return "", Asked(name, "refused", "it changes its size while it is asked")


def _signature(name: str, key: Verifier, body: bytes, note: Checkpoint) -> tuple[str, Asked]:
    try:
        line = body.decode()
        signed = note.with_lines(line)
    except (UnicodeDecodeError, MalformedError) as error:
        return "", Asked(name, "refused", str(error)[:200])
    if len(signed.signatures) != len(note.signatures) + 1 or checkpoints.cosigned_at(signed, key) is None:
        return "", Asked(name, "refused", "its answer is no signature of its key")
    return line, Asked(name, "signed")


def _post(address: str, body: bytes) -> tuple[int, bytes]:
    url = urllib.parse.urlsplit(address)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.hostname or "", url.port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", f"{url.path.rstrip('/')}/add-checkpoint", body)
        answer = connection.getresponse()
        return answer.status, answer.read(MAX_CHECKPOINT_BYTES)
    finally:
        connection.close()
