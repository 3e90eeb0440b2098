"""A real Podman service in namespaces of its own, with an image that is made on the spot: no registry, no network."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Self

from pointcall_executor.kernel.cgroup import Cgroup, find_root

START_SECONDS = 30
# A v2-only view of the cgroups, which every OCI runtime understands, also where the machine is hybrid.
INSIDE = """
set -e
mount -t tmpfs none /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs none /run
mount -t tmpfs none /dev/shm
exec "$@"
"""


class PodmanService:
    """Started by `with`; `socket` is where it answers, `image` what it has."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.socket = folder, folder / "podman.sock"
        self._cgroup = Cgroup(find_root() / f"pointcall-podman-{os.getpid()}")
        self.image = ""

    @staticmethod
    def missing() -> str:
        """What this machine lacks, empty if nothing."""
        if os.geteuid() or not os.access(find_root(), os.W_OK):
            return "root and a writable cgroup v2 tree"
        lacking = [name for name in ("unshare", "podman", "conmon", "runc", "busybox") if shutil.which(name) is None]
        return ", ".join(lacking)

    def _command(self, *words: str) -> list[str]:
        f = self.folder
        where = ["--root", f"{f}/root", "--runroot", f"{f}/run", "--tmpdir", f"{f}/tmp"]
        where += ["--network-config-dir", f"{f}/net", "--events-backend", "none"]
        how = ["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--runtime", "runc"]
        return ["unshare", "--cgroup", "--mount", "sh", "-c", INSIDE, "sh", "podman", *where, *how, *words]

    def _environment(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": str(self.folder), "CONTAINERS_CONF": str(self.folder / "c.conf")}

    def run(self, *words: str, input: bytes = b"") -> str:
        """Podman's own tool on the same storage."""
        done = subprocess.run(
            self._command(*words), env=self._environment(), input=input, capture_output=True, timeout=60
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def __enter__(self) -> Self:
        (self.folder / "tmp").mkdir(parents=True)
        # Root in a container may not have more than root here, which need not be allowed to raise a limit.
        (self.folder / "c.conf").write_text(
            '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\npids_limit = 0\n'
        )
        self.run("import", "-", "localhost/box:1", input=rootfs())
        digest = self.run("image", "inspect", "--format", "{{.Digest}}", "localhost/box:1").strip()
        self.image = f"localhost/box@{digest}"
        self._cgroup.path.mkdir()
        procs = self._cgroup.path / "cgroup.procs"
        join = ["sh", "-c", f'echo $$ > {procs}; exec "$@"', "sh"]
        words = self._command("system", "service", "--time", "0", f"unix://{self.socket}")
        self._log = (self.folder / "podman.log").open("wb")
        self._process = subprocess.Popen(
            [*join, *words], env=self._environment(), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if time.monotonic() > deadline:
                self.__exit__()
                raise TimeoutError((self.folder / "podman.log").read_text()[-2000:])
            time.sleep(0.02)
        return self

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def __exit__(self, *_exc: object) -> None:
        self._cgroup.kill()
        self._process.wait()
        self._log.close()
        self._cgroup.remove()
        for mount in sorted(mounts_below(self.folder), reverse=True):
            subprocess.run(["umount", "-l", mount], check=False)


def mounts_below(folder: Path) -> list[str]:
    rows = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [row for row in rows if row.startswith(f"{folder}/")]


def rootfs() -> bytes:
    """The tar archive of a root file system with busybox and nothing else."""
    found = shutil.which("busybox")
    assert found is not None
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for folder in ("bin", "proc", "sys", "dev", "tmp"):
            row = tarfile.TarInfo(folder)
            row.type, row.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(row)
        archive.add(Path(found).resolve(), "bin/busybox")
    return raw.getvalue()
