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

from pointcall_executor.core.step import Decided, Effect, Ended, Happened, Input, Perform, Refuse, State, Withhold
from pointcall_runbook.vocabulary import Action, Recreate, Thaw, capability
from tests.sim.disk import Leaf
from tests.sim.scheduler import MINUTE, SECOND

HARMLESS = ("notify", "escalate", "remember", "again")
ENDS_BY_ITSELF = ("open_circuit", "isolate")
HOUR = 60 * MINUTE
TOLD_NS = 6 * MINUTE  # in this time whoever was called and has not answered is called again
WAITING_MAX = 1024  # calls that wait for an answer; the oldest is given up
APPROVED_NS = MINUTE  # how long an approval waits for what the guard holds back
TURNS = 3  # of the loop: after so many that began when it was time to look, it has looked

INVARIANTS = {
    "target": "never two actions on one target at once",
    "radius": "never more services or circuits at once than the manifest allows",
    "lease": "every lease ends within the hour, and when it said",
    "intent": "an action that does not end by itself begins after its intent is durable",
    "outcome": "every intent has exactly one outcome, also across crashes",
    "receipt": "every finished run has exactly one receipt, which tells what the log tells",
    "disarmed": "nothing that was decided before a disarming or a failure begins after it",
    "by hand": "what a person disarmed stays disarmed, also after a restart, until a person arms",
    "paused": "no action begins while the executor is paused, also after a restart",
    "halted": "a node that is halted arms nothing and begins nothing",
    "approved": "what needs a second person happens once for each approval, of exactly this call",
    "called": "an action that did not do what it should calls a person, again and again until somebody answers",
    "rollback": "what was rolled back holds nothing in the guard",
    "loop": "nothing that may be slow happens on the thread that decides",
    "rate": "no more actions than the limits allow",
    "flapping": "a service that is recreated again and again is left alone for longer and longer",
    "monitor": "a runbook in mode monitor never acts, and a node in it refuses no connect",
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
        self.of_run: dict[str, list[Leaf]] = {}
        self.receipts: set[str] = set()
        self.acknowledged: list[tuple[int, Leaf]] = []
        # the machine
        self.acting: dict[tuple[Any, ...], str] = {}
        self.touched: dict[int, list[bool]] = {}
        self.leases: dict[tuple[int, str], int] = {}
        self.lost_gone = self.lost_reported = 0
        self.digest = 0  # of everything that was seen: the same seed, the same digest
        self.disarmings = 0
        self.failing = self.armed = False
        self.cut_off = False  # an executor ended without writing down everything
        self.decided: dict[str, None] = {}  # runs whose receipt is to come
        self.unrecorded: dict[tuple[str, str], None] = {}  # leases of runs whose intent is to come
        self.held: dict[tuple[Any, ...], str] = {}
        self.permitted: dict[tuple[str, int], int] = {}  # (run, index) -> disarmings before
        # people
        self.paused: tuple[int, int] | None = None  # since, until
        self.pausing: int | None = None
        self.asked: dict[tuple[str, int], tuple[str, Action, str]] = {}  # (run, index) -> runbook, action, manifest
        self.approved: list[tuple[int, tuple[str, Action, str]]] = []  # when, what
        self.waiting: dict[str, tuple[int, int]] = {}  # run -> since, code
        self.answered: dict[str, None] = {}
        self.arming: list[Any] = []  # executors that a person has asked to arm, and that have not answered
        self.by_hand = False  # a person has disarmed, and no person has armed since
        self.called: dict[str, None] = {}  # runs of this process whose call was written
        self.tells: dict[int, list[int]] = {}  # code -> when a channel was told
        self.rolled_back: dict[tuple[str, tuple[Any, ...]], None] = {}  # (run, target)
        # what survives a restart
        self.node: collections.deque[tuple[int, str, int]] = collections.deque()  # when, run, index
        self.recreated: dict[int, list[tuple[int, str, int, int]]] = {}  # and the quiet that counts as recovered
        self.recalled = False  # nothing is armed yet that says how to count it
        self.intended: set[tuple[str | None, str, str]] = set()
        self.meant: dict[
            tuple[str, int], tuple[str | None, str, str]
        ] = {}  # (run, index) -> its intent, once it is written
        self._forget()

    def _forget(self) -> None:
        """What an executor that starts may count from nothing."""
        self.began, self.session_since = self.now, -1
        self.pausing, self.resuming = None, 0
        self.spent: dict[tuple[Any, ...], list[int]] = {}
        self.limits: dict[str, tuple[int, int]] = {}
        self.storm_until = 0
        self.storm: tuple[int, int] = (-MINUTE, 0)

    def new_process(self) -> None:
        """An executor starts. What is in flight ended with the one before; its limits should not have."""
        self.cut_off = self.cut_off or self.failing or bool(self.machine.crashes)
        self.disarmings, self.failing, self.armed = 0, False, False
        self.arming = []
        if not self.machine.scenario.pin:  # what it had not yet written down is gone with it
            self.lost_reported = self.lost_gone
        self.held.clear()
        self.permitted.clear()
        self.acting.clear()
        self.touched.clear()
        for gone in (
            self.unrecorded,
            self.decided,
            self.asked,
            self.approved,
            self.called,
            self.tells,
            self.rolled_back,
        ):
            gone.clear()
        self._forget()
        jumped = self.machine.jumped_ns  # the log knows wall-clock time only
        if self.paused is not None and self.paused[0] <= jumped:
            self.paused = None
        self.node = collections.deque(one for one in self.node if self._in_the_log(one, jumped))
        for number, times in self.recreated.items():
            self.recreated[number] = [one for one in times if self._in_the_log(one[:3], jumped)]
        self.recalled = True

    def arms(self, manifest: Any) -> None:
        """The first manifest of an executor says what quiet ended a row before it."""
        if self.recalled:
            self.recalled, quiet = False, self._quiet(manifest)
            for number, times in self.recreated.items():
                self.recreated[number] = [(at, run, index, quiet) for at, run, index, _ in times]

    @staticmethod
    def _quiet(manifest: Any) -> int:
        return manifest.guard.healthy_delay_seconds * SECOND or HOUR  # type: ignore[no-any-return]

    def _in_the_log(self, one: tuple[int, str, int], jumped: int) -> bool:
        at, run, index = one
        return at > jumped and self.meant.get((run, index)) in self.intended

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
                    elif isinstance(effect, Withhold) and self._mode(state, happening) != "monitor":
                        self.fail("monitor", "withheld in mode enforce")
                    elif isinstance(effect, Refuse) and effect.refusal.rule == "guard.approval":
                        assert effect.action is not None
                        assert state.armed is not None
                        about = (happening.runbook.name, effect.action, state.armed.manifest)
                        self.asked[effect.run, effect.index] = about
            case Ended():
                target = target_of(happening.action)
                if (happening.run, target) in self.rolled_back:
                    del self.rolled_back[happening.run, target]
                    if (capability(type(happening.action)), *target) in state.guard.leases:
                        self.fail("rollback", f"{happening.action} of run {happening.run}")
                if self.held.get(target) == happening.run:
                    del self.held[target]

    def _book(self, state: State, decided: Decided) -> Any:
        assert state.armed is not None
        spec = self.machine.spec_of(state.armed.manifest)
        return spec.manifest.runbook(decided.runbook.name)

    def _mode(self, state: State, decided: Decided) -> str:
        mode: str = self.machine.mode_of(self._book(state, decided))
        return mode

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
        if self._mode(state, decided) == "monitor":
            self.fail("monitor", what)
        if name in book.limits.approval:
            self._approval((book.name, action, state.armed.manifest), now, what)
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
        self._radius(manifest, action, target, what)
        self.held[target] = effect.run
        one = (now, effect.run, effect.index)
        self.meant[effect.run, effect.index] = self._intent_of(name, action, effect.run)
        self._rates(book, manifest, target, one, what)
        if isinstance(action, Recreate):
            self._flapping(manifest, action.service.number, one, what)

    def _approval(self, about: tuple[str, Action, str], now: int, what: str) -> None:
        for one in self.approved:
            if one[1] == about and now - one[0] <= APPROVED_NS:
                self.approved.remove(one)
                self.counts["approved action"] += 1
                return
        self.fail("approved", what)

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

    def _radius(self, manifest: Any, action: Action, target: tuple[Any, ...], what: str) -> None:
        if target[0] != "service":
            return
        total = max(1, len(manifest.services))
        healthy = -(-total * manifest.guard.min_healthy_percent // 100)
        share = max(1, total * manifest.guard.max_services_percent // 100)
        most = min(manifest.guard.max_services_at_once, share, total - healthy)
        touched = {target[1]} | {t[1] for t in self.held if t[0] == "service"}
        if not isinstance(action, Thaw):
            touched |= self.machine.held_services()
        if len(touched) > most:
            self.fail("radius", f"{what}: services {sorted(touched)}, at most {most}")

    def _rates(self, book: Any, manifest: Any, target: tuple[Any, ...], one: tuple[int, str, int], what: str) -> None:
        now = one[0]
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
        while self.node and self.node[0][0] <= now - MINUTE:
            self.node.popleft()
        self.node.append(one)
        if len(self.node) > manifest.guard.max_actions_per_minute:
            self.fail("rate", f"{what}: {len(self.node)} on the node in a minute")

    def _flapping(self, manifest: Any, number: int, one: tuple[int, str, int], what: str) -> None:
        now, kept = one[0], self.recreated.setdefault(number, [])
        times = [at for at, _, _, _ in kept]
        quiet = self._quiet(manifest)
        in_a_row = 0
        for i, at in enumerate(times):
            in_a_row = in_a_row + 1 if i and at - times[i - 1] < kept[i][3] else 1
        if times and now - times[-1] < quiet:
            pause = min(SECOND << min(in_a_row - 1, 40), 10 * MINUTE)
            if now - times[-1] < pause:
                got = f"{in_a_row} in a row, {pause} ns to wait, {now - times[-1]} ns waited"
                self.fail("flapping", f"{what}: {got}")
        kept.append((*one, quiet))

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
            self.fail("disarmed", what)
        if self.failing:
            self.fail("disarmed", f"{what}, after the executor failed")
        if self.machine.journal is not None and self.machine.journal.failed:
            self.fail("disarmed", f"{what}, after the journal failed")
        if self._is_paused():
            self.fail("paused", what)
        if self.machine.halt is not None and (self.machine.halted_ns <= self.began or self._has_looked()):
            self.fail("halted", what)

    def _has_looked(self) -> bool:
        """Whether the loop was bound to see that the node is halted."""
        executor, beats = self.machine.looked_from
        return executor is not None and executor is self.machine.executor and executor.beats >= beats + TURNS

    def performed(self, action: Action, done: Any) -> None:
        """What became of an action, before anybody writes it down."""
        by = self.current
        if by is not None and done.detail.get("rolled_back") == "yes":
            self.counts["rolled back"] += 1
            self.rolled_back[by[0], target_of(action)] = None

    def _is_paused(self) -> bool:
        if self.paused is None or self.resuming:
            return False
        return self.paused[0] <= self.now < self.paused[1]

    def _intended(self, name: str, action: Action, run: str | None) -> bool:
        return self.intents[self._intent_of(name, action, run)] > 0

    def _intent_of(self, name: str, action: Action, run: str | None) -> tuple[str | None, str, str]:
        kind, *rest = target_of(action)
        text = self.machine.names.get(rest[0], str(rest[0])) if kind == "service" else f"{rest[0]}:{rest[1]}"
        return run, name, text

    def ended(self, action: Action) -> None:
        self.acting.pop(target_of(action), None)

    def touch(self, number: int, *, undoing: bool) -> None:
        """A service is being started or stopped. `undoing`: because a manifest could not be armed."""
        at_once = self.touched.setdefault(number, [])
        at_once.append(undoing)
        if len(at_once) > 1:
            self.fail(
                "target", f"service {number} is started or stopped twice at once" + " while undoing" * any(at_once)
            )

    def untouch(self, number: int, *, undoing: bool) -> None:
        if undoing in self.touched.get(number, ()):
            self.touched[number].remove(undoing)

    def forced(self, held: Any, destination: Any, until_ns: int) -> None:
        """A circuit is forced open."""
        self.counts["forced"] += 1
        by = self.current
        if by is not None:
            self.unrecorded[by[0], f"{destination.address}:{destination.port}"] = None
        if by is None:
            self.leases.pop((id(held), str(destination)), None)
            return
        self.leases[id(held), str(destination)] = until_ns
        manifest = self.machine.armed_manifest()
        alive = [k for k, until in self.leases.items() if until > self.now]
        if manifest is not None and len(alive) > manifest.guard.max_circuits_at_once:
            most = manifest.guard.max_circuits_at_once
            self.fail("radius", f"{len(alive)} circuits held open, at most {most}")

    def taken_over(self, before: Any, held: Any) -> None:
        """Another breaker goes on with what one held open, as far as it watches it: what is never touched is not."""
        watched = {str(destination) for destination in held.circuits}
        for key in [k for k in self.leases if k[0] == id(before) and k[1] in watched]:
            self.leases[id(held), key[1]] = self.leases[key]

    def asks_for(self, until_ns: int) -> None:
        """Somebody wants something to be held until then."""
        self.counts["leases"] += 1
        if until_ns > self.now + HOUR:
            self.fail("lease", f"until {until_ns}, now {self.now}")

    def told(self, number: int, code: int, *, waits: bool) -> None:
        """A channel is told something."""
        task = self.machine.scheduler.current
        if waits and task is not None and task.name == "core":
            self.fail("loop", f"channel {number} is told by it")
        self.tells.setdefault(code, []).append(self.now)

    def are_called_again(self) -> None:
        """Whoever has not answered was called lately."""
        if self.session_since < 0:
            return
        since = self.now - TOLD_NS
        wanted = collections.Counter(
            code for at, code in self.waiting.values() if max(at, self.began, self.session_since) < since
        )
        for code, number in wanted.items():  # a call says what it is about, not for which run
            times = self.tells[code] = [at for at in self.tells.get(code, ()) if at >= since]
            self.counts["called again"] += len(times)
            if not times:
                self.fail("called", f"{number} wait for an answer about {code}, nobody called in {TOLD_NS} ns")

    def closed(self, held: Any, destination: Any) -> None:
        self.leases.pop((id(held), str(destination)), None)

    def vanished(self, held: Any, ring: Any, lost: int) -> None:
        """A sensor is out of the kernel, with what nobody drained; `lost` while somebody was there to count."""
        if ring.armed:
            self.lost_gone += lost
        for key in [k for k in self.leases if k[0] == id(held)]:
            del self.leases[key]

    def refused(self, what: Any) -> None:
        """A client was turned away by a circuit or an isolation."""
        self.counts["connect refused"] += 1
        if self.machine.monitor:
            self.fail("monitor", f"a connect to {what} was refused")

    def unprotected(self, destination: Any) -> None:
        self.fail("protected", str(destination))

    # ---- the log ---------------------------------------------------------------------------------------------------

    def submitted(self, leaf: Leaf) -> None:
        """An entry is on its way to the disk."""
        if leaf.kind != "config":
            return
        what, detail = leaf.body["what"], leaf.body["detail"]
        if what == "resumed":
            early = self.paused is not None and self.now + SECOND < self.paused[1]
            jumped = self.paused is not None and self.machine.jumped_ns >= self.paused[0]
            if early and not jumped and detail["reason"] == "the pause is over":
                self.fail("paused", f"it ended before {self.paused}")
            self.paused = self.pausing = None
        elif what == "acknowledged":
            self.answered[detail["run"]] = None
            self.waiting.pop(detail["run"], None)
        elif what == "approved":
            about = self.asked.pop((detail["run"], detail["index"]), None)
            if about is None:
                self.fail("approved", f"call {detail['index']} of run {detail['run']}, which nobody asked about")
            else:
                self.approved.append((self.now, about))

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
                self.fail("loss", what)
        elif leaf.kind == "config":
            self._config(leaf.body["what"], leaf.body["detail"])

    def _config(self, what: str, detail: Any) -> None:
        self.counts[f"config {what}"] += 1
        match what:
            case "kernel programs":
                self.armed = True
                if self.by_hand and not self.arming:
                    self.fail("by hand", "armed by itself after a person's word")
                self.by_hand = False
                self.session_since = self.session_since if self.session_since >= 0 else self.now
            case "disarmed":
                self.disarmings += 1
                self.by_hand = self.by_hand or detail.get("stays") == "yes"
                self.armed = False
            case "paused" if self.pausing is not None:
                self.paused, self.pausing = (self.now, self.pausing), None
            case "escalated":
                self.called[detail["run"]] = None
                if detail["run"] in self.answered:  # before it was on disk
                    return
                self.waiting[detail["run"]] = (self.now, detail["code"])
                while len(self.waiting) > WAITING_MAX:
                    del self.waiting[next(iter(self.waiting))]

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
        if leaf.kind == "intent" and leaf.run is not None:
            self.intended.add((leaf.run, name, leaf.body["target"]))
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
        acted = [a for a in receipt.actions if a.outcome not in ("refused", "monitored") or a.intent is not None]
        if receipt.run.mode == "monitor" and acted:
            self.fail("monitor", f"run {run} acted")
        wrong = [a for a in acted if a.outcome in ("failed", "unconfirmed") and a.action not in HARMLESS]
        if wrong and run not in self.called:
            self.fail(
                "called", f"run {run}: {wrong[0].action} {wrong[0].target} is {wrong[0].outcome}, nobody was called"
            )
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
            self.fail("outcome", f"after a restart an intent has no outcome: {key}")
        self.intents.clear()
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
        lost = self.lost_gone + self.machine.kernel.lost(seen=True)
        if self.lost_reported != lost and not (self.machine.scenario.pin and self.cut_off):
            self.fail("loss", f"{lost} events were lost, the log says {self.lost_reported}")
