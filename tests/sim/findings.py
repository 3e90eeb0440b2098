"""What the simulation has found in the executor and what is not yet repaired: counted in a run instead of failing it.

`python -m tests.sim --strict` fails on them. An entry leaves this list when the executor is repaired.
"""

from __future__ import annotations

from typing import Final

FINDINGS: Final[dict[str, str]] = {}
KNOWN: Final = frozenset(FINDINGS)
