"""The one shape of an error: a stable id, what was wanted, what was found, what to do next.

Every room raises subclasses of `PointcallError` for outside input. Our own mistakes are `AssertionError`s.
Ids are listed in docs/checks.md and never change their meaning.
"""

from __future__ import annotations


class PointcallError(Exception):
    """Outside input was refused.

    `id` is stable and documented; `want` and `got` are short, printable and never secret; `hint` says what to do.
    """

    id: str = "pointcall.error"

    def __init__(self, message: str, *, id: str | None = None, want: str = "", got: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        if id is not None:
            self.id = id
        self.want, self.got, self.hint = want, got, hint

    def __str__(self) -> str:
        lines = [f"{self.message} [{self.id}]"]
        lines += [
            f"  {name} {text}" for name, text in (("want", self.want), ("got ", self.got), ("hint:", self.hint)) if text
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str]:
        """The same for `--json` and for log entries; empty parts are left out."""
        parts = {"id": self.id, "message": self.message, "want": self.want, "got": self.got, "hint": self.hint}
        return {k: v for k, v in parts.items() if v}
