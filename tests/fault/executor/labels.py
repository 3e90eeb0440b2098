"""Where an executor can be cut off: the labelled steps of its life, before and after each, and `kill -9` at one.

A label is `<step>.before` or `<step>.after`, with `#n` for the n-th time. Steps are seams of the executor: entries on
their way to the log, actions, services, circuits, the kernel side, decisions. Nothing in the executor knows of them.
What happens in the world is written to a file that outlives the process: the truth that the log is compared with.
"""

from __future__ import annotations

import collections
import json
import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pointcall_attest import entry
from pointcall_executor import acting
from pointcall_executor.daemon import Executor
from pointcall_executor.journal import Journal
from pointcall_executor.kernel.breaker import BreakerSensor
from pointcall_executor.recorded import RecordedSensors, RecordedServices
from pointcall_executor.recorder import Recorder
from pointcall_executor.runs import Runs
from pointcall_executor.sensors import KernelSensors
from pointcall_executor.services.declared import DeclaredServices
from pointcall_executor.wasm import Runner

KINDS = {cls: kind for kind, cls in entry.BODIES.items()}


class Cut:
    """Counts the labels of this process; at one of them the process is killed. `truth` is appended to, never read."""

    def __init__(self, label: str, truth: Path) -> None:
        self.label, self.seen = label, collections.Counter[str]()
        self._lock = threading.Lock()
        self._truth = os.open(truth, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def at(self, step: str) -> None:
        with self._lock:
            self.seen[step] += 1
            here = f"{step}#{self.seen[step]}"
        if here == self.label:
            os.kill(os.getpid(), signal.SIGKILL)

    def tell(self, what: str, **facts: Any) -> None:
        """One line about the world, in one write."""
        os.write(self._truth, (json.dumps({"what": what, "pid": os.getpid()} | facts) + "\n").encode())

    def around(self, owner: Any, name: str, step: str | Callable[..., str]) -> None:
        """Two labels around a method."""
        real = getattr(owner, name)

        def cut(*args: Any, **how: Any) -> Any:
            title = step if isinstance(step, str) else step(*args)
            self.at(f"{title}.before")
            found = real(*args, **how)
            self.at(f"{title}.after")
            return found

        setattr(owner, name, cut)


def install(cut: Cut) -> None:
    """Labels at every seam of this process."""
    cut.around(Recorder, "record", lambda _self, body, *_: f"record-{KINDS[type(body)]}")
    cut.around(Recorder, "submit", lambda _self, body, *_: f"submit-{KINDS[type(body)]}")
    for name in ("receipt", "roll", "reconcile", "close"):
        cut.around(Recorder, name, f"log-{name}")
    cut.around(Journal, "raise_sequence", "sequence")
    cut.around(Journal, "_commit", "commit")
    cut.around(Runs, "record", "event")
    cut.around(Executor, "_switch", "switch")
    cut.around(Executor, "_disarm", "disarm")
    cut.around(Runner, "decide", "decide")
    for sensors in (KernelSensors, RecordedSensors):
        for name in ("keep", "stop", "leave"):
            cut.around(sensors, name, name)
    for services in (DeclaredServices, RecordedServices):
        for name in ("destroy", "start"):
            _told(cut, services, name, f"service-{name}")
            cut.around(services, name, f"service-{name}")
    _told(cut, BreakerSensor, "force", "circuit-force")
    _told(cut, RecordedSensors, "force", "circuit-force")
    acting.REGISTRY = _watched(cut, acting.REGISTRY)  # type: ignore[misc]


def _told(cut: Cut, owner: Any, name: str, what: str) -> None:
    real = getattr(owner, name)

    def told(self: Any, first: Any, *args: Any, **how: Any) -> Any:
        cut.tell(what, about=str(first))
        return real(self, first, *args, **how)

    setattr(owner, name, told)


def _watched(cut: Cut, registry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Each action says in the truth that it begins and ends, and whether its intent was in the log by then."""
    intended: collections.Counter[str] = collections.Counter()
    real = Recorder.record

    def record(self: Recorder, body: entry.Body, run: str | None = None) -> int:
        index = real(self, body, run)
        if isinstance(body, entry.Intent):
            intended[body.action] += 1
        return index

    Recorder.record = record  # type: ignore[method-assign]

    def watched(name: str, perform: Callable[..., Any]) -> Callable[..., Any]:
        def act(action: Any, world: Any) -> Any:
            cut.at(f"act-{name}.before")
            cut.tell("begin", action=name, intended=intended[name])
            done = perform(action, world)
            cut.tell("end", action=name, outcome=done.outcome.name.lower())
            cut.at(f"act-{name}.after")
            return done

        return act

    return {name: replace(verb, perform=watched(name, verb.perform)) for name, verb in registry.items()}
