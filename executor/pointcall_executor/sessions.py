"""How a session comes to be: a bundle judged, then made into running things, its services adopted or started.

Everything that can be done before anything is given up. Not here: how it takes over from the one before (daemon.py),
and what a session is (session.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Final

from pointcall_attest import entry
from pointcall_attest.admission import Admitted, admit, check_manifest
from pointcall_attest.declaration import ServiceDeclaration
from pointcall_attest.errors import AttestError
from pointcall_attest.manifest import Manifest
from pointcall_attest.notice import verify_notices
from pointcall_executor import VERSION, acting, standing, wasm
from pointcall_executor.arming import armed_of, names_of, topology_of
from pointcall_executor.brake import Brake
from pointcall_executor.epoch import Attested, Trust
from pointcall_executor.journal_reader import JournalError
from pointcall_executor.memory import forget_code
from pointcall_executor.node import Node
from pointcall_executor.notices import FOLDER, read_notices
from pointcall_executor.recorder import Recorder, refused
from pointcall_executor.run import Act
from pointcall_executor.running_epoch import RunningEpoch
from pointcall_executor.services.declared import identity
from pointcall_executor.session import Bundle, Session
from pointcall_runbook.decision import Trap
from pointcall_runbook.module import ModuleInfo
from pointcall_runbook.vocabulary import Call, Mode, Outcome, Recreate, Service

ARMED: Final = "armed"  # the node has one sequence, whatever the manifest is called


class Sessions:
    """One is made at a time. `recorder` writes what is done on the way."""

    def __init__(self, state_dir: Path, node: Node, recorder: Recorder, epoch: RunningEpoch, brake: Brake) -> None:
        self._folder, self._node, self._recorder = state_dir / FOLDER, node, recorder
        self._state_dir = state_dir
        self._epoch, self._brake = epoch, brake
        self._read: tuple[bytes, ...] = ()  # notices of the last judgement
        self._notices: tuple[bytes, ...] = ()  # those under which what is armed was judged

    @property
    def other_notices(self) -> bool:
        """Whether the node has other notices now than those under which what is armed was judged."""
        return read_notices(self._folder) != self._notices

    def judged(self) -> None:
        """What was admitted last is what is armed from now on."""
        self._notices = self._read

    def admit(self, bundle: Bundle, trust: Trust, at: datetime) -> tuple[Admitted, Attested]:
        """Verify, attest, appraise. RefusedError carries every check; PlatformError or OSError without evidence."""
        root, journal = trust.trusted_root, self._recorder.journal
        self._read = read_notices(self._folder)
        candidate = check_manifest(
            bundle.signatures,
            bundle.files,
            policy=trust.policy,
            trusted_root=root,
            at=at,
            highest_sequence=journal.highest_sequence(ARMED),
            highest_digest=journal.sequence_digest(ARMED),
            executor_version=VERSION,
            notices=verify_notices(self._read, trusted_root=root, policy=trust.policy, at=at),
        )
        attested = self._epoch.attest(candidate, trust, at)
        return admit(candidate, attested.verdict), attested

    def make(
        self, admitted: Admitted, bundle: Bundle, trust: Trust, mode: Mode, at: datetime, at_ns: int,
        undo: contextlib.ExitStack,
    ) -> Session:  # fmt: skip
        """Its runners, sensors and channels; services come last, with `start_services`. `undo` detaches the sensors."""
        armed = armed_of(admitted, trust.policy, mode)
        runners = {
            b.name: wasm.Runner(admitted.module(b.name), admitted.modules[b.name]) for b in admitted.manifest.runbooks
        }
        forget_code()  # what verifying and compiling ran; all that follows brings back what running needs
        for name, runner in runners.items():
            _warm(runner, admitted.modules[name])
        for content in (*admitted.files.values(), admitted.manifest.payload):
            self._recorder.journal.put_blob(content)
        sensors = self._node.sensors(admitted, armed.rules)
        attached_ns = time.monotonic_ns()
        undo.callback(sensors.detach)
        channels = self._node.channels(admitted)
        topology = topology_of(admitted.manifest)
        return Session(bundle, trust, admitted, at, at_ns, armed, runners, sensors, attached_ns, channels, topology)

    def start_services(
        self, session: Session, before: Session | None, generation: int, put_back: contextlib.ExitStack
    ) -> frozenset[int]:
        """Start what the manifest declares and does not run yet, each start recorded like an action; their numbers.

        ArmingError `executor.halted` or `arm.interrupted` where somebody has said stop since arming began.
        """
        earlier = {} if before else self._declared_last(session.admitted)
        running = before.services if before else None
        session.services = self._node.services(session.admitted, running, session.moved, earlier)
        put_back.callback(self._put_back, session)
        missing = list(session.services.adopt())
        told = self._record_refused(session.services.refused)
        for number in missing:
            self._brake.require_not_halted()
            self._brake.require(generation)
            action = Recreate(Service(number))
            act = Act(0, Call.of(action), action, target=session.services.name(number))
            self._recorder.record(acting.intent(act, names_of(session.admitted.manifest), grant="manifest"))
            act.outcome = Outcome.FAILED
            try:
                act.detail = {"pid": session.services.start(number).pid}
                act.outcome = Outcome.APPLIED
            finally:
                told |= self._record_refused({n: got for n, got in session.services.refused.items() if n not in told})
                self._recorder.record(acting.outcome(act))
        return frozenset(missing)

    def commit(self, session: Session) -> None:
        """It has taken over: what is not declared any more ends."""
        want, hint = "an end, as it is not declared any more", "end it by hand: nothing here looks after it now"
        self._record_services(
            "services ended: not declared any more", session.services.commit(), "service.left", want, hint
        )

    def _put_back(self, session: Session) -> None:
        """What ran before arming began runs again, as far as it can."""
        want, hint = "what ran before, as arming has failed", "see why, then arm again, or `pointcall manifest restore`"
        self._record_services("services put back", session.services.undo(), "service.put-back", want, hint)

    def _record_refused(self, services: Mapping[str, str]) -> set[str]:
        """Say what was left and could not be adopted; the names of all of these services."""
        for name, got in services.items():
            if got:
                want, hint = "what is declared, proven", "it is not what was admitted: find out who started it"
                self._recorder.record(refused("service.adoption", name, want, got, hint))
        return {*services}

    def _declared_last(self, now: Admitted) -> Mapping[str, ServiceDeclaration]:
        """What the manifest declares that was armed here last, as the log has it; nothing where it is the one of now.
        And what the one before it declared and nobody finds any more, if its takeover was cut off before that ended."""
        last, final = self._recorder.journal.sequence_digest(ARMED), standing.read(self._state_dir)
        declared = {} if last in (None, now.manifest.sha256) else self._declared(str(last))
        if final is None or final.manifest in (None, last, now.manifest.sha256):
            return declared
        after = {**declared, **now.declarations}
        known = {identity(each) for each in (*declared.values(), *now.declarations.values())}
        cut_off = self._declared(str(final.manifest)).items()
        return {n: d for n, d in cut_off if n not in after and identity(d) not in known} | declared

    def _declared(self, manifest: str) -> dict[str, ServiceDeclaration]:
        """What a manifest declares that was armed here, by its digest.

        A log that does not have it any more is no reason not to arm: then only processes are found, by their cgroups.
        """
        journal = self._recorder.journal
        try:
            found = Manifest.parse(journal.blob(manifest))
            files = {s.name: found.subjects[s.declaration] for s in found.services}
            return {name: ServiceDeclaration.parse(journal.blob(sha256)) for name, sha256 in files.items()}
        except (AttestError, JournalError) as error:
            want, hint = "the manifest that was armed before", "see by hand whether something runs that is not declared"
            self._recorder.record(refused("service.left", "services of another kind", want, str(error), hint))
            return {}

    def _record_services(self, what: str, told: Mapping[str, str], check: str, want: str, hint: str) -> None:
        done = [name for name, wrong in told.items() if not wrong]
        if done:
            self._recorder.record(entry.Config(what=what, detail={"services": list(done)}))
        for name, wrong in told.items():
            if wrong:
                self._recorder.record(refused(check, name, want, wrong, hint))


def _warm(runner: wasm.Runner, info: ModuleInfo) -> None:
    """Decide once about nothing, so that the first real decision is as fast as the others. A module has no effects."""
    for handler in info.handlers.values():
        with contextlib.suppress(Trap):
            runner.decide(handler.event, (0,) * handler.arity)
