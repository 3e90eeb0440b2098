"""Foreign text made safe to print: on a terminal, in a page, for a model. Escapes and caps; refuses nothing.

Not a parser and not HTML escaping: that is the template's. Spec: docs/spec/proposal.md section 2.
"""

from __future__ import annotations

import unicodedata
from typing import Final

MAX_SHOWN_CHARS: Final = 256  # one field of one run; longer text is cut and says so

# Cc control, Cf format (bidi, zero width, tags), Cs surrogates, Co private, Cn unassigned, Zl and Zp line breaks
# that editors and compilers count differently.
_HIDING_CATEGORIES: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_VARIATION_SELECTORS: Final = (range(0x180B, 0x1810), range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0))
# Letters that are drawn as nothing: category Lo or So, and so not caught by their category.
_BLANK: Final = frozenset({0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0})


def hides(character: str) -> bool:
    """Whether this code point could hide or reorder text. Tab and newline are the two controls that do not."""
    code = ord(character)
    if 0x20 <= code < 0x7F or character in "\t\n":
        return False
    return (
        unicodedata.category(character) in _HIDING_CATEGORIES
        or code in _BLANK
        or any(code in block for block in _VARIATION_SELECTORS)
    )


def shown(text: str, limit: int = MAX_SHOWN_CHARS) -> str:
    """`text` on one line, safe to print: hiding code points, newlines and backslashes become escapes, the rest is cut.

    The result has at most `limit` characters, plus a note of how many were left out.
    """
    out: list[str] = []
    room = limit
    for at, character in enumerate(text):
        piece = _escaped(character)
        if len(piece) > room:
            return "".join(out) + f" [{len(text) - at} more characters]"
        out.append(piece)
        room -= len(piece)
    return "".join(out)


def _escaped(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character in "\t\n" or hides(character):
        return f"\\u{{{ord(character):x}}}"
    return character
