"""How the demo prints: one line a step with what was checked and what it took. Colours only on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the story. `figures` are what `--json` prints; `lines` are for people."""

    name: str
    title: str
    figures: Mapping[str, Any]
    lines: tuple[str, ...] = ()
    ok: bool = True
    took_ms: float = 0.0
    marks: tuple[str, ...] = field(default=())  # such as EMULATED, RECORDED

    def as_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {"step": self.name, "ok": self.ok, "figures": dict(self.figures)}
        return row | ({"marks": list(self.marks)} if self.marks else {})


def duration(ns: float) -> str:
    """Nanoseconds as a person says them."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size:
            value = ns / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{ns:.0f} ns"


def _line(text: str) -> Text:
    """A line of a step; `label: value` has its label dimmed."""
    label, colon, value = text.partition(": ")
    if not colon or len(label) > 28:
        return Text(text)
    return Text.assemble((f"{label}: ", "dim"), value)


class Narration:
    """Prints steps as they happen."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def title(self, text: str, below: str) -> None:
        self.console.print(Text(text, style="bold"))
        self.console.print(Text(below, style="dim"))
        self.console.print()

    def show(self, step: Step) -> None:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=1)
        grid.add_column(width=9, style="bold")
        grid.add_column(ratio=1)
        mark = Text("✓", style="green") if step.ok else Text("✗", style="red")
        heading = Text(step.title, style="bold")
        for word in step.marks:
            heading.append(f"  {word}", style="bold yellow")
        grid.add_row(mark, step.name, heading)
        for line in step.lines:
            grid.add_row("", "", _line(line))
        self.console.print(grid)

    def end(self, text: str, lines: tuple[str, ...]) -> None:
        self.console.print()
        self.console.print(Text(text, style="bold green"))
        for line in lines:
            self.console.print(_line(f"  {line}"), soft_wrap=True)
