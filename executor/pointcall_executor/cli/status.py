"""`pointcall status`: what is armed on this node, what is held back, what happened; asked of the running executor."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from pointcall_attest.printable import shown
from pointcall_executor.cli import connection, output
from pointcall_executor.cli.connection import duration

WATCHING: Final = "no action is done, no connect refused"
ANSWER_SECONDS: Final = 5.0  # somebody is waiting for it
SHOWN_MAX: Final = 5  # escalations and approvals with a line of their own


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--socket", type=Path, metavar="PATH", help="a role's socket (default: the operator's or auditor's)"
    )
    parser.add_argument(
        "--ready", action="store_true", help="print nothing but one word; exit 0 only where something is armed"
    )


def run(args: argparse.Namespace) -> int:
    from google.protobuf.json_format import MessageToDict

    from pointcall_executor.api.client import Client, UnreachableError

    socket = args.socket or connection.socket_of(output.state_dir(args) / "run")
    try:
        with Client(socket, timeout_s=ANSWER_SECONDS) as client:
            status = client.call("Status/GetStatus")
            runs = [] if args.ready else client.call("Runs/ListRuns", page_size=5).runs
    except UnreachableError as refusal:
        raise connection.unreachable(refusal, socket) from None
    options: dict[str, Any] = {"preserving_proto_field_name": True, "always_print_fields_with_no_presence": True}
    if args.ready:
        return _ready(status, as_json=args.json)
    if args.json:
        output.print_json(MessageToDict(status, **options) | {"last_runs": [MessageToDict(r, **options) for r in runs]})
    else:
        _show(status, runs)
    return output.Exit.OK


def _ready(status: Any, *, as_json: bool) -> int:
    if as_json:
        output.print_json({"ready": status.ready, "state": status.state, "reason": status.reason})
    else:
        why = f" ({shown(status.reason)})" if status.reason else ""
        print("ready" if status.ready else f"not ready: {status.state}{why}")
    return output.Exit.OK if status.ready else output.Exit.REFUSED


def _show(status: Any, runs: Any) -> None:
    from rich.table import Table

    console = output.console()
    colour = {"armed": "green", "paused": "yellow"}.get(status.state, "red")
    console.print(f"[bold]{status.node}[/]  [{colour}]{status.state}[/]")
    if status.tier == "emulated":
        console.print("[bold yellow]EMULATED[/]: software-emulated TEE; no confidentiality or integrity claim")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    from rich.text import Text

    for name, text in facts(status):
        table.add_row(name, Text(text))
    console.print(table)
    for title, header, rows in tables(status, runs):
        _print_table(console, title, header, rows)


def facts(status: Any) -> list[tuple[str, str]]:
    """One line each, in the order in which a person on call asks."""
    found = [(name, text) for name, text in _held(status) if text]
    return [
        *found,
        ("manifest", _manifest(status)),
        ("signed by", ", ".join(status.signers) or "nobody"),
        ("expires", status.expires or "never: nothing is armed"),
        ("mode", _modes(status)),
        ("evidence", f"{status.platform}, {status.tier}, {duration(status.epoch_age_ms / 1000)} old"),
        ("epoch", f"{status.epoch[:16]}, opened {duration(status.epoch_age_ms / 1000)} ago"),
        ("kernel", _kernel(status)),
        ("log", _log(status)),
        *((c.name, _copied(c)) for c in status.copies),
        ("lost", f"{status.lost_events} events"),
        ("executor", f"{status.executor}, up {duration(status.uptime_ms / 1000)}"),
    ]


def _copied(copy: Any) -> str:
    """How far witnesses or the mirror are."""
    if not copy.behind:
        return f"all {copy.covered} entries are there"
    error = f": {copy.error}" if copy.error else ""
    return f"{copy.behind} entries behind for {duration(copy.behind_ms / 1000)}{error}"


def _held(status: Any) -> list[tuple[str, str]]:
    """What is held back, and until when."""
    paused = f"{status.reason or 'no reason given'}; ends by itself in {duration(status.paused_left_ms / 1000)}"
    quarantined = [b.name for b in status.runbooks if b.state == "quarantined"]
    return [
        *_listed("CALLED", called(status)),
        *_listed("APPROVE", held_back(status)),
        ("MONITOR", f"only watching: {WATCHING}" if status.mode == "monitor" else ""),
        ("PAUSED", paused if status.state == "paused" else ""),
        ("DISARMED", _disarmed(status) if status.state == "disarmed" else ""),
        ("FAILED", status.reason if status.state == "failed" else ""),
        ("STORM", f"no action for {duration(status.storm_left_ms / 1000)}" if status.storm_left_ms else ""),
        ("QUARANTINE", f"{', '.join(quarantined)}: trapped; arm a fixed manifest" if quarantined else ""),
        ("working on", ", ".join(status.in_flight)),
    ]


def _disarmed(status: Any) -> str:
    return f"{status.reason or 'nothing was admitted'}: {arm_again(status)}"


def arm_again(status: Any) -> str:
    """What to type where nothing is armed, by why that is so."""
    if status.reason.startswith("halted"):
        return "pointcall halt --clear; then pointcall arm DIR"
    return "pointcall arm DIR" if status.reason else "pointcall events --kind refusal says why; then pointcall arm DIR"


def called(status: Any) -> list[tuple[str, str]]:
    """Escalations that nobody has answered, the oldest first: what, and what to do."""
    return [
        (
            f"a person was called because of run {c.run} (code {c.code}), and nobody has answered",
            f"pointcall log show {c.run}; then pointcall acknowledge {c.run} --reason ...",
        )
        for c in status.called
    ]


def held_back(status: Any) -> list[tuple[str, str]]:
    """Actions that wait for the approval of a second person, the oldest first: what, and what to do."""
    return [
        (
            f"{h.runbook} wants {h.action} {h.target}, after {h.event} {_ago(h)}: it waits for an approval",
            f"pointcall approve {h.run}",
        )
        for h in status.held_back
    ]


def _ago(held: Any) -> str:
    return f"{duration(held.age_seconds)} ago"


def _listed(title: str, waiting: list[tuple[str, str]]) -> list[tuple[str, str]]:
    rows = [(title, f"{text}: {do}") for text, do in waiting[:SHOWN_MAX]]
    more = len(waiting) - SHOWN_MAX
    return rows + ([(title, f"{more} more: pointcall approve --list")] if more > 0 else [])


def _manifest(status: Any) -> str:
    if not status.manifest:
        return "none is armed"
    return f"{status.manifest}, sequence {status.sequence}, {status.manifest_sha256[:16]}"


def _modes(status: Any) -> str:
    modes = [b.mode for b in status.runbooks]
    return ", ".join(f"{modes.count(m)} {m}" for m in sorted(set(modes))) or "no runbook"


def _kernel(status: Any) -> str:
    if not status.programs:
        return "nothing loaded"
    return f"{status.programs} programs as armed, compared {duration(status.checked_age_ms / 1000)} ago"


def _log(status: Any) -> str:
    unsigned = max(0, status.tree_size - status.signed_size)
    size = f"{status.journal_bytes / 1e6:.1f} MB"
    return (
        f"{status.tree_size} entries ({unsigned} after the last checkpoint), {status.runs} runs, "
        f"{status.refusals} refusals, {size}"
    )


def left(circuit: Any) -> str:
    """What a circuit does next, in words."""
    if circuit.state == "forced":
        return f"ends in {duration(circuit.left_ms / 1000)}"
    if circuit.state == "open":
        return f"probe in {duration(circuit.left_ms / 1000)}" if circuit.left_ms else "next connect is the probe"
    return "a probe is on its way" if circuit.state == "half" else ""


def _refused(circuit: Any) -> str:
    return f"0 ({circuit.refused} would be)" if circuit.watch_only else str(circuit.refused)


def where(circuit: Any) -> str:
    """`ADDRESS:PORT` as verbs take it."""
    host = f"[{circuit.address}]" if ":" in circuit.address else circuit.address
    return f"{host}:{circuit.port}"


def told_apart(circuit: Any) -> str:
    """The same, with the protocol where it is not TCP: verbs reach both."""
    return where(circuit) + ("" if circuit.protocol == "tcp" else f" {circuit.protocol}")


def what_was_done(run: Any) -> str:
    """The actions of a run with their outcomes, and the rule that held one back."""
    done = [f"{a.action} {a.target}: {_outcome(a)}" for a in run.actions]
    return (run.trap and f"trapped: {run.trap}") or ", ".join(done) or "nothing"


def _outcome(action: Any) -> str:
    return f"held back by {action.guard_check}" if action.guard_check else str(action.outcome)


def tables(status: Any, runs: Any) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """(title, header, rows) of everything that is a list."""
    return [
        (
            "runbooks",
            ("name", "version", "mode", "state", "on", "may", "fuel"),
            [
                (b.name, b.version, b.mode, b.state, ", ".join(b.events), ", ".join(b.capabilities), str(b.fuel_bound))
                for b in status.runbooks
            ],
        ),
        (
            "services",
            ("name", "kind", "state", "pid", "health", "restarts in 1 h"),
            [
                (s.name, s.kind, s.state, str(s.pid) if s.pid else "-", s.health or "-", str(s.restarts))
                for s in status.services
            ],
        ),
        (
            "circuits",
            ("destination", "service", "state", "next", "opened", "refused"),
            [
                (told_apart(c), c.service or "-", c.state, left(c) or "-", str(c.opened), _refused(c))
                for c in status.circuits
            ],
        ),
        (
            "last runs",
            ("run", "started", "what"),
            [(r.id, r.started[:19] + "Z", _what(r)) for r in runs],
        ),
    ]


def _what(run: Any) -> str:
    watching = " (monitor)" if run.mode == "monitor" else ""
    return f"{run.runbook} on {run.event}{watching}: {what_was_done(run)}"


def _print_table(console: Any, title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        return
    table = Table(box=None, title=title, title_justify="left", title_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in header:
        # What is pasted into the next command is never cut: the run. Nor is its time.
        table.add_column(name, header_style="dim", no_wrap=name in ("run", "started"), overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
