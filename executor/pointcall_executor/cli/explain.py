"""`pointcall explain WORD...`: the schema of events, actions, fields, enums and SDK names. Offline; reads no state."""

from __future__ import annotations

import argparse
import enum
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pointcall_runbook import vocabulary
from pointcall_runbook.vocabulary import ACTIONS, EVENTS, Action, Event, Field, Kind

Rows = Sequence[Mapping[str, Any]]
_LISTS: Final = ("events", "actions", "enums", "sdk")
_COMMENT: Final = re.compile(r"^    (\w+)\b[^#\n]*#\s*(.+)$", re.MULTILINE)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        metavar="WORD",
        nargs="*",
        help=f"{', '.join(_LISTS)}, or a name: CircuitOpened, CircuitOpened.service, recreate, Level, seconds",
    )


def run(args: argparse.Namespace) -> int:
    from pointcall_executor.cli.output import Exit, print_json

    tables = [explained(word) for word in args.words or _LISTS]
    if args.json:
        print_json({"ok": True, "vocabulary": vocabulary.digest(), "explained": tables})
    else:
        for table in tables:
            _print(table)
    return Exit.OK


def explained(word: str) -> dict[str, Any]:
    """What one word means: its name, its text and its rows. Raises UsageRefusal for a word that means nothing."""
    lists = {"events": EVENTS, "actions": _actions(), "enums": _enums()}
    if word in lists:
        rows = [{"name": name, "text": _first_line(cls)} for name, cls in lists[word].items()]
        return {"name": word, "text": f"all {word}", "rows": rows}
    if word == "sdk":
        return {"name": word, "text": "every name that a runbook can import", "rows": _sdk()}
    name, _, field = word.partition(".")
    cls = EVENTS.get(name) or ACTIONS.get(name) or _actions().get(name)
    if cls is not None:
        return _type(cls, field)
    if name in _enums():
        return _enum(_enums()[name], field)
    found = [row for row in _sdk() if row["name"] == word]
    if found:
        return {"name": word, "text": found[0]["text"], "rows": []}
    raise _unknown(word)


def _unknown(word: str) -> Exception:
    from difflib import get_close_matches

    from pointcall_executor.cli.output import UsageRefusal

    known = (*EVENTS, *ACTIONS, *_actions(), *_enums(), *_LISTS, *(row["name"] for row in _sdk()))
    near = get_close_matches(word, known, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "`pointcall explain` lists all words"
    return UsageRefusal(
        f"nothing is called {word[:60]!r}", id="explain.unknown", want="an event, action, enum or SDK name", hint=hint
    )


def _type(cls: type[Event] | type[Action], only: str) -> dict[str, Any]:
    rows = [field_row(cls, f) for f in vocabulary.fields(cls) if only in ("", f.name)]
    if not rows:
        raise _unknown(f"{cls.__name__}.{only}")
    if issubclass(cls, Action):
        where = {"kind": "action", "import": f"rb1.{vocabulary.capability(cls)}"}
    else:
        where = {"kind": "event", "export": f"decide_{cls.__name__}"}
    return {"name": cls.__name__, **where, "text": _text(cls), "rows": rows}


def field_row(cls: type[Event] | type[Action], field: Field) -> dict[str, Any]:
    """One field: its type, range, unit, default, and what the vocabulary notes beside it."""
    row: dict[str, Any] = {"name": field.name, "type": field.enum.__name__ if field.enum else field.kind.value}
    if field.kind is Kind.INT:
        row |= {"lo": str(field.lo), "hi": str(field.hi)}
    if field.unit:
        row["unit"] = field.unit
    if field.enum:
        row["members"] = [m.name for m in field.enum]
    if field.default is not None:
        row["default"] = str(field.default)
    note = _notes(cls).get(field.name)
    return row | ({"text": note} if note else {})


def _notes(cls: type) -> Mapping[str, str]:
    """The comments beside the fields or members: they stand only in the vocabulary's source, which is installed."""
    return dict(_COMMENT.findall(inspect.getsource(cls)))


def _enum(cls: type[enum.IntEnum], only: str) -> dict[str, Any]:
    notes = _notes(cls)
    rows = [
        {"name": m.name, "number": str(int(m))} | ({"text": notes[m.name]} if m.name in notes else {})
        for m in cls
        if only in ("", m.name)
    ]
    if not rows:
        raise _unknown(f"{cls.__name__}.{only}")
    return {"name": cls.__name__, "kind": "enum", "text": _text(cls), "rows": rows}


def _actions() -> Mapping[str, type[Action]]:
    return {cls.__name__: cls for cls in ACTIONS.values()}


def _enums() -> Mapping[str, type[enum.IntEnum]]:
    from pointcall_runbook.sdk import ENUMS

    return {cls.__name__: cls for cls in ENUMS}


def _sdk() -> list[dict[str, str]]:
    from pointcall_runbook.sdk import NAMES

    own = {"NO_SERVICE": "no declared service", "Decision": "what a handler returns: a list of actions"}
    return [{"name": name, "text": own.get(name) or _first_line(NAMES[name])} for name in sorted(NAMES)]


def _text(value: object) -> str:
    return " ".join((inspect.getdoc(value) or "").split())


def _first_line(value: object) -> str:
    return (inspect.getdoc(value) or "").split("\n")[0]


def _print(table: Mapping[str, Any]) -> None:
    from rich.table import Table

    from pointcall_executor.cli.output import console as terminal

    console = terminal()
    where = table.get("export") or table.get("import")
    console.print(f"[bold]{table['name']}[/]", table.get("kind", ""), f"({where})" if where else "", end="\n  ")
    console.print(table["text"], markup=False)
    grid = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 2))
    for row in table["rows"]:
        grid.add_row(row["name"], _shape(row), row.get("text", ""))
    if table["rows"]:
        console.print(grid)
    console.print()


def _shape(row: Mapping[str, Any]) -> str:
    """`int 0..65535 ns = 0`, `Level: DEBUG, INFO`."""
    if "type" not in row:
        return str(row.get("number", ""))
    parts = [row["type"]]
    if "lo" in row:
        parts.append(f"{row['lo']}..{row['hi']}")
    if "unit" in row:
        parts.append(row["unit"])
    if "members" in row:
        parts[0] += ":"
        parts.append(", ".join(row["members"]))
    if "default" in row:
        parts.append(f"= {row['default']}")
    return " ".join(parts)
