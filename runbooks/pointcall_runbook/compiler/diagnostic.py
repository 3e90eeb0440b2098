"""One thing wrong in a source, where it is, and what to write instead; and the error that carries all of them."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from pointcall_runbook.errors import PointcallError


@dataclass(frozen=True, slots=True, order=True)
class Diagnostic:
    """Lines and columns count from 1, as editors show them; `end_column` is behind the last character."""

    line: int
    column: int
    end_column: int
    id: str
    message: str
    want: str = ""
    got: str = ""
    hint: str = ""

    def render(self, filename: str, lines: list[str]) -> str:
        """The form for people: place, source line, carets, what was meant."""
        text = lines[self.line - 1] if 0 < self.line <= len(lines) else ""
        shown = text.replace("\t", " ")
        width = max(1, min(self.end_column, len(text) + 1) - self.column)
        out = [f"{filename}:{self.line}:{self.column}: {self.message} [{self.id}]", f"    {shown}"]
        out.append("    " + " " * (self.column - 1) + "^" * width)
        pairs = (("want", self.want), ("got ", self.got), ("hint:", self.hint))
        return "\n".join(out + [f"  {name} {value}" for name, value in pairs if value])

    def as_dict(self) -> dict[str, Any]:
        """The form for editors."""
        return {name: getattr(self, name) for name in self.__slots__ if getattr(self, name) != ""}


class CompileError(PointcallError):
    """The source is not in the language. `diagnostics` lists everything that is wrong, in source order."""

    id = "language.refused"

    def __init__(self, diagnostics: tuple[Diagnostic, ...], filename: str, lines: list[str]) -> None:
        self.diagnostics = diagnostics
        self.filename = filename
        text = "\n".join(d.render(filename, lines) for d in diagnostics)
        first = diagnostics[0]
        super().__init__(text, id=first.id, want=first.want, got=first.got, hint=first.hint)

    def __str__(self) -> str:
        return self.message


class Refusal(Exception):
    """Inside the compiler only: one statement cannot be compiled. Becomes a Diagnostic."""

    def __init__(self, node: ast.AST, id: str, message: str, *, want: str = "", got: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.node, self.id, self.message, self.want, self.got, self.hint = node, id, message, want, got, hint


class Poisoned(Exception):
    """Inside the compiler only: the statement uses a name whose own statement was refused; that was said already."""


class Diagnostics:
    """Collects refusals; each place and id once."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines
        self._found: dict[tuple[int, int, str], Diagnostic] = {}

    def any(self) -> bool:
        return bool(self._found)

    def add(self, refusal: Refusal) -> None:
        line, column, end = self._place(refusal.node)
        r = refusal
        found = Diagnostic(line, column, end, r.id, r.message, r.want, r.got, r.hint)
        self._found.setdefault((line, column, r.id), found)

    def sorted(self) -> tuple[Diagnostic, ...]:
        return tuple(sorted(self._found.values()))

    def _place(self, node: ast.AST) -> tuple[int, int, int]:
        line = getattr(node, "lineno", 1)
        start, end = getattr(node, "col_offset", 0), getattr(node, "end_col_offset", None)
        text = self._lines[line - 1] if 0 < line <= len(self._lines) else ""
        if end is None or getattr(node, "end_lineno", line) != line:
            end = len(text.encode(errors="replace"))
        return line, _characters(text, start) + 1, _characters(text, end) + 1


def _characters(text: str, offset: int) -> int:
    """A UTF-8 offset, as `ast` gives it, in characters."""
    return len(text.encode(errors="replace")[:offset].decode(errors="ignore"))
