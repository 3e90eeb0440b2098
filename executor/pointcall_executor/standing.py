"""How the node stands, beside the log: which manifest was armed last, and whether a person has disarmed it since.

The log has both. One that is begun anew, because the one before was damaged or lost, has neither. It is written when a
takeover is final, so that it also says that one was cut off before (sessions.py). Trust: who may write it can stop the
node, keep it from older manifests, or end what an earlier one declared; it arms nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError

from pointcall_attest.model import Sha256, Strict
from pointcall_executor.durable import write_whole

FILE: Final = "standing.json"
MAX_BYTES: Final = 8192
MAX_REASON_CHARS: Final = 1000


class Standing(Strict):
    """`manifest` is the digest of the one with the highest sequence that was armed; null: none ever was. `disarmed` is
    why a person has disarmed since; null: nobody has."""

    format: Literal["pointcall-standing/v1"] = "pointcall-standing/v1"
    sequence: Annotated[int, Field(ge=0, le=2**53 - 1)] = 0
    manifest: Sha256 | None = None
    disarmed: Annotated[str, Field(max_length=MAX_REASON_CHARS)] | None = None


def keep(state: Path, standing: Standing) -> None:
    """OSError where it is not durable: then the one before stays."""
    write_whole(state / FILE, standing.model_dump_json().encode())


def read(state: Path) -> Standing | None:
    """None where the node never stood anyhow. What cannot be read counts as disarmed: a person must look."""
    try:
        with (state / FILE).open("rb") as file:
            return Standing.model_validate_json(file.read(MAX_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        return Standing(disarmed=f"{FILE} cannot be read, and the log before this one is gone")
