"""`pointcall run` in the large: executor, API, signals. Owns nothing but their order.

A refused manifest at start is no reason to end: the executor stays up, disarmed, and says so; a newer one can be armed
over the API or by SIGHUP. A failed journal is: what cannot be recorded must not be done.

What comes before, while the process still has its privileges, is beginning.py.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pointcall_attest import signature_child
from pointcall_attest.errors import RefusedError
from pointcall_attest.printable import shown
from pointcall_executor.api.server import Server, serve
from pointcall_executor.arming import ArmingError
from pointcall_executor.backend import ExecutorBackend
from pointcall_executor.beginning import Begun, say
from pointcall_executor.cli.output import Exit
from pointcall_executor.config import load
from pointcall_executor.daemon import Executor
from pointcall_executor.journal import JournalError
from pointcall_executor.memory import give_back
from pointcall_executor.pulse import Pulse
from pointcall_executor.session import Bundle
from pointcall_executor.shipping import Shipping
from pointcall_executor.tee.platform import PlatformError
from pointcall_executor.telemetry.station import Station
from pointcall_runbook.errors import PointcallError

FLUSH_SECONDS: Final = 1.0
# What passes by itself, most of all while a machine starts; after so long it is tried again, then after twice as long.
PASSING: Final = frozenset({"service.manager"})
RETRY_SECONDS: Final = 15.0
RETRY_MAX_SECONDS: Final = 600.0


class Serving:
    """One life of `pointcall run`."""

    def __init__(self, begun: Begun, state: Path, config_path: Path | None, manifest: Path) -> None:
        self._begun, self._manager = begun, begun.manager
        self._state, self._config_path, self._manifest = state, config_path, manifest
        self._wake = threading.Event()
        self._working: threading.Thread | None = None  # arms, or reads again: that may take long, a stop must not
        self._at_work = False
        self._retry_at: float | None = None  # CLOCK_MONOTONIC
        self._retry_s = RETRY_SECONDS
        self._reload = False
        self._stop = ""
        self._server: Server | None = None
        self._failure: BaseException | None = None

    def _on_signal(self, number: int, _frame: Any) -> None:
        if number == signal.SIGHUP:
            self._reload = True
        else:
            self._stop = signal.Signals(number).name
        self._wake.set()

    def run(self) -> int:
        """Until a signal or a failure; the exit code. A restart may mend a failure: the journal is verified then."""
        begun, config = self._begun, self._begun.config
        with contextlib.ExitStack() as over, contextlib.ExitStack() as ending:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, self._on_signal)
            executor = Executor(self._state, config, begun.platform, begun.node)
            ending.callback(self._worked)
            ending.callback(lambda: executor.close(reason=self._stop or "failure"))
            self._manager.watch(Pulse(lambda: executor.beats, lambda: executor.failure is not None))
            backend = ExecutorBackend(executor)
            station = Station(executor, backend, config)
            ending.callback(station.stop)
            if config.api:
                self._server = serve(backend, self._state / "run", groups=begun.groups, mtls=begun.mtls)
                ending.callback(self._server.stop)
            with self._manager.taking_longer():
                self._work(lambda: self._arm(executor))
                while self._at_work and not self._stop and executor.failure is None:
                    self._wake.wait(FLUSH_SECONDS)
                    self._wake.clear()
            shipping = Shipping(executor.journal, executor.recorder, lambda: executor.config, say)
            shipping.start()
            backend.shipped = shipping.gauges
            ending.callback(shipping.stop)
            if not self._stop:
                self._manager.ready(_line(executor))
            self._wait(executor)
            self._manager.stopping()
            over.enter_context(self._manager.taking_longer())
        failure = executor.failure or self._failure
        if failure is not None:
            say("stopped by a failure", error=repr(str(failure)))
            return Exit.FAILED
        say("stopped", by=self._stop)
        return Exit.OK

    def _work(self, what: Callable[[], None]) -> None:
        """One piece of work beside this thread, which goes on to hear signals and to write what was accessed."""

        def work() -> None:
            try:
                what()
            except BaseException as error:
                self._failure = error
            finally:
                self._at_work = False
                self._wake.set()

        self._at_work = True
        self._working = threading.Thread(target=work, name="arming", daemon=True)
        self._working.start()

    def _worked(self) -> None:
        """What was under way has ended: the executor is closed, and lets nothing begin."""
        if self._working is not None:
            self._working.join()

    def _arm(self, executor: Executor) -> None:
        """Arm what lies in the manifest's folder, unless a person has disarmed this node."""
        self._retry_at = None
        try:
            if executor.disarmed_by_hand:
                say(_line(executor), hint="`pointcall arm` arms again")
                return
            bundle = Bundle.read(self._manifest)
            if not bundle.signatures:
                say("nothing to arm", folder=self._manifest)
                return
            admitted = executor.arm(bundle, by_itself=True)
        except PointcallError as refusal:
            say("refused", check=refusal.id, want=repr(refusal.want), got=repr(refusal.got))
            if refusal.id in PASSING and executor.admitted is None:
                self._retry_at, self._retry_s = (
                    time.monotonic() + self._retry_s,
                    min(2 * self._retry_s, RETRY_MAX_SECONDS),
                )
            return
        except OSError as error:
            say("the manifest's folder cannot be read", error=repr(str(error)))
            return
        finally:
            signature_child.discard()  # where nothing had to be verified
            self._tell(executor)
            give_back()  # what verifying and compiling needed
        manifest = admitted.manifest
        say("armed", manifest=manifest.name, sequence=manifest.sequence, tier=admitted.verdict.tier)

    def _tell(self, executor: Executor) -> None:
        """Say to health checks and to the service manager whether something is armed now."""
        self._manager.status(_line(executor))
        if self._server is not None:
            self._server.set_serving(executor.failure is None and executor.admitted is not None)

    def _wait(self, executor: Executor) -> None:
        while not self._stop and executor.failure is None and self._failure is None:
            self._wake.wait(FLUSH_SECONDS)
            self._wake.clear()
            self._tell(executor)
            if self._server is not None:
                try:
                    self._server.flush()
                except JournalError as error:  # before the loop has seen it
                    self._failure = error
                    return
            if self._reload and not self._at_work:
                self._reload, self._retry_s = False, RETRY_SECONDS
                self._work(lambda: self._again(executor))
            elif self._retry_at is not None and time.monotonic() >= self._retry_at and not self._at_work:
                if executor.admitted is None:
                    self._work(lambda: self._arm(executor))
                else:  # a person was faster
                    self._retry_at = None

    def _again(self, executor: Executor) -> None:
        """SIGHUP: settings that can change while running, the trust folder, and the manifest folder."""
        self._manager.reloading()
        try:
            self._read_again(executor)
        finally:
            if not self._stop:
                self._manager.ready(_line(executor))

    def _read_again(self, executor: Executor) -> None:
        try:
            config = load(self._config_path)
        except OSError as error:
            say("settings cannot be read, the old ones stay", error=repr(str(error)))
            return
        except PointcallError as refusal:
            say("settings refused, the old ones stay", error=refusal.id, got=repr(refusal.got))
            return
        try:
            executor.reload(config)
        except RefusedError as refusal:
            say("the armed manifest is not admitted any more", check=refusal.id, got=repr(refusal.got))
        except (PlatformError, ArmingError, OSError) as error:
            say("read again; the armed manifest is judged by it soon", error=repr(str(error)))
        except PointcallError as refusal:
            say("settings refused, the old ones stay", error=refusal.id, got=repr(refusal.got))
            return
        else:
            say("read again")
        self._arm(executor)


def _line(executor: Executor) -> str:
    """What `systemctl status` shows."""
    admitted = executor.admitted
    if executor.failure is not None:
        return f"failed: {executor.failure}"
    if admitted is None:
        by_hand = executor.disarmed_by_hand
        return f"up, disarmed by a person: {shown(by_hand)}" if by_hand else "up, nothing is armed"
    paused = ", PAUSED" if executor.state.guard.paused else ""
    return f"armed: {admitted.manifest.name}, sequence {admitted.manifest.sequence}, {admitted.verdict.tier}{paused}"
