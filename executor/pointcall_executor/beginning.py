"""What `pointcall run` does first: it looks at the node, starts the spawner and gives up its privileges.

Nothing is imported here that this does not need. The rest of the executor is imported afterwards, by a process that may
do less, while the child that will verify the manifest's signatures gets ready beside it.

The order matters: the spawner is started first and keeps its privileges (docs/adr/0015); then this process gives up its
own, before it has a thread; what it starts after that is as confined as itself.
"""

from __future__ import annotations

import contextlib
import grp
import os
import signal
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pointcall_attest import signature_child
from pointcall_executor import syscall_filter
from pointcall_executor.api.roles import Role
from pointcall_executor.cli.output import EnvironmentRefusal
from pointcall_executor.config import Config, ConfigError, load
from pointcall_executor.halt import announce
from pointcall_executor.handover import delegate, hand_over, inside, remove_place
from pointcall_executor.kernel.cgroup import find_root
from pointcall_executor.kernel.probe import probe_required
from pointcall_executor.memory import give_back
from pointcall_executor.node import KernelNode
from pointcall_executor.notices import FOLDER, read_notices
from pointcall_executor.privileges import drop, limit
from pointcall_executor.service_manager import ServiceManager
from pointcall_executor.services.groups import trees
from pointcall_executor.tee.platform import Platform, PlatformError

if TYPE_CHECKING:
    from pointcall_executor.api.caller import Mtls

HARDWARE: Final[Mapping[str, Literal["snp", "tdx"]]] = {"sev-snp": "snp", "tdx": "tdx"}


@dataclass(frozen=True, slots=True)
class Begun:
    """A process that has given up what it does not need, and what it made before. `ending` takes that away again."""

    config: Config
    manager: ServiceManager
    groups: Mapping[Role, int]
    mtls: Mtls | None
    platform: Platform
    node: KernelNode
    ending: contextlib.ExitStack


def begin(state: Path, config_path: Path | None, environ: MutableMapping[str, str] = os.environ) -> Begun:
    """Everything that may need root, then nothing that does.

    ConfigError, EnvironmentRefusal or PrivilegeError with nothing left behind.
    """
    config = load(config_path, environ)
    with contextlib.ExitStack() as ending:
        manager = ServiceManager.of(environ)
        ending.callback(manager.close)
        check_kernel()
        give_back()  # the kernel's types were read whole
        announce(state)
        groups, mtls, platform = groups_of(config), mtls_of(config), platform_of(config, state)
        node = KernelNode(config, state)
        ending.callback(remove_place, config.cgroup)
        ending.callback(node.shutdown)
        _give_up(config, state, node, groups)
        ending.callback(signature_child.discard)
        signature_child.begin(2 if read_notices(state / FOLDER) else 1)  # notices are verified by a child of their own
        return Begun(config, manager, groups, mtls, platform, node, ending.pop_all())


def leave_in_order() -> None:
    """Until more is known: a signal to stop takes away what was made so far, and ends the process with 0."""
    process = os.getpid()

    def leave(_number: int, _frame: object) -> None:
        if os.getpid() != process:  # a fork that has not yet become what it will be
            os._exit(0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        say("stopped", by="a signal, before it served")
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


def say(text: str, **facts: object) -> None:
    """One structured line on standard error."""
    sys.stderr.write(f"pointcall: {text}" + "".join(f" {k}={v}" for k, v in facts.items()) + "\n")
    sys.stderr.flush()


def _clock() -> datetime:
    return datetime.now(UTC)


def platform_of(config: Config, state: Path) -> Platform:
    """The platform that the settings name. There is no fallback from hardware to emulation."""
    if config.tee == "emulated":
        from pointcall_executor.tee.emulated import EmulatedPlatform

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
    missing = [f for f in probe_required() if not f.present]
    if missing:
        raise EnvironmentRefusal(
            "this kernel does not grant what the executor needs",
            id="kernel.missing",
            want=", ".join(f.id for f in missing),
            got=missing[0].detail,
            hint="`pointcall doctor` lists everything",
        )


def groups_of(config: Config) -> dict[Role, int]:
    """The group of each role's socket. ConfigError where one does not exist."""
    try:
        return {Role(role): grp.getgrnam(name).gr_gid for role, name in config.groups.items()}
    except KeyError as error:
        raise ConfigError("a group of the API's sockets does not exist", got=str(error), hint="groupadd") from None


def mtls_of(config: Config) -> Mtls | None:
    """The network listener, with its files read now. CallerError for a role that is not for the network."""
    found = config.mtls
    if found is None:
        return None
    from pointcall_executor.api.caller import Mtls

    try:
        certificate, key, roots = (p.read_bytes() for p in (found.certificate, found.key, found.client_roots))
    except OSError as error:
        raise ConfigError("a file of the mTLS listener cannot be read", id="config.mtls", got=str(error)) from error
    return Mtls(found.address, certificate, key, roots, {name: Role(role) for name, role in found.roles.items()})


def _give_up(config: Config, state: Path, node: KernelNode, groups: Mapping[Role, int]) -> None:
    """Start the spawner with all that it needs; keep for this process only what it needs itself."""
    if config.user and config.privileges == "drop" and os.getuid() == 0:
        hand_over(state, config.user)
        for folder in {config.cgroup, config.gate} - {""}:
            delegate(folder, config.user)
        with inside(config.cgroup):
            node.begin()
    else:
        _make_places(config)
        node.begin()
    os.umask(0o077)  # after the spawner: services have the umask of the unit
    if config.privileges == "keep":
        say("PRIVILEGES KEPT: for looking for an error, not for production")
        return
    limit(config.memory_mb)
    kept = drop(config.user, set(groups.values()), config.capabilities)
    rules = syscall_filter.apply() if config.seccomp else 0
    say("privileges dropped", keeps=",".join(kept) or "none", user=config.user or os.getuid(), filter_rules=rules)


def _make_places(config: Config) -> None:
    """The folders of the settings, in the trees that limits need too: nobody may write the root of a tree without
    CAP_DAC_OVERRIDE, which is given up. Where one cannot be made, arming says so."""
    places = [root / config.cgroup for root in trees()] + ([find_root() / config.gate] if config.gate else [])
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
