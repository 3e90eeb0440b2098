"""The auditor: what must never happen, counted by hand. It shares no rule with the guard and trusts no word of it.

It stands at the edges: what the core was asked and answered, what began and ended on services and circuits, what became
durable, what an operator was told. Each broken rule is a `BrokenError` with the name of its invariant.
"""

from __future__ import annotations

import collections
import ipaddress
import zlib
from collections.abc import Collection
from typing import Any

from pointcall_executor.core.step import Decided, Effect, Ended, Happened, Input, Perform, State, Withhold
from pointcall_runbook.vocabulary import Action, Recreate, capability
from tests.sim.disk import Leaf
from tests.sim.scheduler import MINUTE, SECOND

HARMLESS = ("notify", "escalate", "remember", "again")
ENDS_BY_ITSELF = ("open_circuit",)
HOUR = 60 * MINUTE
RECONCILED = 4096  # entries that the executor looks through at start
LATE_NS = 30 * SECOND  # a loss that is older is in the log, whatever held up the loop

INVARIANTS = {
    "target": "never two actions on one target at once",
    "radius": "never more services or circuits at once than the manifest allows",
    "lease": "every lease ends within the hour, and when it said",
    "intent": "an action that does not end by itself begins after its intent is durable",
    "outcome": "every intent has exactly one outcome, also across crashes",
    "receipt": "every finished run has exactly one receipt, which tells what the log tells",
    "disarmed": "nothing that was decided before a disarming or a failure begins after it",
    "paused": "no action begins while the executor is paused",
    "rate": "no more actions than the limits allow",
    "flapping": "a service that is recreated again and again is left alone for longer and longer",
    "monitor": "a runbook in mode monitor never acts",
    "granted": "an action is one that the manifest grants, on a target that it grants and does not forbid",
    "quarantine": "a module that trapped does not decide again",
    "acknowledged": "what was acknowledged is in the log",
    "epoch": "every entry belongs to the epoch that is open",
    "loss": "lost events are counted exactly",
    "protected": "while a manifest is armed its breaker is attached",
    "failed": "the executor stops for a failed journal and for nothing else",
    "ends": "everything that was begun ends",
}


class BrokenError(AssertionError):
    """An invariant does not hold."""

    def __init__(self, name: str, what: str) -> None:
        assert name in INVARIANTS, name
        super().__init__(f"{name}: {INVARIANTS[name]}: {what}")
        self.name = name


def target_of(action: Action) -> tuple[Any, ...]:
    if hasattr(action, "service"):
        return ("service", action.service.number)
    if hasattr(action, "address"):
        return ("circuit", str(action.address), action.port)
    return ("else", capability(type(action)))


class Auditor:
    """One for each machine. `known` names findings that are counted instead of raised."""

    def __init__(self, machine: Any, known: frozenset[str] = frozenset()) -> None:
        self.machine, self.known = machine, known
        self.broken: BrokenError | None = None
        self.counts: collections.Counter[str] = collections.Counter()
        self.found: collections.Counter[str] = collections.Counter()
        # the log
        self.epoch = ""
        self.intents: collections.Counter[tuple[Any, ...]] = collections.Counter()
        self.orphans: collections.Counter[tuple[Any, ...]] = collections.Counter()
        self.of_run: dict[str, list[Leaf]] = {}
        self.receipts: set[str] = set()
        self.acknowledged: list[tuple[int, Leaf]] = []
        # the machine
        self.acting: dict[tuple[Any, ...], str] = {}
        self.touched: dict[int, list[bool]] = {}
        self.leases: dict[tuple[int, str], int] = {}
        self.lost_gone = self.lost_reported = self.lost_long_ago = 0
        self.digest = 0  # of everything that was seen: the same seed, the same digest
        self.disarmings = 0
        self.failing = self.armed = False
        self.decided: dict[str, None] = {}  # runs whose receipt is to come
        self.unrecorded: dict[tuple[str, str], None] = {}  # leases of runs whose intent is to come
        self.held: dict[tuple[Any, ...], str] = {}
        self.permitted: dict[tuple[str, int], int] = {}  # (run, index) -> disarmings before
        self._forget()

    def _forget(self) -> None:
        """Every limit counts from nothing."""
        self.paused: tuple[int, int] | None = None  # since, until
        self.pausing: int | None = None
        self.spent: dict[tuple[Any, ...], list[int]] = {}
        self.limits: dict[str, tuple[int, int]] = {}
        self.node: collections.deque[int] = collections.deque()
        self.recreated: dict[int, list[int]] = {}
        self.storm_until = 0
        self.storm: tuple[int, int] = (-MINUTE, 0)

    def new_process(self) -> None:
        """An executor starts. What is in flight ended with the one before; its limits should not have."""
        self.disarmings, self.failing, self.armed = 0, False, False
        self.held.clear()
        self.permitted.clear()
        self.acting.clear()
        self.touched.clear()
        if "guard-forgets" in self.known:
            self._forget()
        for run, target in self.unrecorded:
            self.fail("intent", f"run {run} held {target} open, and the log says nothing", finding="lease-unrecorded")
        for run in self.decided:
            if run not in self.of_run:
                self.fail("receipt", f"run {run} was cut off and is nowhere reported", finding="cut-off-unreported")
        self.unrecorded.clear()
        self.decided.clear()

    def fail(self, name: str, what: str, finding: str = "") -> None:
        if finding and finding in self.known:
            self.found[finding] += 1
            return
        if self.broken is None:
            self.broken = BrokenError(name, what)
        raise self.broken

    def _seen(self, *what: object) -> None:
        self.digest = zlib.crc32(f"{self.now} {what}".encode(), self.digest)

    @property
    def now(self) -> int:
        now: int = self.machine.scheduler.now
        return now

    @property
    def current(self) -> tuple[str, int, str] | None:
        """(run, index, mode) of the action that the running task performs; None: by hand."""
        task = self.machine.scheduler.current
        found: tuple[str, int, str] | None = task.local.get("run") if task is not None else None
        return found

    # ---- the core --------------------------------------------------------------------------------------------------

    def stepped(self, state: State, happening: Input, effects: tuple[Effect, ...]) -> None:
        """What the core was told, and what it said."""
        match happening:
            case Happened():
                if state.armed is None and effects:
                    self.fail("disarmed", "a decision while nothing is armed")
                if state.armed is not None:
                    self._event(state, happening.now_ns)
            case Decided():
                self.decided[happening.run] = None
                for effect in effects:
                    if isinstance(effect, Perform):
                        self._permitted(state, happening, effect)
                    elif isinstance(effect, Withhold) and self._book(state, happening).mode != "monitor":
                        self.fail("monitor", "withheld in mode enforce")
            case Ended():
                target = target_of(happening.action)
                if self.held.get(target) == happening.run:
                    del self.held[target]

    def _book(self, state: State, decided: Decided) -> Any:
        assert state.armed is not None
        spec = self.machine.spec_of(state.armed.manifest)
        return spec.manifest.runbook(decided.runbook.name)

    def _event(self, state: State, now: int) -> None:
        assert state.armed is not None
        guard = self.machine.spec_of(state.armed.manifest).manifest.guard
        since, count = self.storm
        since, count = (now, 1) if now - since >= MINUTE else (since, count + 1)
        self.storm = since, count
        if count > guard.storm_events_per_minute:
            self.storm_until = now + guard.storm_cooldown_seconds * SECOND

    def _permitted(self, state: State, decided: Decided, effect: Perform) -> None:
        """Naive counters of every limit, over what was let through."""
        if state.armed is None:
            self.fail("disarmed", "an action while nothing is armed")
        assert state.armed is not None
        book, now, action = self._book(state, decided), decided.now_ns, effect.action
        manifest = self.machine.spec_of(state.armed.manifest).manifest
        name, target = capability(type(action)), target_of(action)
        what = f"{name} {target} by {book.name} at {now}"
        if book.mode == "monitor":
            self.fail("monitor", what)
        self._granted(book, manifest, action, what)
        if not self.armed:
            self.fail("disarmed", f"{what}, after the log says that it was disarmed")
        if self._is_paused():
            self.fail("paused", what)
        self.permitted[effect.run, effect.index] = self.disarmings
        self.counts[f"permitted {name}"] += 1
        if name in HARMLESS:
            return
        if target in self.held:
            self.fail("target", f"{what}, held by {self.held[target]}")
        self._radius(manifest, target, what)
        self.held[target] = effect.run
        self._rates(book, manifest, target, now, what)
        if isinstance(action, Recreate):
            self._flapping(manifest, action.service.number, now, what)

    def _granted(self, book: Any, manifest: Any, action: Action, what: str) -> None:
        grants, names = book.grants, self.machine.names
        if capability(type(action)) not in grants.actions:
            self.fail("granted", f"{what}: the action")
        never = manifest.guard.never_touch
        if hasattr(action, "service"):
            name = names.get(action.service.number)
            if name not in grants.services or name in never:
                self.fail("granted", f"{what}: the service")
        if hasattr(action, "channel") and names.get(action.channel.number) not in grants.channels:
            self.fail("granted", f"{what}: the channel")
        if hasattr(action, "address"):
            address = ipaddress.ip_address(str(action.address))
            if not any(address in ipaddress.ip_network(n) for n in grants.networks):
                self.fail("granted", f"{what}: the network")
            for item in never:
                if item == f"{address}:{action.port}" or ("/" in item and address in ipaddress.ip_network(item)):
                    self.fail("granted", f"{what}: never to be touched")

    def _radius(self, manifest: Any, target: tuple[Any, ...], what: str) -> None:
        if target[0] != "service":
            return
        total = max(1, len(manifest.services))
        healthy = -(-total * manifest.guard.min_healthy_percent // 100)
        share = max(1, total * manifest.guard.max_services_percent // 100)
        most = min(manifest.guard.max_services_at_once, share, total - healthy)
        now_held = 1 + sum(1 for t in self.held if t[0] == "service")
        if now_held > most:
            self.fail("radius", f"{what}: {now_held} services, at most {most}")

    def _rates(self, book: Any, manifest: Any, target: tuple[Any, ...], now: int, what: str) -> None:
        limits = (book.limits.per_minute, book.limits.burst)
        if self.limits.get(book.name) != limits:
            self.limits[book.name] = limits
            for key in [k for k in self.spent if k[0] == book.name]:
                del self.spent[key]
        times = self.spent.setdefault((book.name, target), [])
        if times and now - times[-1] < book.limits.hold_off_seconds * SECOND:
            self.fail("rate", f"{what}: hold-off")
        times.append(now)
        del times[:-400]
        for k, at in enumerate(reversed(times)):
            if k + 1 > limits[1] + (now - at) * limits[0] / MINUTE:
                self.fail("rate", f"{what}: {k + 1} in {now - at} ns, {limits}")
        if now < self.storm_until:
            self.fail("rate", f"{what}: in a storm")
        while self.node and self.node[0] <= now - MINUTE:
            self.node.popleft()
        self.node.append(now)
        if len(self.node) > manifest.guard.max_actions_per_minute:
            self.fail("rate", f"{what}: {len(self.node)} on the node in a minute")

    def _flapping(self, manifest: Any, number: int, now: int, what: str) -> None:
        times = self.recreated.setdefault(number, [])
        quiet = manifest.guard.healthy_delay_seconds * SECOND or HOUR
        in_a_row = 0
        for i, at in enumerate(times):
            in_a_row = in_a_row + 1 if i and at - times[i - 1] < quiet else 1
        if times and now - times[-1] < quiet:
            pause = min(SECOND << min(in_a_row - 1, 40), 10 * MINUTE)
            if now - times[-1] < pause:
                got = f"{in_a_row} in a row, {pause} ns to wait, {now - times[-1]} ns waited"
                older = any(now - at >= HOUR for at in times[-in_a_row:])
                self.fail("flapping", f"{what}: {got}", finding="flap-forgets" if older else "")
        times.append(now)

    # ---- the world -------------------------------------------------------------------------------------------------

    def begins(self, action: Action) -> None:
        """An action begins in the world."""
        name, target = capability(type(action)), target_of(action)
        if name in HARMLESS:
            return
        by = self.current
        what = f"{name} {target}" + (f" of run {by[0]}" if by else " by hand")
        self.counts[f"began {name}"] += 1
        self._seen(what)
        if target in self.acting:
            self.fail("target", f"{what} while {self.acting[target]}")
        self.acting[target] = what
        if name not in ENDS_BY_ITSELF and not self._intended(name, action, by[0] if by else None):
            self.fail("intent", what)
        if by is None:
            return
        run, index, mode = by
        if mode != "enforce":
            self.fail("monitor", what)
        if (run, index) not in self.permitted:
            self.fail("granted", f"{what}: nobody permitted it")
        if self.permitted[run, index] != self.disarmings:
            self.fail("disarmed", what, finding="begins-after-disarm")
        if self.failing:
            self.fail("disarmed", f"{what}, after the executor failed", finding="begins-after-failure")
        if self.machine.journal is not None and self.machine.journal.failed:
            self.fail("disarmed", f"{what}, after the journal failed", finding="acts-after-journal-failure")
        if self._is_paused():
            self.fail("paused", what, finding="begins-after-pause")

    def _is_paused(self) -> bool:
        return self.paused is not None and self.paused[0] <= self.now < self.paused[1]

    def _intended(self, name: str, action: Action, run: str | None) -> bool:
        kind, *rest = target_of(action)
        text = self.machine.names.get(rest[0], str(rest[0])) if kind == "service" else f"{rest[0]}:{rest[1]}"
        return self.intents[run, name, text] > 0

    def ended(self, action: Action) -> None:
        self.acting.pop(target_of(action), None)

    def touch(self, number: int, *, undoing: bool) -> None:
        """A service is being started or stopped. `undoing`: because a manifest could not be armed."""
        at_once = self.touched.setdefault(number, [])
        at_once.append(undoing)
        if len(at_once) > 1:
            finding = "undo-outside-quiet" if any(at_once) else ""
            self.fail("target", f"service {number} is started or stopped twice at once", finding)

    def untouch(self, number: int, *, undoing: bool) -> None:
        if undoing in self.touched.get(number, ()):
            self.touched[number].remove(undoing)

    def forced(self, held: Any, destination: Any, until_ns: int) -> None:
        """A circuit is forced open."""
        self.counts["forced"] += 1
        by = self.current
        if by is not None:
            self.unrecorded[by[0], f"{destination.address}:{destination.port}"] = None
        if until_ns > self.now + HOUR:
            self.fail("lease", f"{destination} until {until_ns}, now {self.now}")
        if by is None:
            self.leases.pop((id(held), str(destination)), None)
            return
        self.leases[id(held), str(destination)] = until_ns
        manifest = self.machine.armed_manifest()
        alive = [k for k, until in self.leases.items() if until > self.now]
        if manifest is not None and len(alive) > manifest.guard.max_circuits_at_once:
            most = manifest.guard.max_circuits_at_once
            self.fail("radius", f"{len(alive)} circuits held open, at most {most}", finding="radius-forgets")

    def closed(self, held: Any, destination: Any) -> None:
        self.leases.pop((id(held), str(destination)), None)

    def vanished(self, held: Any, ring: Any) -> None:
        """A sensor is out of the kernel, with what nobody drained."""
        self.settle(ring)
        for key in [k for k in self.leases if k[0] == id(held)]:
            del self.leases[key]

    def settle(self, ring: Any) -> None:
        """Nobody is armed with this ring any more: what it lost until now should be in the log."""
        if ring.armed:
            self.lost_gone += ring.lost - ring.told
            self.lost_long_ago += sum(1 for at in ring.losses if at < self.now - LATE_NS)
        ring.told, ring.armed = ring.lost, False
        ring.losses.clear()

    def unprotected(self, destination: Any) -> None:
        self.fail("protected", str(destination))

    # ---- the log ---------------------------------------------------------------------------------------------------

    def durable(self, leaf: Leaf) -> None:
        """An entry is on disk."""
        self.counts[leaf.kind] += 1
        self._seen(leaf.kind, leaf.run, leaf.index)
        match leaf.kind:
            case "epoch-open":
                self.epoch = leaf.epoch
            case _ if leaf.epoch != self.epoch:
                self.fail("epoch", f"{leaf.kind} of {leaf.epoch}, open is {self.epoch}")
            case "epoch-close":
                self.epoch = ""
            case "receipt" if leaf.body["receipt"].run.epoch != leaf.epoch:
                self.fail("epoch", f"a receipt about {leaf.body['receipt'].run.epoch} signed in {leaf.epoch}")
        if leaf.kind in ("intent", "outcome"):
            self._acted(leaf)
        elif leaf.kind == "receipt":
            self._receipt(leaf)
        elif leaf.kind == "lost":
            self.lost_reported += leaf.body["count"]
            lost = self.lost_gone + self.machine.kernel.lost()
            if self.lost_reported > lost:
                what = f"{lost} events were lost, the log says {self.lost_reported}"
                self.fail("loss", what, finding="loss-counted-twice" if self.machine.scenario.pin else "")
        elif leaf.kind == "config" and leaf.body["what"] == "kernel programs":
            self.armed = True
        elif leaf.kind == "config" and leaf.body["what"] == "disarmed":
            self.disarmings += 1
            self.armed = False
        elif leaf.kind == "config" and leaf.body["what"] == "paused" and self.pausing is not None:
            self.paused = (self.now, self.pausing)

    def _acted(self, leaf: Leaf) -> None:
        name = leaf.body["action"]
        key = (leaf.run, name, leaf.body["target"])
        if leaf.run is not None:
            self.unrecorded.pop((leaf.run, leaf.body["target"]), None)
            self.of_run.setdefault(leaf.run, []).append(leaf)
            if leaf.run in self.receipts:
                self.fail("receipt", f"{leaf.kind} of run {leaf.run} after its receipt")
        if name in HARMLESS:
            return
        if leaf.kind == "outcome" and not self.intents[key] and self.orphans[key]:
            self.orphans[key] -= 1  # a later start has found it after all
            return
        self.intents[key] += 1 if leaf.kind == "intent" else -1
        if self.intents[key] < 0:
            self.fail("outcome", f"{key} has an outcome and no intent")

    def _receipt(self, leaf: Leaf) -> None:
        run = leaf.run
        assert run is not None
        if run in self.receipts:
            self.fail("receipt", f"run {run} has two")
        self.receipts.add(run)
        self.decided.pop(run, None)
        receipt = leaf.body["receipt"]
        acted = [a for a in receipt.actions if a.outcome not in ("refused", "monitored")]
        if receipt.run.mode == "monitor" and acted:
            self.fail("monitor", f"run {run} acted")
        told = self.of_run.pop(run, [])
        outcomes = sorted((x.body["action"], x.body["target"], x.body["outcome"]) for x in told if x.kind == "outcome")
        wanted = sorted((a.action, a.target, a.outcome) for a in acted)
        if outcomes != wanted:
            self.fail("receipt", f"run {run}: the log has {outcomes}, the receipt {wanted}")
        intents = sorted((x.body["action"], x.body["target"]) for x in told if x.kind == "intent")
        needed = sorted((a.action, a.target) for a in acted if a.action not in HARMLESS)
        if intents != needed:
            self.fail("intent", f"run {run}: intents {intents}, acted {needed}")

    def acknowledge(self, index: int | None, run: str) -> None:
        """Somebody was told that this receipt is in the log."""
        entries = self.machine.disk.entries
        if index is None or index >= len(entries) or entries[index].run != run or entries[index].kind != "receipt":
            self.fail("acknowledged", f"the receipt of run {run} at {index}")
        self.acknowledged.append((index, entries[index]))

    def restarted(self) -> None:
        """An executor has started: what the last one left open must be closed, what it acknowledged must be there."""
        for key in [key for key, count in self.intents.items() if count]:
            far = len(self.machine.disk.entries) > RECONCILED
            what = f"after a restart an intent has no outcome: {key}"
            self.fail("outcome", what, finding="reconcile-window" if far else "")
            self.orphans[key] += self.intents.pop(key)
        self.of_run.clear()
        entries = self.machine.disk.entries
        for index, leaf in self.acknowledged:
            if index >= len(entries) or entries[index] is not leaf:
                self.fail("acknowledged", f"entry {index} is not what it was")
        self.acknowledged.clear()

    def closed_down(self, busy: Collection[Any]) -> None:
        """An executor ended in order."""
        left = [key for key, count in self.intents.items() if count]
        if left:
            self.fail("outcome", f"at the end intents have no outcome: {left[:3]}")
        if self.held:
            self.fail("ends", f"targets are still held: {list(self.held)[:3]}")
        if self.decided:
            self.fail("receipt", f"runs without one: {list(self.decided)[:3]}")
        if busy:
            self.fail("ends", f"the guard still holds {list(busy)[:3]}")
        lost = self.lost_gone + self.machine.kernel.lost()
        if self.lost_reported != lost and not self.machine.crashes:
            late = self.lost_reported >= self.lost_long_ago
            what = f"{lost} events were lost, the log says {self.lost_reported}"
            self.fail("loss", what, finding="loss-uncounted" if late else "")
