"""The one name table: no name means two things, here or under CPython. Spec: docs/spec/language.md, section "Names"."""

from __future__ import annotations

import ast
import builtins
import re
from typing import Final

from pointcall_runbook.compiler.diagnostic import Refusal
from pointcall_runbook.sdk import NAMES

PACKAGE: Final = "pointcall_runbook"
_GLOBAL: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}\Z")
_LOCAL: Final = re.compile(r"_?[A-Za-z0-9]?[A-Za-z0-9_]{0,61}\Z")
_BUILTINS: Final = frozenset(dir(builtins))


def imported(node: ast.ImportFrom) -> list[str]:
    """The names an import brings. Raises Refusal for anything but names of the SDK."""
    if node.module == "__future__" and [a.name for a in node.names] == ["annotations"] and not node.names[0].asname:
        return []
    if node.module != PACKAGE or node.level:
        raise Refusal(node, "language.import", "a runbook imports one package", want=f"from {PACKAGE} import ...")
    for alias in node.names:
        if alias.asname or alias.name not in NAMES:
            hint = "`pointcall explain sdk` lists the names; none can be renamed"
            raise Refusal(alias, "language.import", f"the SDK has no {alias.name!r}, or it is renamed", hint=hint)
    return [alias.name for alias in node.names]


def check_new(node: ast.AST, name: str, taken: frozenset[str], *, local: bool = False) -> None:
    """Refuse a name that is taken: by the module, the SDK or Python itself."""
    if not (_LOCAL if local else _GLOBAL).match(name) or name.startswith("__"):
        raise Refusal(
            node, "language.name", f"{name!r} is not a name for this place", want="a letter first, at most 63"
        )
    if name in taken:
        raise Refusal(node, "language.name", f"{name!r} is already used in this file", hint="choose another name")
    if name in NAMES or name in _BUILTINS:
        owner = "the SDK" if name in NAMES else "Python"
        raise Refusal(node, "language.name", f"{name!r} belongs to {owner}", hint="choose another name")
