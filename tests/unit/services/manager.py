"""A real systemd user manager in namespaces of its own: mounts and cgroups. Its sockets are files of the test.

Everything that it starts is in one cgroup, and ends with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from pointcall_executor.kernel.cgroup import Cgroup, find_root

START_SECONDS = 20
SYSTEMD = Path("/lib/systemd/systemd")
# In the new namespaces: a v2-only view of the cgroups whose root is our own folder, a /run of its own, systemd.
INSIDE = """
set -e
umount -R -l /sys/fs/cgroup
mount -t tmpfs none /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mkdir -p /sys/fs/cgroup/init.scope
mount -t tmpfs none /run
mkdir -p /run/systemd/system
exec "$@"
"""


DAEMON = "dbus-daemon --session --address=systemd: --nofork --nopidfile --systemd-activation --syslog-only"
UNITS = {
    "basic.target": "[Unit]\nDescription=Nothing but a bus\nWants=dbus.socket\nAfter=dbus.socket\n",
    "dbus.socket": "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=%t/bus\n",
    "dbus.service": "[Unit]\nRequires=dbus.socket\nDefaultDependencies=no\n"
    f"[Service]\nType=notify\nExecStart={DAEMON}\n",
}


class Manager:
    """Started by `with`; `units` is where unit files go, `bus` the address of its bus."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runtime = folder, folder / "run"
        self.units = folder / "config/systemd/user"
        self.bus = f"unix:path={self.runtime}/bus"
        self._cgroup = Cgroup(find_root() / f"pointcall-systemd-{os.getpid()}-{folder.parent.name}")

    @staticmethod
    def missing() -> str:
        """What this machine lacks, empty if nothing."""
        if os.geteuid() or not os.access(find_root(), os.W_OK):
            return "root and a writable cgroup v2 tree"
        lacking = [name for name in ("unshare", "dbus-daemon") if shutil.which(name) is None]
        return ", ".join(lacking + ([] if SYSTEMD.exists() else ["systemd"]))

    def __enter__(self) -> Self:
        self.units.mkdir(parents=True)
        self.runtime.mkdir(mode=0o700)
        self._cgroup.path.mkdir()
        for name, text in UNITS.items():
            (self.units / name).write_text(text)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "XDG_CONFIG_HOME": str(self.folder / "config"),
            "DBUS_SESSION_BUS_ADDRESS": self.bus,
            "SYSTEMD_LOG_TARGET": "console",
        }
        procs = self._cgroup.path / "cgroup.procs"
        alone = ["unshare", "--cgroup", "--mount"]
        join = ["/bin/sh", "-c", f'echo $$ > {procs}; exec "$@"', "sh"]
        command = [*join, *alone, "/bin/sh", "-c", INSIDE, "sh", str(SYSTEMD), "--user", "--unit=basic.target"]
        self._log = (self.folder / "systemd.log").open("wb")
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        try:
            self._wait_for(self.runtime / "bus")
            self._wait_for(self.runtime / "systemd/private")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not path.exists():
            if time.monotonic() > deadline:
                log = self.folder / "systemd.log"
                raise TimeoutError(f"{path.name} does not appear; {log.read_text()[-2000:] if log.exists() else ''}")
            time.sleep(0.01)

    def start(self, unit: str) -> None:
        """By the manager's own tool."""
        self.run("daemon-reload")
        self.run("start", unit)

    def run(self, *words: str) -> str:
        environment = {"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(self.runtime)}
        done = subprocess.run(
            ["systemctl", "--user", *words], env=environment, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextlib.contextmanager
    def hung(self) -> Iterator[None]:
        """Its bus takes every message, and nobody answers."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def __exit__(self, *_exc: object) -> None:
        self._cgroup.kill()
        self._process.wait()
        self._log.close()
        self._cgroup.remove()
