"""Text to syntax tree, and nothing that a reader cannot see: encoding, invisible characters, sizes, Python's grammar.

CPython may read a file differently than a person does (a coding line, bidirectional marks, look-alike letters).
Those are refused here. Nothing is ever executed. Spec: docs/spec/language.md, section "Text".
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
import unicodedata
import warnings
from typing import Final

from pointcall_runbook.compiler.diagnostic import Refusal

MAX_SOURCE_BYTES: Final = 64 * 1024
MAX_LINES: Final = 2000
MAX_DEPTH: Final = 64  # of the syntax tree
_CODING: Final = re.compile(r"^[ \t\f]*#.*?coding[:=]")
_TEXT_TOKENS: Final = (tokenize.STRING, tokenize.COMMENT)


def parse(source: str, filename: str) -> ast.Module:
    """Raises Refusal for text that is not Python, not readable as it looks, or too large."""
    if len(source.encode(errors="replace")) > MAX_SOURCE_BYTES or source.count("\n") >= MAX_LINES:
        limits = f"at most {MAX_SOURCE_BYTES} bytes and {MAX_LINES} lines"
        raise Refusal(ast.Pass(), "language.size", "the source is too large", want=limits)
    _check_characters(source)
    tree = _tree(source, filename)
    _check_tokens(source)
    _check_depth(tree)
    return tree


def _place(line: int, text: str, column: int) -> ast.AST:
    """A node that only has a position, for a diagnostic. `column` counts characters from 0."""
    start = len(text[:column].encode(errors="replace"))
    return ast.Pass(lineno=line, col_offset=start, end_lineno=line, end_col_offset=start + 1)


def _check_characters(source: str) -> None:
    for number, text in enumerate(source.split("\n"), 1):
        if number <= 2 and _CODING.match(text):
            raise Refusal(
                _place(number, text, 0),
                "language.text",
                "a coding line lets Python read the file differently than it looks",
                want="UTF-8 without a coding line",
            )
        for column, char in enumerate(text):
            if char != "\t" and unicodedata.category(char) in ("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"):
                raise Refusal(
                    _place(number, text, column),
                    "language.text",
                    "an invisible or unassigned character",
                    got=f"U+{ord(char):04X}",
                    hint="remove it; lines end with a single line feed",
                )


def _tree(source: str, filename: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an invalid escape is refused, not warned about
            tree = ast.parse(source, filename)
            compile(tree, filename, "exec", dont_inherit=True)  # for the rest of Python's own rules; nothing runs
            return tree
    except SyntaxError as error:
        line = error.lineno or 1
        lines = source.split("\n")
        text = lines[line - 1] if line <= len(lines) else ""
        place = _place(line, text, max(0, (error.offset or 1) - 1))
        raise Refusal(place, "language.syntax", f"not Python: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError):
        raise Refusal(ast.Pass(), "language.syntax", "Python cannot read this text") from None


def _check_tokens(source: str) -> None:
    """Letters outside ASCII may only stand in comments and strings: Python would fold look-alikes into one name."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        raise Refusal(ast.Pass(), "language.syntax", "Python cannot split this text into tokens") from None
    for token in tokens:
        if token.type not in _TEXT_TOKENS and not token.string.isascii():
            place = _place(token.start[0], token.line, token.start[1])
            raise Refusal(place, "language.text", "names are plain ASCII", got=token.string[:20])


def _check_depth(tree: ast.Module) -> None:
    level: list[ast.AST] = [tree]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return
    place = next((n for n in level if hasattr(n, "lineno")), tree)
    raise Refusal(place, "language.size", "nested too deeply", want=f"at most {MAX_DEPTH} levels")
