"""A node in mode `monitor`: it watches, decides and counts, and refuses nothing, whatever was there before."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.receipt import Receipt
from pointcall_attest.statement import MAX_TEXT
from pointcall_executor.arming import ArmingError
from pointcall_executor.backend import ExecutorBackend
from pointcall_executor.cli.output import Exit
from pointcall_executor.journal import JournalReader
from pointcall_executor.pins import Pins
from pointcall_executor.recorded import RecordedNode
from pointcall_executor.services.groups import remove_empty
from pointcall_runbook.vocabulary import Address
from tests.lab import Lab
from tests.scenario.test_detectors_story import DEAD_PORT
from tests.scenario.test_loop_story import PORT, Watched, opened, spec
from tests.scenario.test_pinned_story import THRESHOLD, connects, put, receipts
from tests.scenario.test_real_story import Running, bpffs, pointcall, real_kernel, running

__all__ = ["bpffs", "real_kernel"]  # fixtures
REFUSED, BLOCKED = "ECONNREFUSED", "EPERM"


def ask(lab: Lab, *words: str) -> Any:
    done = pointcall(*words, "--json", "--state-dir", str(lab.state))
    assert done.returncode == Exit.OK, done.stdout + done.stderr
    return json.loads(done.stdout)


def circuit(lab: Lab) -> dict[str, Any]:
    (found,) = ask(lab, "status")["circuits"]
    return {name: found[name] for name in ("state", "watch_only", "refused")}


def first_receipt(lab: Lab) -> Receipt:
    deadline = time.monotonic() + 10
    while not (found := receipts(lab)):
        assert time.monotonic() < deadline, "no runbook ran"
        time.sleep(0.05)
    return found[0].receipt()


def ended_at_start(lab: Lab) -> list[dict[str, Any]]:
    with contextlib.closing(JournalReader.open(lab.state / "journal.db")) as journal:
        return [e.body["detail"] for e in journal.entries("config") if e.body["what"] == "ended at start"]


def killed(run: Running) -> None:
    run.process.kill()
    run.process.wait()


@pytest.mark.kernel
def test_many_failed_connects_and_none_refused(real_kernel: None, lab: Lab, tmp_path: Path) -> None:
    put(lab, tmp_path, 1)
    with running(lab, mode="monitor") as run:
        run.until("armed")
        assert connects(40) == [REFUSED] * 40
        receipt = first_receipt(lab)
        assert (receipt.run.mode, receipt.trigger.event) == ("monitor", "CircuitOpened")
        assert [(a.action, a.target, a.outcome) for a in receipt.actions] == [("notify", "ops", "monitored")]
        status = ask(lab, "status")
        assert (status["mode"], [b["mode"] for b in status["runbooks"]]) == ("monitor", ["monitor"])
        assert circuit(lab) == {"state": "open", "watch_only": True, "refused": str(40 - THRESHOLD)}
        shown = pointcall("status", "--state-dir", str(lab.state)).stdout
        assert "only watching" in " ".join(shown.split())
        tripped = pointcall("trip", f"127.0.0.1:{DEAD_PORT}", "--state-dir", str(lab.state))
        assert tripped.returncode == Exit.REFUSED
        assert "[circuit.monitor]" in tripped.stderr
        assert "enforce" in tripped.stderr
        assert circuit(lab)["state"] == "open"
        ask(lab, "release", f"127.0.0.1:{DEAD_PORT}")
        assert circuit(lab)["state"] == "closed"
        settings = lab.state / "pointcall.toml"
        settings.write_text(settings.read_text().replace('"monitor"', '"enforce"'))
        run.process.send_signal(signal.SIGHUP)
        assert "config.restart" in run.until("settings refused")
        assert "mode" in run.said[-1]
        assert connects(10) == [REFUSED] * 10


@pytest.mark.kernel
def test_a_pinned_breaker_follows_the_mode_of_who_takes_it_up(
    real_kernel: None, bpffs: None, lab: Lab, tmp_path: Path
) -> None:
    put(lab, tmp_path, 1)
    try:
        with running(lab, pin=True) as run:
            run.until("armed")
            assert connects(THRESHOLD + 1) == [REFUSED] * THRESHOLD + [BLOCKED]
            ask(lab, "trip", f"127.0.0.1:{DEAD_PORT}", "--for", "1h")
            killed(run)
        assert connects(1) == [BLOCKED]
        with running(lab, pin=True, mode="monitor") as run:
            run.until("armed")
            assert circuit(lab) == {"state": "closed", "watch_only": True, "refused": "0"}
            assert connects(20) == [REFUSED] * 20
            assert circuit(lab) == {"state": "open", "watch_only": True, "refused": str(20 - THRESHOLD)}
            killed(run)
        assert connects(3) == [REFUSED] * 3  # nobody is there, and it only watches
        with running(lab, pin=True, mode="monitor") as run:
            run.until("armed")
            assert circuit(lab)["refused"] == str(23 - THRESHOLD)  # the same mode: it goes on
            killed(run)
        with running(lab, pin=True) as run:
            run.until("armed")
            assert circuit(lab) == {"state": "closed", "watch_only": False, "refused": "0"}
            assert connects(THRESHOLD + 1) == [REFUSED] * THRESHOLD + [BLOCKED]
    finally:
        Pins(lab.state).drop()
        remove_empty(f"pointcall-run-{os.getpid()}/clients/keep")


@pytest.mark.kernel
def test_what_is_pinned_lets_pass_also_where_nothing_can_be_armed(
    real_kernel: None, bpffs: None, lab: Lab, tmp_path: Path
) -> None:
    put(lab, tmp_path, 1)
    try:
        with running(lab, pin=True) as run:
            run.until("armed")
            assert connects(THRESHOLD + 1)[-1] == BLOCKED
            killed(run)
        (lab.state / "manifest" / "manifest.sigstore.json").write_text("{}")
        with running(lab, pin=True, mode="monitor") as run:
            run.until("refused")
            assert connects(5) == [REFUSED] * 5
            killed(run)
        assert ended_at_start(lab) == [{"mode": "monitor", "circuits": f"1: tcp://127.0.0.1:{DEAD_PORT}"}]
        with running(lab, pin=True, mode="monitor") as run:
            run.until("refused")
        assert len(ended_at_start(lab)) == 1, "what only watches is no lease"
    finally:
        Pins(lab.state).drop()
        remove_empty(f"pointcall-run-{os.getpid()}/clients/keep")


# ---- without a kernel -----------------------------------------------------------------------------------------------


def watching(lab: Lab, do: Callable[[Watched], None]) -> None:
    node = RecordedNode()
    with lab.executor(node, mode="monitor") as executor:
        do(Watched(lab, executor, node))


def test_a_circuit_cannot_be_tripped_by_hand(lab: Lab) -> None:
    def story(watched: Watched) -> None:
        watched.arm()
        before = watched.kinds()
        with pytest.raises(ArmingError) as refusal:
            watched.executor.trip(Address.parse("127.0.0.1"), PORT, 10**9, "looks bad")
        assert (refusal.value.id, refusal.value.want) == ("circuit.monitor", "mode enforce")
        assert watched.kinds() == [*before, "refusal"]
        assert watched.refusals()[-1] == "circuit.monitor"
        assert watched.node.current_sensors is not None
        assert watched.node.current_sensors.commands == []
        watched.executor.release(Address.parse("127.0.0.1"), PORT, "fine")

    watching(lab, story)


def test_the_status_says_what_is_in_force_not_what_the_manifest_says(lab: Lab) -> None:
    def story(watched: Watched) -> None:
        status = ExecutorBackend(watched.executor).status()
        assert (status.mode, status.runbooks) == ("monitor", ())
        watched.arm()
        status = ExecutorBackend(watched.executor).status()
        assert [(b.name, b.mode, b.state) for b in status.runbooks] == [("fix", "monitor", "armed")]

    watching(lab, story)


def test_what_ended_because_this_node_only_watches_is_in_the_log(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"circuits": ["tcp://192.0.2.1:443", "tcp://192.0.2.2:443"], "isolations": [f"pointcall/{'x' * 2000}"]}
    monkeypatch.setattr(RecordedNode, "ended", lambda _self: gone)
    watching(lab, lambda _watched: None)
    (detail,) = ended_at_start(lab)
    assert (detail["mode"], detail["circuits"]) == ("monitor", "2: tcp://192.0.2.1:443, tcp://192.0.2.2:443")
    assert detail["isolations"].startswith("1: pointcall/x")
    assert len(detail["isolations"]) == MAX_TEXT


def test_what_would_have_been_told_names_its_channel(lab: Lab) -> None:
    def story(watched: Watched) -> None:
        body = spec(lab)
        body["runbooks"][0]["parameters"] = {"LIMIT": 0}
        watched.arm(body)
        (acted,) = watched.happen(opened()).actions
        assert (acted.action, acted.target, acted.outcome) == ("notify", "ops", "monitored")

    watching(lab, story)
