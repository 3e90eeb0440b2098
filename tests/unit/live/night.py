"""A night on call, told in calls: what an executor would answer, for tests and for the picture in the docs.

`python -m tests.unit.live.night` writes the picture into docs/how-to/on-call.md.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from pointcall_executor.api import backend
from pointcall_executor.api.messages import message
from pointcall_executor.feed import FeedItem
from pointcall_executor.live.view import View
from pointcall_runbook.errors import PointcallError

NOW: Final = datetime(2026, 11, 23, 3, 4, 5, tzinfo=UTC)
PAGE: Final = Path(__file__).resolve().parents[3] / "docs/how-to/on-call.md"
BEGIN, END = "<!-- top:begin -->\n```text\n", "```\n<!-- top:end -->"

BOOK = backend.ArmedRunbook("refusing-dependency", "1.0.0", "enforce", ("CircuitOpened",), ("recreate",), 59)
QUIET = backend.NodeStatus(
    node="node-7", state="armed", reason="", executor="0.1.0", boot_id="b", epoch="e" * 64, platform="snp",
    tier="hardware", manifest="edge-recovery", sequence=3, manifest_sha256="a" * 64, policy_sha256="b" * 64,
    expires="2026-12-24T00:00:00Z", signers=("release@ci.example",),
    runbooks=(BOOK, replace(BOOK, name="slow-filesystem", mode="monitor")),
    services=(
        backend.ServiceState("db", "process", "running", 0, 4711, "accepting"),
        backend.ServiceState("api", "process", "running", 0, 4712, "accepting"),
    ),
    circuits=(backend.CircuitState("10.0.0.7", 5432, "closed", 0, "db"),),
    tree_size=812, runs=57, refusals=3, lost_events=0, ready=True, epoch_age_ms=240_000,
    epoch_life_ms=900_000, evidence_left_ms=1_560_000, journal_bytes=1_300_000,
    signed_size=812, programs=9, checked_age_ms=4_000, beats=1000, uptime_ms=7_500_000,
)  # fmt: skip
BAD = replace(
    QUIET,
    services=(
        backend.ServiceState("db", "process", "stopped", 3, 0, "stopped"),
        backend.ServiceState("api", "process", "running", 0, 4712, "accepting"),
    ),
    circuits=(backend.CircuitState("10.0.0.7", 5432, "open", 1840, "db", 3_000, 5, 4),),
)
RUN = "01K9RBZ0000000000000000000"
HAPPENED = (
    FeedItem("2026-11-23T03:01:10.000000Z", "circuit", "warning",
             "circuit to tcp://10.0.0.7:5432 opened after 5 failures", recorded=False),
    FeedItem("2026-11-23T03:01:10.004000Z", "run", "info",
             "refusing-dependency on CircuitOpened: recreate db: applied (31.0 ms)", RUN, index=790),
    FeedItem("2026-11-23T03:03:58.000000Z", "refusal", "warning", "recreate db: want 4 s of quiet, got 1.2 s", RUN,
             "guard.flapping", "wait, or find out why it fails; the hold-off doubles each time", 803),
    FeedItem("2026-11-23T03:03:58.100000Z", "run", "warning",
             "refusing-dependency on CircuitOpened: recreate db: held back by guard.flapping", RUN, index=804),
)  # fmt: skip


class FakeNode:
    """An executor that answers what it is told to, or not at all. Remembers what it was asked to change."""

    def __init__(self, status: backend.NodeStatus = QUIET, items: tuple[FeedItem, ...] = ()) -> None:
        self.status, self.items = status, items
        self.away = False
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.refuse: PointcallError | None = None
        self.looks = 0

    def look(self) -> tuple[Any, list[Any]]:
        self.looks += 1
        if self.away:
            raise PointcallError("no executor answers", id="api.unreachable")
        self.status = replace(self.status, beats=self.status.beats + 1)
        items, self.items = self.items, ()
        return message(self.status, "NodeStatus"), list(items)

    def control(self, method: str, **fields: Any) -> str:
        self.asked.append((method, fields))
        if self.refuse is not None:
            raise self.refuse
        return f"{method} done"


def screen(app: View) -> str:
    """What stands on the terminal, as text."""
    rows = app.screen._compositor.render_strips()
    return "".join(row.text.rstrip() + "\n" for row in rows)


async def shot() -> str:
    """The bad night at 80 x 24."""
    app = View(FakeNode(BAD, HAPPENED), every_s=3600, clock=lambda: NOW)
    async with app.run_test(size=(80, 24)) as pilot:
        for _ in range(50):
            await pilot.pause(0.05)
            if "WRONG NOW" in (text := screen(app)) and "q quit" in text:
                return text
    raise AssertionError("the view does not come up")


def later(seconds: float) -> datetime:
    """So long after the picture was taken."""
    return NOW + timedelta(seconds=seconds)


def main() -> None:
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + asyncio.run(shot()) + END + rest.split(END)[1])
    sys.stdout.write(f"written: {PAGE}\n")


if __name__ == "__main__":
    main()
