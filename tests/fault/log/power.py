"""Power cuts and kill -9 of a writing journal: nothing that was acknowledged may be lost, and every log must verify.

Three methods: `kill` (SIGKILL), `fuse` (a file system that drops what was not synced), `shutdown` (FS_IOC_SHUTDOWN, no
log flush, loop-mounted ext4; root). The last two also run the negative control, synchronous=NORMAL, which must lose
in at least 30 % of the rounds: a method that never loses anything would prove nothing. A round in which the writer
acknowledged nothing counts as a failure too.
usage: python -m tests.fault.log.power [kill|fuse|shutdown ...] [--rounds N] [--dir FOLDER ON A DISK]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import ctypes
import fcntl
import importlib.util
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from pointcall_attest import entry
from pointcall_executor.journal import DamagedError, Journal
from pointcall_keys.node import EpochKeys
from tests.fault.log.writer import CONNECTIONS, ORIGIN

KEYS = EpochKeys.generate()
ROOT = Path(__file__).resolve().parents[3]
FS_IOC_SHUTDOWN = 0x8004587D
NOLOGFLUSH = 2
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18
IMAGE_BYTES = 400 << 20
CONTROL_SHARE = 0.3
START_S = 20.0


@dataclass
class Result:
    """What became of all rounds of one method."""

    method: str
    synchronous: str
    rounds: int = 0
    lost: int = 0
    damaged: int = 0
    idle: int = 0
    acknowledged: int = 0

    @property
    def passed(self) -> bool:
        if self.synchronous == "normal":
            return self.lost >= CONTROL_SHARE * self.rounds and not self.idle
        return not (self.lost or self.damaged or self.idle)

    def round(self, acks: Path, journal: Path, *, exclusive: bool = False) -> None:
        """Compare what the writer was told with what is on disk."""
        entries, checkpoint = acknowledged(acks)
        self.rounds += 1
        self.idle += entries < 0
        self.acknowledged = max(self.acknowledged, entries + 1)
        size = size_on_disk(journal, exclusive=exclusive)
        self.damaged += size < 0
        self.lost += 0 <= size <= entries or 0 <= size < checkpoint


def acknowledged(acks: Path) -> tuple[int, int]:
    """The last index that was acknowledged (-1: none) and the size of the last checkpoint that was shown."""
    lines = acks.read_text().split("\n")[:-1]
    indices = [int(line) for line in lines if not line.startswith("c")]
    sizes = [int(line[1:]) for line in lines if line.startswith("c")]
    return max(indices, default=-1), max(sizes, default=0)


def size_on_disk(journal: Path, *, exclusive: bool) -> int:
    """How many entries are there after a restart, which verifies every one and then continues; -1 for a damaged log."""
    try:
        with Journal.open(journal, origin=ORIGIN, connection=CONNECTIONS["full", exclusive]) as restarted:
            body = entry.Config(what="restarted", detail={})
            return restarted.append(KEYS.sign(entry.payload(body, at=datetime.now(UTC), ktime_ns=0, epoch=KEYS.id)))
    except DamagedError:
        return -1


@contextlib.contextmanager
def writing(journal: Path, sync: str, acks: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A writer that has begun to acknowledge and is somewhere in the middle; killed at the end."""
    with acks.open("wb") as out:
        command = [sys.executable, "-m", "tests.fault.log.writer", str(journal), sync, *more]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        end = time.monotonic() + START_S
        while not acks.stat().st_size and time.monotonic() < end and process.poll() is None:
            time.sleep(0.005)
        time.sleep(0.02 + random.random() * 0.2)
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def kill(rounds: int, folder: Path, sync: str = "full") -> Result:
    """SIGKILL: the kernel keeps what was written, so even NORMAL loses nothing; no control."""
    result, journal, acks = Result("kill", sync), folder / "kill.db", folder / "acks"
    for _ in range(rounds):
        with writing(journal, sync, acks):
            pass
        result.round(acks, journal)
    return result


def fuse(rounds: int, folder: Path, sync: str = "full") -> Result:
    """Drop what was not synced."""
    result, mount, acks = Result("fuse", sync), folder / "mount", folder / "acks"
    mount.mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, "-m", "tests.fault.log.drop_fs", str(mount)], cwd=ROOT)
    try:
        end = time.monotonic() + START_S
        while not mount.is_mount() and time.monotonic() < end:
            time.sleep(0.02)
        for _ in range(rounds):
            with writing(mount / "j.db", sync, acks, "exclusive"):
                pass
            os.setxattr(mount, "user.crash", b"1")
            result.round(acks, mount / "j.db", exclusive=True)
    finally:
        subprocess.run(["fusermount3", "-u", str(mount)], check=False)
        process.terminate()
        process.wait()
    return result


def shutdown(rounds: int, folder: Path, sync: str = "full") -> Result:
    """Shut ext4 down without flushing its log, then let it recover.

    In a thread with a mount namespace of its own: whoever makes one meanwhile would copy the mount, and what was shut
    down would stay, instead of recovering.
    """
    with concurrent.futures.ThreadPoolExecutor(1, initializer=_own_mounts) as pool:
        return pool.submit(_shutdown, rounds, folder, sync).result()


def _own_mounts() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for done in (libc.unshare(CLONE_NEWNS), libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)):
        if done:
            raise OSError(ctypes.get_errno(), "no mount namespace")


def _shutdown(rounds: int, folder: Path, sync: str) -> Result:
    result, image, mount, acks = Result("shutdown", sync), folder / "ext4.img", folder / "mount", folder / "acks"
    # What was acknowledged before the cut. A power cut ends the writer, too; here a sync that runs at that moment may
    # still return 0 for a transaction that jbd2 has just dropped (jbd2_complete_transaction finds it neither running
    # nor committing), and the writer lives on to say so.
    promised = folder / "promised"
    mount.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with attached(image) as device:
        for _ in range(rounds):
            with mounted(device, mount), writing(mount / "j.db", sync, acks):
                fd = os.open(mount, os.O_RDONLY)
                promised.write_bytes(acks.read_bytes())
                fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("I", NOLOGFLUSH))
                os.close(fd)
            with mounted(device, mount):
                result.round(promised, mount / "j.db")
    return result


@contextlib.contextmanager
def attached(image: Path) -> Iterator[str]:
    """A loop device for all rounds: one for each mount would be let go late, and two would cache the same file."""
    done = subprocess.run(["losetup", "--find", "--show", str(image)], check=True, stdout=subprocess.PIPE, text=True)
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextlib.contextmanager
def mounted(device: str, mount: Path) -> Iterator[None]:
    subprocess.run(["mount", device, str(mount)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def missing(method: str) -> str | None:
    """What this machine lacks for a method, by name."""
    needed = {"kill": (), "fuse": ("fusermount3",), "shutdown": ("mkfs.ext4", "losetup", "mount")}[method]
    for program in needed:
        if shutil.which(program) is None:
            return program
    if method == "fuse" and not Path("/dev/fuse").exists():
        return "/dev/fuse"
    if method == "fuse" and importlib.util.find_spec("mfusepy") is None:
        return "mfusepy"
    if method == "shutdown" and os.geteuid() != 0:
        return "root"
    return None


METHODS: dict[str, Callable[..., Result]] = {"kill": kill, "fuse": fuse, "shutdown": shutdown}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fault.log.power")
    parser.add_argument("methods", nargs="*", choices=[[], *METHODS], default=[], metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--dir", type=Path, help="scratch folder; on a real disk for `shutdown`")
    args = parser.parse_args()
    failed = False
    for method in args.methods or METHODS:
        if (lack := missing(method)) is not None:
            sys.stdout.write(f"{method}: skipped, {lack} is missing\n")
            continue
        for sync in ("full",) if method == "kill" else ("full", "normal"):
            with tempfile.TemporaryDirectory(dir=args.dir, prefix=".power-") as name:
                result = METHODS[method](args.rounds, Path(name), sync)
            failed |= not result.passed
            sys.stdout.write(json.dumps(asdict(result) | {"passed": result.passed}) + "\n")
            sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
