"""One difference between two manifests or two declarations, and what it means for whoever reviews it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Effect = Literal["grants", "revokes", "changes"]
EFFECTS: Final[tuple[Effect, ...]] = ("grants", "revokes", "changes")
MORE: Final[tuple[Effect, Effect]] = ("grants", "revokes")  # effect of a larger and of a smaller value
LESS: Final[tuple[Effect, Effect]] = ("revokes", "grants")


@dataclass(frozen=True, slots=True)
class Change:
    """One difference."""

    effect: Effect
    text: str
