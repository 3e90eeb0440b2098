"""Hidden text in a proposal: where it is. A proposal with any of it is refused (Trojan Source, hidden instructions).

Not a language check: the compiler does that. How foreign text is shown is `pointcall_attest.printable`.
Spec: docs/spec/proposal.md section 2.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from pointcall_attest.printable import hides

MAX_FINDINGS: Final = 20  # enough to repair a file; a hostile one has thousands


@dataclass(frozen=True, slots=True)
class Finding:
    """One code point that may not be there. `line` and `column` count from 1, in code points."""

    line: int
    column: int
    code_point: int

    def __str__(self) -> str:
        name = unicodedata.name(chr(self.code_point), "no name")
        return f"line {self.line}, column {self.column}: U+{self.code_point:04X} ({name})"


def findings(text: str) -> tuple[Finding, ...]:
    """Every hiding code point in order, at most MAX_FINDINGS of them."""
    return tuple(islice(_all_findings(text), MAX_FINDINGS))


def _all_findings(text: str) -> Iterator[Finding]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.isascii() and line.isprintable():
            continue
        for column, character in enumerate(line, 1):
            if hides(character):
                yield Finding(number, column, ord(character))
