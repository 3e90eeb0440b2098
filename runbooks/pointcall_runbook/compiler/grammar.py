"""Which forms of Python the language has. A closed list: whatever is not in it is refused, wherever it stands.

Looks at forms only, not at names or ranges. Spec: docs/spec/language.md, section "Forms".
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Final

from pointcall_runbook.compiler.diagnostic import Refusal

_FORMS: Final = (
    *(ast.Module, ast.ImportFrom, ast.alias, ast.FunctionDef, ast.arguments, ast.arg, ast.Load, ast.Store),
    *(ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Pass, ast.Return, ast.If, ast.For, ast.Break),
    *(ast.Continue, ast.Match, ast.match_case, ast.MatchValue, ast.MatchOr, ast.MatchAs),
    *(ast.Constant, ast.Name, ast.Attribute, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Call),
    *(ast.keyword, ast.List, ast.Tuple, ast.And, ast.Or, ast.Not, ast.USub),
    *(ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Pow, ast.LShift, ast.RShift),
    *(ast.BitAnd, ast.BitOr, ast.BitXor, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn),
)
_INSTEAD: Final[dict[type[ast.AST], tuple[str, str]]] = {
    ast.While: ("while", "for i in range(<a number with a proven limit>)"),
    ast.Import: ("import", "from pointcall_runbook import ..."),
    ast.Div: ("/ gives a float", "// divides integers"),
    ast.ClassDef: ("class", "a helper function; state is `remembered(...)`"),
    ast.Lambda: ("lambda", "a helper function: def name(x: int) -> int"),
    ast.Try: ("try", "nothing in a runbook can raise: test the value first"),
    ast.Raise: ("raise", "return []"),
    ast.Assert: ("assert", "if not <condition>: return []"),
    ast.JoinedStr: ("an f-string", "a number as `code`, explained in the README"),
    ast.Subscript: ("[ ] indexing", "fields are attributes: e.failures"),
    ast.Is: ("is", "=="),
    ast.IsNot: ("is not", "!="),
    ast.NamedExpr: (":=", "assign on a line of its own"),
    ast.Starred: ("*", "write the arguments out"),
    ast.AsyncFunctionDef: ("async", "def"),
    ast.With: ("with", "nothing needs closing here"),
    ast.Global: ("global", "state is `remembered(...)`"),
    ast.Nonlocal: ("nonlocal", "state is `remembered(...)`"),
    ast.ListComp: ("a comprehension", "for i in range(...)"),
    ast.Dict: ("a dict", "if or match"),
    ast.Set: ("a set", "a tuple: x in (80, 443)"),
    ast.Delete: ("del", "nothing: names end with the function"),
    ast.MatchClass: ("a class pattern", "a member: case Level.ERROR"),
}
STRING_CALLS: Final = ("service", "channel", "Network")


def check(tree: ast.Module) -> Iterator[Refusal]:
    """Every form that is outside the language."""
    strings = {id(node) for node in _allowed_strings(tree)}
    for node, place in _walk(tree):
        refusal = _form(node, place) or _detail(node)
        if refusal is not None:
            yield refusal
        elif isinstance(node, ast.Constant) and id(node) not in strings:
            yield from _number(node)


def _walk(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """All nodes in source order, each with the nearest node that has a position."""
    stack = [(tree, tree)]
    while stack:
        node, place = stack.pop()
        yield node, place
        children = reversed(list(ast.iter_child_nodes(node)))
        stack += [(child, child if hasattr(child, "lineno") else place) for child in children]


def _form(node: ast.AST, place: ast.AST) -> Refusal | None:
    if isinstance(node, _FORMS):
        return None
    what, instead = _INSTEAD.get(type(node), (type(node).__name__, ""))
    hint = f"write: {instead}" if instead else "docs/spec/language.md lists what there is"
    return Refusal(place, "language.form", f"{what} is not in the language", hint=hint)


def _detail(node: ast.AST) -> Refusal | None:
    """Forms that are allowed in one shape only."""
    match node:
        case ast.MatchAs() if node.name is not None or node.pattern is not None:
            return Refusal(node, "language.form", "a pattern cannot bind a name", hint="write: case _:")
        case ast.match_case() if node.guard is not None:
            return Refusal(node.guard, "language.form", "a case has no guard", hint="write an if inside the case")
        case ast.Attribute() if not isinstance(node.value, ast.Name):
            return Refusal(node, "language.form", "only names have attributes", hint="fields: e.failures, Level.ERROR")
        case ast.keyword() if node.arg is None:
            return Refusal(node, "language.form", "** is not in the language", hint="write the arguments out")
        case ast.Call() if not _callable(node.func):
            return Refusal(node, "language.form", "only names can be called", hint="an action, a helper, min, max, abs")
        case ast.For() if node.orelse or not isinstance(node.target, ast.Name):
            return Refusal(node, "language.form", "a loop has one name and no else", hint="for i in range(3):")
        case ast.Assign() if len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
            return Refusal(node, "language.form", "one name is assigned at a time", hint="x = ...")
        case ast.AugAssign() | ast.AnnAssign() if not isinstance(node.target, ast.Name):
            return Refusal(node, "language.form", "one name is assigned at a time", hint="x = ...")
        case ast.Expr() if not _is_text(node.value):
            return Refusal(node, "language.form", "a value that nobody uses", hint="return [...] or assign it")
        case _:
            return None


def _callable(func: ast.expr) -> bool:
    if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name):
        return (func.value.id, func.attr) == ("Address", "parse")
    return isinstance(func, ast.Name)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _allowed_strings(tree: ast.Module) -> Iterator[ast.AST]:
    """Docstrings, and the one argument of service(), channel(), Network() and Address.parse()."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef) and isinstance(node.body[0] if node.body else None, ast.Expr):
            first = node.body[0]
            assert isinstance(first, ast.Expr)
            yield first.value
        if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords and _takes_text(node.func):
            yield node.args[0]


def _takes_text(func: ast.expr) -> bool:
    return isinstance(func, ast.Attribute) or (isinstance(func, ast.Name) and func.id in STRING_CALLS)


def _number(node: ast.Constant) -> Iterator[Refusal]:
    if type(node.value) not in (int, bool) or (isinstance(node.value, int) and node.kind is not None):
        kind = {str: "text", float: "a float", type(None): "None", bytes: "bytes"}.get(type(node.value), "this")
        hint = "durations are integers: seconds(2), milliseconds(500)" if kind == "a float" else ""
        yield Refusal(node, "language.form", f"{kind} is not a value here", want="an integer, True or False", hint=hint)
