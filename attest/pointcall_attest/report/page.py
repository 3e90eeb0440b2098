"""The report as one HTML page: no script, no font, no image, no address outside itself.

The template escapes everything; the policy in its head lets a browser load nothing. What the report says is decided in
build.py, how it looks in page.html.jinja and page.css. Spec: docs/spec/report.md section 6.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Final

from jinja2 import DictLoader, Environment, StrictUndefined, Template
from markupsafe import Markup

from pointcall_attest.report.model import ControlRow, Report, RunRow, Step

MAX_CARDS: Final = 40  # runs that are drawn with their timeline, newest first
MAX_ROWS: Final = 2_000  # of any table; the JSON beside the page has all
_MARKS: Final = {"pass": "✓", "fail": "✗", "not-checked": "–"}
_STANDINGS: Final = {"satisfied": "satisfied", "not-satisfied": "not satisfied", "no-data": "no data"}


def render_html(report: Report) -> str:
    """The page. The same report gives the same bytes."""
    return _template().render(report=report, cards=report.runs[::-1][:MAX_CARDS], max_rows=MAX_ROWS)


def duration(ns: int | None) -> str:
    """`41 µs`, `3.3 ms`, `2.5 s`: three significant digits at most; empty for None."""
    if ns is None:
        return ""
    value, unit = float(ns), "ns"
    for unit in ("ns", "µs", "ms", "s"):
        if abs(value) < 999.5 or unit == "s":
            break
        value /= 1000
    return f"{value:.{0 if abs(value) >= 10 or unit == 'ns' else 1}f} {unit}"


def moment(text: str) -> str:
    """`2026-11-23T08:00:00.001000Z` as `2026-11-23 08:00:00`."""
    return text[:19].replace("T", " ")


def segments(run: RunRow) -> list[tuple[Step, str]]:
    """Each step with the time since the last step that happened, for drawing the line between stations."""
    out, before = [], 0
    for step in run.steps:
        since = step.since_event_ns
        out.append((step, "" if since is None or step.name == "event" else "+" + duration(since - before)))
        before = before if since is None else since
    return out


def tally(controls: Iterable[ControlRow]) -> list[tuple[str, int]]:
    """How many controls stand how, in the order in which they are drawn."""
    standings = [c.standing for c in controls]
    return [(s, standings.count(s)) for s in ("satisfied", "no-data", "not-satisfied")]


def grouped(text: str, size: int = 8) -> str:
    """A digest in groups, so that two people can compare it aloud."""
    return " ".join(text[i : i + size] for i in range(0, len(text), size))


def joined(words: Sequence[str]) -> str:
    return ", ".join(words) or "none"


@cache
def _template() -> Template:
    files = {name: resources.files(__package__).joinpath(name).read_text() for name in ("page.html.jinja", "page.css")}
    environment = Environment(
        loader=DictLoader(files), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {f.__name__: f for f in (duration, moment, segments, tally, grouped, joined)}
    environment.globals |= {"css": Markup(files["page.css"]), "marks": _MARKS, "standings": _STANDINGS}  # noqa: S704
    return environment.get_template("page.html.jinja")
