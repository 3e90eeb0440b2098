"""Runbooks and manifests from a seed: the library's real modules, some of our own in the language, and random deciders.

A real module decides through the interpreter. A random decider stands for a module of any toolchain: calls that are not
well-formed, foreign targets, too many of them, traps.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pointcall_attest.manifest import Manifest, Predicate
from pointcall_executor.actions import REGISTRY
from pointcall_executor.arming import BUILT_IN
from pointcall_runbook import Call, Decided, Interpreter, Trap, compile_source
from pointcall_runbook.vocabulary import ACTIONS, EVENTS, arity, channel, service
from pointcall_runbook.vocabulary import digest as vocabulary_digest

LIBRARY = Path(__file__).parents[2] / "runbooks" / "library"
HANDLED = ("CircuitOpened", "CircuitClosed", "OomKilled", "ProcessExited", "ActionDone", "Timer")
CHANNELS = ("ops", "oncall")
NAMES = ("api", "db", "cache", "canary", "queue", "auth")
SOURCES = {
    "recreate-at-once": '''"""Recreate what is refused, what was killed and what ended."""
from pointcall_runbook import NO_SERVICE, CircuitOpened, Decision, OomKilled, ProcessExited, Recreate, runbook

@runbook
def opened(e: CircuitOpened) -> Decision:
    if e.service == NO_SERVICE:
        return []
    return [Recreate(service=e.service)]

@runbook
def killed(e: OomKilled) -> Decision:
    if e.service == NO_SERVICE:
        return []
    return [Recreate(service=e.service)]

@runbook
def exited(e: ProcessExited) -> Decision:
    if e.service == NO_SERVICE:
        return []
    return [Recreate(service=e.service)]
''',
    "hold-and-retry": '''"""Hold a circuit open, look again later, close it when it was enough."""
from pointcall_runbook import (
    NO_SERVICE, ActionDone, Again, CircuitClosed, CircuitOpened, CloseCircuit, Decision, Level, Notify, OpenCircuit,
    Outcome, Recreate, Remember, Timer, channel, minutes, parameter, remembered, runbook, seconds
)

OPS = channel("ops")
HOLD = parameter(seconds(5), lo=seconds(1), hi=minutes(30))
TRIES = remembered(0, hi=5)

@runbook
def opened(e: CircuitOpened) -> Decision:
    if TRIES >= 5:
        return [Notify(channel=OPS, level=Level.ERROR, code=1), Remember(slot=TRIES.slot, value=0)]
    return [
        OpenCircuit(address=e.address, port=e.port, hold=HOLD), Again(after=HOLD, tag=1),
        Remember(slot=TRIES.slot, value=TRIES + 1),
    ]

@runbook
def closed(e: CircuitClosed) -> Decision:
    return [CloseCircuit(address=e.address, port=e.port), Remember(slot=TRIES.slot, value=0)]

@runbook
def due(e: Timer) -> Decision:
    if e.service == NO_SERVICE:
        return []
    return [Recreate(service=e.service)]

@runbook
def done(e: ActionDone) -> Decision:
    if e.outcome == Outcome.APPLIED:
        return []
    return [Notify(channel=OPS, level=Level.WARNING, code=2), Again(after=seconds(30), tag=2)]
''',
}


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the pool: what decides, and what is known of it."""

    name: str
    sha256: str
    info: Any
    interpreter: Interpreter | None  # None: a random decider


@functools.cache
def modules() -> tuple[Module, ...]:
    """Every module that this executor can arm and that handles an event it can have."""
    sources = {p.parent.name: p.read_text() for p in sorted(LIBRARY.glob("*/runbook.py"))} | SOURCES
    found = []
    for name, source in sources.items():
        compiled = compile_source(source)
        able = set(compiled.info.capabilities) <= REGISTRY.keys() | BUILT_IN
        if able and set(compiled.info.handlers) & set(HANDLED):
            found.append(Module(name, compiled.info.sha256, compiled.info, Interpreter(compiled.wasm)))
    return tuple(found)


def random_module(chance: random.Random, number: int) -> Module:
    """A decider of any toolchain."""
    events = chance.sample(HANDLED, chance.randint(1, len(HANDLED)))
    able = sorted(REGISTRY.keys() | BUILT_IN)
    capabilities = tuple(chance.sample(able, chance.randint(1, len(able))))
    slots_ = tuple(SimpleNamespace(name=f"s{i}", initial=0, lo=0, hi=7) for i in range(chance.randint(0, 2)))
    handlers = {
        e: SimpleNamespace(event=e, arity=arity(EVENTS[e]) + len(slots_), fuel_bound=100, capabilities=capabilities)
        for e in events
    }
    info = SimpleNamespace(handlers=handlers, capabilities=capabilities, parameters=(), slots=slots_)
    name = f"random-{number}"
    sha256 = hashlib.sha256(f"{name}{chance.random()}".encode()).hexdigest()
    return Module(name, sha256, info, None)


class Runner:
    """What wasm.Runner is, for a module of the pool. Told to each decision: the auditor."""

    def __init__(self, machine: Any, spec: Spec, name: str) -> None:
        self.machine, self.spec, self.name = machine, spec, name
        self.module = spec.modules[name]

    def decide(self, event: str, args: tuple[int, ...]) -> Decided:
        self.machine.scheduler.alive()
        if self.module.interpreter is not None:
            return self.module.interpreter.run(event, args)
        chance: random.Random = self.machine.scheduler.random
        if not any(args):  # warming up
            return Decided((), 1)
        draw = chance.random()
        if draw < 0.002:
            raise Trap("unreachable")
        count = 9 if draw < 0.004 else chance.choice((0, 1, 1, 1, 2, 2, 3, 8))
        return Decided(tuple(self._call(chance) for _ in range(count)), 1)

    def _call(self, chance: random.Random) -> Call:
        action = chance.choice(self.module.info.capabilities)
        if chance.random() < 0.02:
            return Call(action, tuple(chance.randint(-(2**63), 2**63 - 1) for _ in range(arity(ACTIONS[action]))))
        return Call(action, tuple(_signed(a) for a in self._arguments(chance, action)))

    def _arguments(self, chance: random.Random, action: str) -> tuple[int, ...]:
        number = chance.choice(self.machine.numbers)
        address, port = chance.choice(self.machine.places)
        hold = chance.choice((0, 10**6, 10**9, 5 * 10**9, 60 * 10**9, 3600 * 10**9))
        match action:
            case "recreate":
                return (number, chance.choice((0, 0, 10**8, 10**9)))
            case "notify":
                return (channel(chance.choice((*CHANNELS, "nowhere"))).number, chance.randrange(5), 1)
            case "escalate":
                return (channel(chance.choice(CHANNELS)).number, 1)
            case "open_circuit":
                return (address.hi, address.lo, port, hold)
            case "close_circuit" | "kill_connections":
                return (address.hi, address.lo, port)
            case "isolate" | "freeze":
                return (number, hold)
            case "remember":
                return (chance.randrange(3), chance.randrange(9))
            case "again":
                return (chance.choice((0, 10**6, 10**9, 60 * 10**9)), chance.randrange(3))
            case "kill":
                return (number, chance.choice((9, 15, 1)))
            case _:
                return (number,)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@dataclass(frozen=True, slots=True)
class Spec:
    """A manifest of the scenario, with what the auditor must know of it in plain words."""

    manifest: Manifest
    modules: Mapping[str, Module]
    declarations: Mapping[str, Any]
    refused: str = ""  # the check that refuses it, whatever the node says
    services: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True)
class Town:
    """What there is to declare: service names and where each listens."""

    listens: Mapping[str, tuple[tuple[str, int], ...]]


def town(chance: random.Random) -> Town:
    names = chance.sample(NAMES, chance.randint(1, len(NAMES)))
    listens = {}
    for i, name in enumerate(names):
        places = [(f"10.0.{i}.{j + 1}", 80 + i) for j in range(chance.randint(0, 2))]
        if chance.random() < 0.2:
            places.append((f"fd00::{i + 1}", 80))
        listens[name] = tuple(places)
    return Town(listens)


def spec(chance: random.Random, where: Town, sequence: int, number: int, at: datetime) -> Spec:
    """A random manifest over the town."""
    pool = list(chance.sample(modules(), min(len(modules()), chance.randint(1, 3))))
    pool += [random_module(chance, number * 10 + i) for i in range(chance.randint(0, 2))]
    sensors = ["breaker", *(n for n in ("lifecycle", "connections", "isolate") if chance.random() < 0.95)]
    declared = {n: hashlib.sha256(f"{n}{chance.randrange(2)}".encode()).hexdigest() for n in where.listens}
    body = {
        "format": "pointcall-manifest/v1",
        "name": "sim",
        "sequence": sequence,
        "previous": None,
        "not_before": _instant(at - timedelta(days=1)),
        "expires": _instant(at + timedelta(seconds=chance.choice((60, 600, 86_400, 86_400, 864_000)))),
        "vocabulary": vocabulary_digest(),
        "runbooks": [_runbook(chance, where, m) for m in pool],
        "sensors": [{"name": n, "blob": f"{n}.blob"} for n in sensors],
        "services": [
            {
                "name": n,
                "kind": "process",
                "declaration": f"{n}.json",
                "digest": declared[n],
                "listen": [{"address": a, "port": p} for a, p in places],
            }
            for n, places in where.listens.items()
        ],
        "channels": [_channel(chance, n) for n in CHANNELS],
        "guard": _guard(chance, where),
    }
    predicate = Predicate.model_validate_json(_json(body))
    digest = hashlib.sha256(f"{number}{chance.random()}".encode()).hexdigest()
    subjects = {f"{m.name}.wasm": m.sha256 for m in pool} | {f"{s}.blob": "0" * 64 for s in sensors}
    refused = "manifest.signer" if chance.random() < 0.05 else ""
    return Spec(
        Manifest(b"payload %d" % number, digest, subjects, predicate),
        {m.name: m for m in pool},
        {n: SimpleNamespace(sha256=d, name=n) for n, d in declared.items()},
        refused,
        frozenset(service(n).number for n in where.listens),
    )


def _json(body: object) -> str:
    import json

    return json.dumps(body)


def _instant(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def _runbook(chance: random.Random, where: Town, module: Module) -> dict[str, Any]:
    events = [e for e in module.info.handlers if e in HANDLED]
    some = [n for n in where.listens if chance.random() < 0.8]
    nets = chance.choice((["10.0.0.0/8"], ["10.0.0.0/8", "fd00::/16"], ["10.0.1.0/24"], []))
    return {
        "name": module.name,
        "version": 1,
        "module": f"{module.name}.wasm",
        "events": events,
        "grants": {
            "actions": [a for a in module.info.capabilities if chance.random() < 0.95],
            "services": some,
            "channels": list(CHANNELS[: chance.randint(1, 2)]),
            "networks": nets,
        },
        "limits": {
            "per_minute": chance.choice((1, 6, 60, 600)),
            "burst": chance.choice((1, 3, 10, 100)),
            "hold_off_seconds": chance.choice((0, 0, 0, 1, 30)),
            "approval": _approval(chance, module),
        },
        "mode": "monitor" if chance.random() < 0.2 else "enforce",
    }


def _channel(chance: random.Random, name: str) -> dict[str, str]:
    kind, address = chance.choice((("log", ""), ("unix", f"/run/{name}"), ("webhook", f"https://{name}.example/")))
    return {"name": name, "kind": kind, "address": address}


def _approval(chance: random.Random, module: Module) -> list[str]:
    able = sorted(module.info.capabilities)
    return chance.sample(able, chance.randint(1, len(able))) if able and chance.random() < 0.3 else []


def _guard(chance: random.Random, where: Town) -> dict[str, Any]:
    never = [n for n in where.listens if chance.random() < 0.05]
    if chance.random() < 0.1:
        never.append("10.0.0.1:80")
    if chance.random() < 0.1:
        never.append("10.0.2.0/24")
    return {
        "max_actions_per_minute": chance.choice((1, 10, 60, 600, 6000)),
        "max_services_at_once": chance.choice((1, 1, 2, 3)),
        "max_services_percent": chance.choice((100, 100, 50, 20)),
        "min_healthy_percent": chance.choice((0, 0, 0, 50)),
        "max_circuits_at_once": chance.choice((1, 2, 64)),
        "storm_events_per_minute": chance.choice((20, 600, 100_000)),
        "storm_cooldown_seconds": chance.choice((0, 5, 300)),
        "healthy_delay_seconds": chance.choice((0, 5, 60, 7200)),
        "never_touch": never,
    }
