"""Each invariant fails when the rule behind it is taken out of the real core or shell: a simulation that passes proves
something. One mutation of the executor, some seeds, and the invariant that must speak up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from datetime import UTC
from typing import Any

import pytest

from pointcall_attest import entry
from pointcall_executor import acting, daemon, run, sessions
from pointcall_executor.actions.world import Done, Verb, World
from pointcall_executor.brake import Brake
from pointcall_executor.core import guard, step
from pointcall_executor.core.guard import Refusal
from pointcall_executor.daemon import Executor
from pointcall_executor.messenger import Messenger
from pointcall_executor.recorder import Left, Recorder
from pointcall_executor.runs import Runs
from pointcall_executor.watch import Watch
from pointcall_runbook.vocabulary import Outcome, capability
from tests.sim.auditor import INVARIANTS, BrokenError
from tests.sim.disk import Journal
from tests.sim.findings import KNOWN
from tests.sim.kernel import Kernel, Sensors
from tests.sim.machine import Machine, Node

SEEDS = range(1, 201)
EVENTS = 1500
Patch = pytest.MonkeyPatch


def without(*rules: str) -> Callable[[Patch], None]:
    """The guard without these rows of its table."""

    def mutate(patch: Patch) -> None:
        for table in ("FORBIDDEN", "TOO_MUCH"):
            kept = tuple(rule for rule in getattr(guard, table) if rule.__name__ not in rules)
            patch.setattr(guard, table, kept)

    return mutate


def never_monitor(patch: Patch) -> None:
    real = sessions.armed_of

    def armed_of(*about: Any) -> step.Armed:
        armed = real(*about)
        return dataclasses.replace(
            armed, runbooks=tuple(dataclasses.replace(b, mode="enforce") for b in armed.runbooks)
        )

    patch.setattr(sessions, "armed_of", armed_of)


def refuse_on_a_node_that_only_watches(patch: Patch) -> None:
    real = Node.sensors

    def sensors(self: Any, admitted: Any, rules: Any) -> Any:
        made = real(self, admitted, rules)
        made._watch_only = False
        if made.breaker is not None:
            made.breaker.watch_only = False
        return made

    patch.setattr(Node, "sensors", sensors)


def act_before_the_intent(patch: Patch) -> None:
    def durable(self: Any, run: Any, act: Any, action: Any) -> None:
        acting.apply(self._journal, run, act, action)
        act.intent = self._recorder.record(acting.intent(act, run.epoch.names), run.id)
        self._loop.post(lambda: self._ended(run, act))

    patch.setattr(Runs, "_durable", durable)


def never_reconcile(patch: Patch) -> None:
    real = Recorder.reconcile

    def reconcile(self: Recorder) -> Left:
        with pytest.MonkeyPatch.context() as silent:
            silent.setattr(Recorder, "record", lambda *_: 0)
            return real(self)

    patch.setattr(Recorder, "reconcile", reconcile)


def outcome_twice(patch: Patch) -> None:
    real = Recorder.submit

    def submit(self: Recorder, body: entry.Body, run: str | None = None) -> None:
        real(self, body, run)
        if isinstance(body, entry.OutcomeBody):
            real(self, body, run)

    patch.setattr(Recorder, "submit", submit)


def drop_outcomes(patch: Patch) -> None:
    real = Recorder.submit

    def submit(self: Recorder, body: entry.Body, run: str | None = None) -> None:
        if not isinstance(body, entry.OutcomeBody):
            real(self, body, run)

    patch.setattr(Recorder, "submit", submit)


def no_receipt_of_refused_runs(patch: Patch) -> None:
    real = Runs._maybe_finish

    def maybe_finish(self: Any, run: run.Run) -> None:
        if run.acts and all(act.outcome is Outcome.REFUSED for act in run.acts):
            return self.in_flight.land()
        return real(self, run)

    patch.setattr(Runs, "_maybe_finish", maybe_finish)


def disarm_only_in_words(patch: Patch) -> None:
    def disarm(self: Any, reason: str) -> None:
        self._loop.call(lambda: self._recorder.record(entry.Config(what="disarmed", detail={"reason": reason})))

    patch.setattr(Executor, "disarm", disarm)


def forget_who_disarmed(patch: Patch) -> None:
    real = Recorder.reconcile

    def reconcile(self: Recorder) -> Left:
        left = real(self)
        left.disarmed = None
        return left

    patch.setattr(Recorder, "reconcile", reconcile)


def pause_only_in_words(patch: Patch) -> None:
    without("_paused")(patch)


def ask_again_after_a_trap(patch: Patch) -> None:
    real = Runs._quarantine

    def quarantine(self: Any, *how: Any) -> None:
        armed = self.state.armed
        real(self, *how)
        self.state = self.state._replace(armed=armed)

    patch.setattr(Runs, "_quarantine", quarantine)


def tell_too_early(patch: Patch) -> None:
    real = Journal.submit

    def submit(self: Journal, leaf: Any, _opening: object = None, _outlined: object = None) -> Any:
        future = real(self, leaf)
        if leaf.kind != "receipt":
            return future
        early = type(future)(self._scheduler)
        early.set_result(len(self._disk.entries) + len(self._jobs) - 1)
        return early

    patch.setattr(Journal, "submit", submit)


def change_epochs_at_any_time(patch: Patch) -> None:
    def renew(self: Any, reason: str) -> None:
        session = self._runs.session
        if session is not None:
            at = session.judged_at(daemon.datetime.now(UTC), daemon.time.monotonic_ns())
            admitted, attested = self._sessions.admit(session.bundle, self.trust, at)
            self._loop.call(lambda: self._continue(session, admitted, attested, reason))

    patch.setattr(Executor, "_renew", renew)


def count_no_loss(patch: Patch) -> None:
    patch.setattr(Watch, "count_lost", lambda *_: None)


def count_loss_twice(patch: Patch) -> None:
    real = Recorder.submit

    def submit(self: Recorder, body: entry.Body, run: str | None = None) -> None:
        if isinstance(body, entry.Lost):
            body = entry.Lost(sensor=body.sensor, count=2 * body.count)
        real(self, body, run)

    patch.setattr(Recorder, "submit", submit)


def take_the_old_one_off_first(patch: Patch) -> None:
    real = Executor._switch

    def switch(self: Any, session: Any, *rest: Any, **more: Any) -> None:
        if self._runs.session is not None:
            self._drop(self._runs.session.sensors)
            self._runs.session.sensors.fds = tuple
        real(self, session, *rest, **more)

    patch.setattr(Executor, "_switch", switch)


def break_the_loop(patch: Patch) -> None:
    patch.setattr(Sensors, "lost", lambda _self: {"breaker": -1 / 0})


def never_free_a_target(patch: Patch) -> None:
    patch.setattr(guard, "ended", lambda state, _run, _action: state)


def hold_for_a_day(patch: Patch) -> None:
    def perform(action: Any, world: World) -> Done:
        world.circuits.force(action.address, action.port, world.now_ns + 24 * 3600 * 10**9)
        return Done(Outcome.APPLIED, f"{action.address}:{action.port}", undo="close_circuit")

    patch.setattr(acting, "REGISTRY", dict(acting.REGISTRY) | {"open_circuit": Verb(perform)})


def forget_who_is_busy(patch: Patch) -> None:
    without("_one_at_a_time")(patch)


def act_when_withheld(patch: Patch) -> None:
    """A shell that performs what the core withheld."""
    real = Runs._effect

    def effect(self: Any, told: step.Effect, sensor: str, received_ns: int) -> None:
        if isinstance(told, step.Withhold):
            told = step.Perform(told.run, told.index, told.action)
        real(self, told, sensor, received_ns)

    patch.setattr(Runs, "_effect", effect)


def flap_only_once(patch: Patch) -> None:
    def flapping(state: Any, request: Any, rules: Any) -> Refusal | None:
        last = (
            state.history.last(("restart", getattr(request.action, "service", request).number))
            if (capability(type(request.action)) == "recreate")
            else None
        )
        if last is None or request.now_ns - last >= rules.flap_base_ns:
            return None
        return Refusal("guard.flapping", "", "", "")

    kept = tuple(flapping if rule.__name__ == "_flapping" else rule for rule in guard.TOO_MUCH)
    patch.setattr(guard, "TOO_MUCH", kept)


def never_look_at_the_halt(patch: Patch) -> None:
    real = Brake.too_late

    def too_late(self: Brake, of: run.Run) -> Refusal | None:
        refusal = real(self, of)
        return None if refusal is not None and refusal.got.startswith("halted") else refusal

    patch.setattr(Executor, "_check_armed", lambda *_: None)
    patch.setattr(Brake, "too_late", too_late)


def forget_pauses(patch: Patch) -> None:
    real = Recorder.reconcile

    def reconcile(self: Recorder) -> Left:
        left = real(self)
        left.paused = None
        return left

    patch.setattr(Recorder, "reconcile", reconcile)


def forget_who_was_called(patch: Patch) -> None:
    real = Recorder.reconcile

    def reconcile(self: Recorder) -> Left:
        left = real(self)
        left.escalations.clear()
        return left

    patch.setattr(Recorder, "reconcile", reconcile)


def hold_what_was_rolled_back(patch: Patch) -> None:
    real = guard.settled

    def settled(*about: Any, rolled_back: bool) -> Any:
        return real(*about, rolled_back=False)

    patch.setattr(guard, "settled", settled)


def hold_nothing(patch: Patch) -> None:
    patch.setattr(guard, "settled", lambda state, *_, **__: state)


def tell_on_the_loop(patch: Patch) -> None:
    def send(self: Any, run: Any, act: Any, action: Any, _number: int) -> None:
        acting.apply(self._journal, run, act, action)
        self._ended(run, act)

    patch.setattr(Runs, "_send", send)


MUTATIONS: dict[str, tuple[str, Callable[[Patch], None]]] = {
    "no rule of one at a time": ("target", forget_who_is_busy),
    "no blast radius": ("radius", without("_blast_radius")),
    "leases hold nothing": ("radius", hold_nothing),
    "no token bucket": ("rate", without("_rate")),
    "no limit of the node": ("rate", without("_node_rate")),
    "no hold-off": ("rate", without("_hold_off")),
    "no storm": ("rate", without("_storm")),
    "no flap damping": ("flapping", without("_flapping")),
    "flap damping that does not grow": ("flapping", flap_only_once),
    "no grant of actions": ("granted", without("_action_granted")),
    "no grant of services": ("granted", without("_service_granted")),
    "no grant of channels": ("granted", without("_channel_granted")),
    "no grant of networks": ("granted", without("_network_granted")),
    "no never-touch list": ("granted", without("_never_touch")),
    "acts although withheld": ("monitor", act_when_withheld),
    "monitor is enforce": ("monitor", never_monitor),
    "circuits refuse on a node that only watches": ("monitor", refuse_on_a_node_that_only_watches),
    "what is pinned goes on refusing": ("monitor", lambda patch: patch.setattr(Kernel, "let_pass", lambda _self: {})),
    "acts before the intent": ("intent", act_before_the_intent),
    "no reconciling": ("outcome", never_reconcile),
    "an outcome twice": ("outcome", outcome_twice),
    "no outcomes": ("receipt", drop_outcomes),
    "no receipt of a refused run": ("receipt", no_receipt_of_refused_runs),
    "disarms in words only": ("disarmed", disarm_only_in_words),
    "a person's disarming ends with the executor": ("by hand", forget_who_disarmed),
    "pauses in words only": ("paused", pause_only_in_words),
    "a pause ends with the executor": ("paused", forget_pauses),
    "never looks whether it is halted": ("halted", never_look_at_the_halt),
    "no approval": ("approved", without("_approval")),
    "calls nobody": ("called", lambda patch: patch.setattr(Messenger, "escalate", lambda *_: None)),
    "calls only once": ("called", lambda patch: patch.setattr(Messenger, "call_again", lambda *_: None)),
    "calls end with the executor": ("called", forget_who_was_called),
    "holds what was rolled back": ("rollback", hold_what_was_rolled_back),
    "tells slow channels on the loop": ("loop", tell_on_the_loop),
    "asks again after a trap": ("quarantine", ask_again_after_a_trap),
    "tells before it is durable": ("acknowledged", tell_too_early),
    "changes epochs with runs in flight": ("epoch", change_epochs_at_any_time),
    "counts no loss": ("loss", count_no_loss),
    "counts loss twice": ("loss", count_loss_twice),
    "a gap at a takeover": ("protected", take_the_old_one_off_first),
    "a bug in the loop": ("failed", break_the_loop),
    "a target that is never freed": ("ends", never_free_a_target),
    "a lease of a day": ("lease", hold_for_a_day),
}

# Where the simulation comes to it soonest. It is tried first; where it shows nothing any more, the others follow.
SOONEST = {
    "no rule of one at a time": 9,
    "no blast radius": 19,
    "leases hold nothing": 50,
    "no token bucket": 43,
    "no limit of the node": 31,
    "no hold-off": 20,
    "no storm": 102,
    "no flap damping": 5,
    "flap damping that does not grow": 28,
    "no grant of actions": 39,
    "no grant of channels": 23,
    "no never-touch list": 17,
    "circuits refuse on a node that only watches": 8,
    "what is pinned goes on refusing": 105,
    "no reconciling": 19,
    "an outcome twice": 5,
    "no outcomes": 5,
    "no receipt of a refused run": 8,
    "disarms in words only": 18,
    "never looks whether it is halted": 25,
    "no approval": 20,
    "calls only once": 72,
    "calls end with the executor": 72,
    "holds what was rolled back": 60,
    "tells before it is durable": 4,
    "changes epochs with runs in flight": 41,
    "counts no loss": 10,
    "counts loss twice": 18,
    "a gap at a takeover": 35,
    "a bug in the loop": 5,
    "a target that is never freed": 11,
    "a lease of a day": 20,
}


def first_broken(seeds: Iterable[int]) -> str:
    """The invariant that breaks first."""
    for seed in seeds:
        try:
            Machine(seed, KNOWN).run(EVENTS)
        except BrokenError as error:
            return str(error)
    return "none"


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_breaks_its_invariant(name: str, monkeypatch: Patch) -> None:
    invariant, mutate = MUTATIONS[name]
    mutate(monkeypatch)
    assert first_broken((SOONEST.get(name, SEEDS[0]), *SEEDS)).startswith(f"{invariant}:")


def test_every_invariant_has_a_mutation() -> None:
    assert SOONEST.keys() <= MUTATIONS.keys()
    assert set(SOONEST.values()) <= set(SEEDS)
    assert {invariant for invariant, _ in MUTATIONS.values()} == set(INVARIANTS)
