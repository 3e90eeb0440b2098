"""`pointcall run` in the large: settings, platform, executor, API, signals. Owns nothing but their order.

A refused manifest at start is no reason to end: the executor stays up, disarmed, and says so; a newer one can be armed
over the API or by SIGHUP. A failed journal is: what cannot be recorded must not be done.

The spawner is started first and keeps its privileges; then this process gives up its own, before it has a thread.
"""

from __future__ import annotations

import contextlib
import grp
import os
import signal
import sys
import threading
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from pointcall_attest.errors import RefusedError
from pointcall_executor import syscall_filter
from pointcall_executor.api.caller import Mtls
from pointcall_executor.api.roles import Role
from pointcall_executor.api.server import Server, serve
from pointcall_executor.backend import ExecutorBackend
from pointcall_executor.cli.output import EnvironmentRefusal, Exit
from pointcall_executor.config import Config, ConfigError, load
from pointcall_executor.daemon import Executor
from pointcall_executor.halt import announce
from pointcall_executor.handover import delegate, hand_over, inside, remove_place
from pointcall_executor.kernel.probe import probe
from pointcall_executor.memory import give_back
from pointcall_executor.node import KernelNode
from pointcall_executor.privileges import drop, limit
from pointcall_executor.pulse import Pulse
from pointcall_executor.service_manager import ServiceManager
from pointcall_executor.session import Bundle
from pointcall_executor.shipping import Shipping
from pointcall_executor.tee.emulated import EmulatedPlatform
from pointcall_executor.tee.platform import Platform, PlatformError
from pointcall_executor.telemetry.station import Station
from pointcall_runbook.errors import PointcallError

FLUSH_SECONDS: Final = 1.0
HARDWARE: Final[Mapping[str, Literal["snp", "tdx"]]] = {"sev-snp": "snp", "tdx": "tdx"}


def say(text: str, **facts: object) -> None:
    """One structured line on standard error."""
    sys.stderr.write(f"pointcall: {text}" + "".join(f" {k}={v}" for k, v in facts.items()) + "\n")
    sys.stderr.flush()


def _clock() -> datetime:
    return datetime.now(UTC)


def platform_of(config: Config, state: Path) -> Platform:
    """The platform that the settings name. There is no fallback from hardware to emulation."""
    if config.tee == "emulated":
        platform = EmulatedPlatform.open(state / "tee", clock=_clock)
        say("EMULATED TEE: no confidentiality or integrity claim")
        return platform
    from pointcall_executor.tee.hardware import open_hardware

    try:
        return open_hardware(HARDWARE[config.tee])
    except PlatformError as error:
        raise EnvironmentRefusal(
            f"there is no {config.tee} here",
            id="tee.absent",
            want=config.tee,
            got=f"{error.message}: {error.got}" if error.got else error.message,
            hint='`pointcall attest probe` says what the machine offers; emulation must be asked for: tee = "emulated"',
        ) from error


def check_kernel() -> None:
    """EnvironmentRefusal that names every required hook that this kernel does not grant."""
    missing = [f for f in probe() if f.required and not f.present]
    if missing:
        raise EnvironmentRefusal(
            "this kernel does not grant what the executor needs",
            id="kernel.missing",
            want=", ".join(f.id for f in missing),
            got=missing[0].detail,
            hint="`pointcall doctor` lists everything",
        )


def _groups(config: Config) -> dict[Role, int]:
    """The group of each role's socket. ConfigError where one does not exist."""
    try:
        return {Role(role): grp.getgrnam(name).gr_gid for role, name in config.groups.items()}
    except KeyError as error:
        raise ConfigError("a group of the API's sockets does not exist", got=str(error), hint="groupadd") from None


def _mtls(config: Config) -> Mtls | None:
    """The network listener, with its files read now. CallerError for a role that is not for the network."""
    found = config.mtls
    if found is None:
        return None
    try:
        certificate, key, roots = (p.read_bytes() for p in (found.certificate, found.key, found.client_roots))
    except OSError as error:
        raise ConfigError("a file of the mTLS listener cannot be read", id="config.mtls", got=str(error)) from error
    return Mtls(found.address, certificate, key, roots, {name: Role(role) for name, role in found.roles.items()})


def _give_up(config: Config, state: Path, node: KernelNode) -> None:
    """Start the spawner with all that it needs; keep for this process only what it needs itself."""
    groups = set(_groups(config).values())
    if config.user and config.privileges == "drop" and os.getuid() == 0:
        hand_over(state, config.user)
        for folder in {config.cgroup, config.gate} - {""}:
            delegate(folder, config.user)
        with inside(config.cgroup):
            node.begin()
    else:
        node.begin()
    os.umask(0o077)  # after the spawner: services have the umask of the unit
    if config.privileges == "keep":
        say("PRIVILEGES KEPT: for looking for an error, not for production")
        return
    limit(config.memory_mb)
    kept = drop(config.user, groups, config.capabilities)
    rules = syscall_filter.apply() if config.seccomp else 0
    say("privileges dropped", keeps=",".join(kept) or "none", user=config.user or os.getuid(), filter_rules=rules)


class Serving:
    """One life of `pointcall run`."""

    def __init__(self, state: Path, config_path: Path | None, manifest: Path) -> None:
        self._state, self._config_path, self._manifest = state, config_path, manifest
        self._wake = threading.Event()
        self._reload = False
        self._stop = ""
        self._server: Server | None = None
        self._manager = ServiceManager("", 0)

    def _on_signal(self, number: int, _frame: Any) -> None:
        if number == signal.SIGHUP:
            self._reload = True
        else:
            self._stop = signal.Signals(number).name
        self._wake.set()

    def run(self, environ: MutableMapping[str, str] = os.environ) -> int:
        """Until a signal or a failure; the exit code."""
        config = load(self._config_path, environ)
        self._manager = ServiceManager.of(environ)
        check_kernel()
        give_back()  # the kernel's types were read whole
        announce(self._state)
        mtls, platform = _mtls(config), platform_of(config, self._state)
        node = KernelNode(config, self._state)
        with contextlib.ExitStack() as ending:
            ending.callback(self._manager.close)
            ending.callback(remove_place, config.cgroup)
            ending.callback(node.shutdown)
            _give_up(config, self._state, node)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, self._on_signal)
            executor = Executor(self._state, config, platform, node)
            ending.callback(lambda: executor.close(reason=self._stop or "failure"))
            self._manager.watch(Pulse(lambda: executor.beats, lambda: executor.failure is not None))
            backend = ExecutorBackend(executor)
            station = Station(executor, backend, config)
            ending.callback(station.stop)
            if config.api:
                self._server = serve(backend, self._state / "run", groups=_groups(config), mtls=mtls)
                ending.callback(self._server.stop)
            self._arm(executor)
            shipping = Shipping(executor.journal, executor.recorder, lambda: executor.config, say)
            shipping.start()
            backend.shipped = shipping.gauges
            ending.callback(shipping.stop)
            self._manager.ready(_line(executor))
            self._wait(executor)
            self._manager.stopping()
        if executor.failure is not None:
            say("stopped by a failure", error=repr(str(executor.failure)))
            return Exit.ENVIRONMENT
        say("stopped", by=self._stop)
        return Exit.OK

    def _arm(self, executor: Executor) -> None:
        try:
            bundle = Bundle.read(self._manifest)
            if not bundle.signatures:
                say("nothing to arm", folder=self._manifest)
                return
            admitted = executor.arm(bundle)
        except PointcallError as refusal:
            say("refused", check=refusal.id, want=repr(refusal.want), got=repr(refusal.got))
            return
        except OSError as error:
            say("the manifest's folder cannot be read", error=repr(str(error)))
            return
        finally:
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
        while not self._stop and executor.failure is None:
            self._wake.wait(FLUSH_SECONDS)
            self._wake.clear()
            self._tell(executor)
            if self._server is not None:
                self._server.flush()
            if self._reload:
                self._reload = False
                self._manager.reloading()
                self._again(executor)
                self._manager.ready(_line(executor))

    def _again(self, executor: Executor) -> None:
        """SIGHUP: settings that can change while running, the trust folder, and the manifest folder."""
        try:
            executor.reload(load(self._config_path))
        except RefusedError as refusal:
            say("the armed manifest is not admitted any more", check=refusal.id, got=repr(refusal.got))
        except PointcallError as refusal:
            say("settings refused, the old ones stay", error=refusal.id, got=repr(refusal.got))
            return
        except OSError as error:
            say("settings cannot be read, the old ones stay", error=repr(str(error)))
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
        return "up, nothing is armed"
    paused = ", PAUSED" if executor.state.guard.paused else ""
    return f"armed: {admitted.manifest.name}, sequence {admitted.manifest.sequence}, {admitted.verdict.tier}{paused}"
