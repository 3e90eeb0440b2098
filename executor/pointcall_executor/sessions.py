"""How a session comes to be: a bundle judged, then made into running things, its services adopted or started.

Everything that can be done before anything is given up. Not here: how it takes over from the one before (daemon.py),
and what a session is (session.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from pointcall_attest import entry
from pointcall_attest.admission import Admitted, admit, check_manifest
from pointcall_attest.declaration import ServiceDeclaration
from pointcall_attest.errors import AttestError
from pointcall_attest.manifest import Manifest
from pointcall_attest.notice import verify_notices
from pointcall_executor import VERSION, acting, wasm
from pointcall_executor.arming import armed_of, names_of, topology_of
from pointcall_executor.brake import Brake
from pointcall_executor.epoch import Attested, Trust
from pointcall_executor.journal_reader import JournalError
from pointcall_executor.memory import forget_code
from pointcall_executor.node import Node, RunningServices
from pointcall_executor.notices import FOLDER, read_notices
from pointcall_executor.recorder import Recorder, refused
from pointcall_executor.run import Act
from pointcall_executor.running_epoch import RunningEpoch
from pointcall_executor.services.managed import ServiceError
from pointcall_executor.session import Bundle, Session
from pointcall_runbook.decision import Trap
from pointcall_runbook.module import ModuleInfo
from pointcall_runbook.vocabulary import Call, Mode, Outcome, Recreate, Service

ARMED: Final = "armed"  # the node has one sequence, whatever the manifest is called


class Sessions:
    """One is made at a time. `recorder` writes what is done on the way."""

    def __init__(self, state_dir: Path, node: Node, recorder: Recorder, epoch: RunningEpoch, brake: Brake) -> None:
        self._folder, self._node, self._recorder = state_dir / FOLDER, node, recorder
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
    ) -> None:
        """Start what the manifest declares and what does not run yet, each start recorded like an action.

        ArmingError `executor.halted` or `arm.interrupted` where somebody has said stop since arming began.
        """
        earlier = () if before else self._declared_last(session.admitted.manifest.sha256)
        running = before.services if before else None
        session.services = self._node.services(session.admitted, running, session.moved, earlier)
        put_back.callback(lambda: self._put_back(session.services))
        missing = list(session.services.adopt())
        for name, got in session.services.refused.items():
            if got:
                want, hint = "what is declared, proven", "it is not what was admitted: find out who started it"
                self._recorder.record(refused("service.adoption", name, want, got, hint))
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
                self._recorder.record(acting.outcome(act))

    def _put_back(self, services: RunningServices) -> None:
        """What could not be is told by the log: who arms hears why nothing new is armed, not what followed from it."""
        try:
            self._record_services("services put back", services.undo())
        except ServiceError as error:
            self._recorder.record(refused(error.id, "services put back", error.want, error.got, error.hint))

    def commit(self, session: Session) -> None:
        """It has taken over: what is not declared any more ends."""
        ended = session.services.commit()
        self._record_services("services ended: not declared any more", [name for name, got in ended.items() if not got])
        for name, got in ended.items():
            if got:
                want, hint = "an end, as it is not declared any more", "end it by hand: nothing here looks after it now"
                self._recorder.record(refused("service.left", name, want, got, hint))

    def _declared_last(self, now: str) -> tuple[ServiceDeclaration, ...]:
        """What the manifest declares that was armed here last, as the log has it; nothing where it is the one of now.

        A log that does not have it any more is no reason not to arm: then only processes are found, by their cgroups.
        """
        journal = self._recorder.journal
        last = journal.sequence_digest(ARMED)
        if last is None or last == now:
            return ()
        try:
            manifest = Manifest.parse(journal.blob(last))
            found = (manifest.subjects[s.declaration] for s in manifest.services)
            return tuple(ServiceDeclaration.parse(journal.blob(sha256)) for sha256 in found)
        except (AttestError, JournalError) as error:
            want, hint = "the manifest that was armed before", "see by hand whether something runs that is not declared"
            self._recorder.record(refused("service.left", "services of another kind", want, str(error), hint))
            return ()

    def _record_services(self, what: str, names: Sequence[str]) -> None:
        if names:
            self._recorder.record(entry.Config(what=what, detail={"services": list(names)}))


def _warm(runner: wasm.Runner, info: ModuleInfo) -> None:
    """Decide once about nothing, so that the first real decision is as fast as the others. A module has no effects."""
    for handler in info.handlers.values():
        with contextlib.suppress(Trap):
            runner.decide(handler.event, (0,) * handler.arity)
