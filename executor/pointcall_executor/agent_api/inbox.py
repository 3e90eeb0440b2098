"""The inbox: open proposals as files, `<directory>/<id>/proposal.json`.

Not trusted: who can write here can make a reviewer read a text, but can arm nothing. Removing a folder closes the
proposal. Files are read strictly and capped; one that does not parse is an error that names it, not a gap.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from pointcall_executor.agent_api.errors import RequestError

if TYPE_CHECKING:
    from pointcall_executor.agent_api.proposal import Proposal

MAX_PROPOSAL_BYTES: Final = 4 * 1024 * 1024  # an examination of at most 2 MiB, and the source, as JSON
_ID: Final = re.compile(r"p-[0-9a-f]{24}")


class Inbox:
    """All open proposals of one node."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def put(self, proposal: Proposal) -> None:
        """Store it, atomically. Storing the same id again replaces it."""
        folder = self._directory / proposal.id
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / ".proposal.json"
        draft.write_text(proposal.model_dump_json(indent=2) + "\n", encoding="utf-8")
        os.replace(draft, folder / "proposal.json")  # noqa: PTH105  (Path.replace hides that it is one system call)

    def find(self, id: str) -> Proposal | None:
        """The proposal of this id, or None. RequestError for an id that is none, or a file that does not parse."""
        if not _ID.fullmatch(id):
            raise RequestError("that is no proposal id", id="proposal.id", want="p- and 24 hex digits", got=id[:40])
        path = self._directory / id / "proposal.json"
        return _read(path) if path.is_file() else None

    def all(self) -> tuple[Proposal, ...]:
        """Every stored proposal, in the order of their ids."""
        paths = sorted(self._directory.glob("p-*/proposal.json")) if self._directory.is_dir() else []
        return tuple(_read(p) for p in paths)


def _read(path: Path) -> Proposal:
    from pointcall_executor.agent_api.proposal import Proposal

    with path.open("rb") as file:
        raw = file.read(MAX_PROPOSAL_BYTES + 1)
    try:
        if len(raw) > MAX_PROPOSAL_BYTES:
            raise ValueError(f"larger than {MAX_PROPOSAL_BYTES} bytes")
        return Proposal.model_validate_json(raw)
    except (ValidationError, ValueError) as fault:
        name = path.parent.name
        raise RequestError(
            f"stored proposal {name} cannot be read",
            id="proposal.malformed",
            got=str(fault)[:200],
            hint="remove its folder",
        ) from None
