"""`pointcall run` in the large: settings, platform, executor, API, signals. Owns nothing but their order.

A refused manifest at start is no reason to end: the executor stays up, disarmed, and says so; a newer one can be armed
over the API or by SIGHUP. A failed journal is: what cannot be recorded must not be done.
"""

from __future__ import annotations

import contextlib
import grp
import os
import signal
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from pointcall_attest.errors import RefusedError
from pointcall_executor.api.roles import Role
from pointcall_executor.api.server import Server, serve
from pointcall_executor.backend import ExecutorBackend
from pointcall_executor.cli.output import EnvironmentRefusal, Exit
from pointcall_executor.config import Config, ConfigError, load
from pointcall_executor.daemon import Executor
from pointcall_executor.halt import announce
from pointcall_executor.kernel.probe import probe
from pointcall_executor.node import KernelNode
from pointcall_executor.session import Bundle
from pointcall_executor.shipping import Shipping
from pointcall_executor.tee.emulated import EmulatedPlatform
from pointcall_executor.tee.hardware import open_hardware
from pointcall_executor.tee.platform import Platform, PlatformError
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


def _serve(executor: Executor, config: Config, run_dir: Path) -> Server | None:
    """The API on its sockets, each for the group that the settings name."""
    if not config.api:
        return None
    try:
        groups = {Role(role): grp.getgrnam(name).gr_gid for role, name in config.groups.items()}
    except KeyError as error:
        raise ConfigError("a group of the API's sockets does not exist", got=str(error), hint="groupadd") from None
    return serve(ExecutorBackend(executor), run_dir, groups=groups)


class Serving:
    """One life of `pointcall run`."""

    def __init__(self, state: Path, config_path: Path | None, manifest: Path) -> None:
        self._state, self._config_path, self._manifest = state, config_path, manifest
        self._wake = threading.Event()
        self._reload = False
        self._stop = ""

    def _on_signal(self, number: int, _frame: Any) -> None:
        if number == signal.SIGHUP:
            self._reload = True
        else:
            self._stop = signal.Signals(number).name
        self._wake.set()

    def run(self, environ: Mapping[str, str] = os.environ) -> int:
        """Until a signal or a failure; the exit code."""
        config = load(self._config_path, environ)
        check_kernel()
        announce(self._state)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        executor = Executor(self._state, config, platform_of(config, self._state), KernelNode(config, self._state))
        with contextlib.ExitStack() as ending:
            ending.callback(lambda: executor.close(reason=self._stop or "failure"))
            server = _serve(executor, config, self._state / "run")
            if server is not None:
                ending.callback(server.stop)
            self._arm(executor, server)
            shipping = Shipping(executor.journal, executor.recorder, lambda: executor.config, say)
            shipping.start()
            ending.callback(shipping.stop)
            self._wait(executor, server)
        if executor.failure is not None:
            say("stopped by a failure", error=repr(str(executor.failure)))
            return Exit.ENVIRONMENT
        say("stopped", by=self._stop)
        return Exit.OK

    def _arm(self, executor: Executor, server: Server | None) -> None:
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
        manifest = admitted.manifest
        say("armed", manifest=manifest.name, sequence=manifest.sequence, tier=admitted.verdict.tier)
        if server is not None:
            server.set_serving(True)

    def _wait(self, executor: Executor, server: Server | None) -> None:
        while not self._stop and executor.failure is None:
            self._wake.wait(FLUSH_SECONDS)
            self._wake.clear()
            if server is not None:
                server.flush()
            if self._reload:
                self._reload = False
                self._again(executor, server)

    def _again(self, executor: Executor, server: Server | None) -> None:
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
        self._arm(executor, server)
