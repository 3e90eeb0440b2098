"""What of an entry is personal: kept out of the leaf under one salted commitment, and put back by who may read it.

A leaf names runbooks, services, actions, numbers of its epoch and times. Addresses, command lines and free text stand
beside the log: one `Opening` an entry, which is a salt and the personal parts in canonical JSON. The leaf holds its
commitment, so an opening cannot be changed; deleting it erases the text, and every proof stays valid.
Pure; not here: where openings lie (the journal, a pack). Spec: docs/spec/journal.md section 7.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Final, Self

from pointcall_attest import canonical
from pointcall_attest.commitment import commit
from pointcall_attest.errors import MalformedError
from pointcall_runbook.vocabulary import ACTIONS, Kind, fields

HIDDEN: Final = "(sealed)"  # stands where a personal text is not at hand: it was erased, or it was not given
SEALED: Final = "sealed"  # the member of a leaf that holds the commitment
MAX_OPENING_BYTES: Final = 64 * 1024  # of the personal parts; a leaf with all of them in clear has at most 48,000
_HEX: Final = re.compile(r"[0-9a-f]{64}")  # a salt, a commitment
# Members of a body that are personal whatever they say. Receipts, `target` and `grant` have rules of their own below.
_ALWAYS: Final[Mapping[str, tuple[str, ...]]] = {
    "intent": ("args",),
    "outcome": ("detail", "postcondition", "undo"),
    "refusal": ("what", "want", "got", "hint"),
    "config": ("detail",),
    "proposal": ("author",),
    "prune": ("reason",),
    "erase": ("reason",),
}
SEALED_KINDS: Final = frozenset({*_ALWAYS, "receipt"})
_CONTAINERS: Final = ("args", "detail")  # the other personal parts are texts, and `undo` may be none


@dataclass(frozen=True)
class Opening:
    """The personal parts of one entry, as they were committed to: a salt that is used once, and canonical JSON."""

    salt: bytes
    text: str

    @cached_property
    def commitment(self) -> str:
        """What the leaf holds (hex)."""
        return commit(self.text, self.salt)

    @cached_property
    def private(self) -> dict[str, Any]:
        """The personal parts, in the places where they belong. MalformedError `entry.opening`."""
        try:
            value = canonical.loads(self.text.encode(), max_bytes=MAX_OPENING_BYTES, what="the opening")
        except (MalformedError, UnicodeEncodeError) as error:
            raise _opening(str(error)) from None
        if not isinstance(value, dict):
            raise _opening(type(value).__name__)
        return value

    def encode(self) -> bytes:
        """The bytes of a file."""
        return canonical.dumps({"private": self.private, "salt": self.salt.hex()})

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """The inverse of `encode`. MalformedError `entry.opening` for anything but its one form."""
        try:
            value = canonical.loads(raw, max_bytes=MAX_OPENING_BYTES + 256, what="the opening")
        except MalformedError as error:
            raise _opening(error.id) from None
        salt = value.get("salt") if isinstance(value, dict) else None
        if not isinstance(salt, str) or not _HEX.fullmatch(salt) or value.keys() != {"private", "salt"}:
            raise _opening("not salt and private")
        if not isinstance(value["private"], dict):
            raise _opening("private parts that are no object")
        return cls(bytes.fromhex(salt), canonical.dumps(value["private"]).decode())


def seal(kind: str, body: Mapping[str, Any], salt: bytes) -> tuple[dict[str, Any], Opening]:
    """What goes into the leaf, and what opens it. `salt` is 32 bytes that are used once."""
    public, private = split(kind, body)
    opening = Opening(salt, canonical.dumps(private).decode())
    return {**public, SEALED: opening.commitment}, opening


def unseal(kind: str, leaf: Mapping[str, Any], opening: Opening | None) -> dict[str, Any]:
    """The body as it was before it was sealed; without an opening with `HIDDEN` and nothing in the personal places.

    MalformedError `entry.opening` where the opening is not what the leaf committed to, or the leaf has a personal part
    in clear.
    """
    public = {name: value for name, value in leaf.items() if name != SEALED}
    if not isinstance(leaf[SEALED], str) or not _HEX.fullmatch(leaf[SEALED]):
        raise _opening("a commitment that is none")
    if opening is not None and opening.commitment != leaf[SEALED]:
        raise _opening("another text or salt than the leaf committed to")
    try:
        whole: dict[str, Any] = _merged(public, _hidden(kind, public) if opening is None else opening.private)
        same = split(kind, whole)[0] == public
    except (KeyError, TypeError, AttributeError, IndexError):
        raise _opening("parts that are not of this entry") from None
    if not same:
        raise _opening("a personal part in clear, or too little in clear")
    return whole


def split(kind: str, body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The public and the personal parts of a body, each in its place. KeyError and the like for what is no body."""
    if kind == "receipt":
        return _split_receipt(body)
    private = {name: body[name] for name in _ALWAYS[kind]}
    if kind in ("intent", "outcome") and personal(body["action"]):
        private["target"] = body["target"]
    if kind == "intent" and _names_address(body):
        private["grant"] = body["grant"]
    return {name: value for name, value in body.items() if name not in private}, private


@lru_cache(256)
def personal(action: str) -> bool:
    """Whether the target of an action is an address; the others act on what the manifest declares."""
    cls = ACTIONS.get(action)
    return cls is None or any(field.kind is Kind.ADDRESS for field in fields(cls))


def _names_address(body: Mapping[str, Any]) -> bool:
    """A grant in words is `capability:target`, or says who acted."""
    return personal(body["action"]) and str(body["grant"]).endswith(f":{body['target']}")


def _split_receipt(body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs, decision, book = body["inputs"], body["decision"], body["runbook"]
    actions = [_split_action(action) for action in body["actions"]]
    public = {
        **body,
        "inputs": {k: v for k, v in inputs.items() if k not in ("values", "fields")},
        "decision": {**decision, "calls": [{"action": call["action"]} for call in decision["calls"]]},
        "runbook": {k: v for k, v in book.items() if k != "signers"},
        "actions": [shown for shown, _ in actions],
    }
    private = {
        "inputs": {"values": inputs["values"], "fields": inputs["fields"]},
        "decision": {"calls": [{"args": call["args"]} for call in decision["calls"]]},
        "runbook": {"signers": book["signers"]},
        "actions": [hidden for _, hidden in actions],
    }
    return public, private


def _split_action(action: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    guard = action["guard"]
    names = ("args", "detail", "undo", "target") if personal(action["action"]) else ("args", "detail", "undo")
    public = {name: value for name, value in action.items() if name not in names}
    public["guard"] = {name: value for name, value in guard.items() if name != "why"}
    return public, {**{name: action[name] for name in names}, "guard": {"why": guard["why"]}}


def _hidden(kind: str, public: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the personal places while there is no opening."""
    if kind == "receipt":
        return {
            "inputs": {"values": [], "fields": {}},
            "decision": {"calls": [{"args": []} for _ in public["decision"]["calls"]]},
            "runbook": {"signers": []},
            "actions": [
                _missing(action, ("args", "detail", "undo", "target")) | {"guard": {"why": HIDDEN}}
                for action in public["actions"]
            ],
        }
    hidden = _missing(public, (*_ALWAYS[kind], *(("target",) if kind in ("intent", "outcome") else ())))
    if kind == "intent" and "grant" not in public:
        hidden["grant"] = f"{public['action']}:{HIDDEN}"
    return hidden


def _missing(public: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {
        name: {} if name in _CONTAINERS else None if name == "undo" else HIDDEN for name in names if name not in public
    }


def _merged(public: Any, private: Any) -> Any:
    """Both trees in one; only containers may be in both."""
    if isinstance(public, dict) and isinstance(private, dict):
        both = {name: _merged(public[name], value) for name, value in private.items() if name in public}
        return {**public, **private, **both}
    if isinstance(public, list) and isinstance(private, list) and len(public) == len(private):
        return [_merged(a, b) for a, b in zip(public, private, strict=True)]
    raise TypeError("a part stands in both")


def _opening(got: str) -> MalformedError:
    return MalformedError(
        "the opening does not belong to this entry",
        id="entry.opening",
        want="salt and personal parts as the leaf committed to them",
        got=got,
        hint="the clear text beside the log was changed; the log itself is not concerned",
    )
