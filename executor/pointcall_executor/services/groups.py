"""The cgroups of one instance of a service: a v2 folder always, v1 folders on hybrid hosts for what is limited.

A service is destroyed by killing its cgroup, so that nothing it forked survives. Each instance gets folders of its own
name and so an id of its own: events of the old one cannot be mistaken for the new one's, and removing the old folders,
which takes the kernel up to 20 ms, need not be waited for.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from pointcall_executor.kernel.cgroup import MOUNTS, Cgroup, find_root
from pointcall_executor.services.chores import CHORES

EMPTY_SECONDS: Final = 5.0  # how long a killed cgroup may take to become empty
FREEZE_NS: Final = 250_000_000  # how long tasks may take to stop; one that waits for a disk takes as long as the disk
LIMITED: Final = ("memory", "pids")  # the controllers that hold what a declaration limits
REMOVE_AFTER_SECONDS: Final = 0.5  # the kernel's cgroup lock, which a new start needs, is held while one is removed


def v1_mount(controller: str, mounts: str | None = None) -> Path | None:
    """Where a v1 controller is mounted; None on a pure v2 host. `mounts` is the text of /proc/self/mounts."""
    for line in (MOUNTS.read_text() if mounts is None else mounts).splitlines():
        fields = line.split()
        if len(fields) >= 4 and fields[2] == "cgroup" and controller in fields[3].split(","):
            return Path(fields[1])
    return None


def trees() -> tuple[Path, ...]:
    """Where folders of instances may lie: the v2 tree, then the v1 hierarchies of the limits."""
    return tuple(dict.fromkeys(filter(None, (find_root(), *map(v1_mount, LIMITED)))))


def limit_place(controller: str) -> str:
    """The tree whose cgroups have this controller; empty where none has."""
    if (v1 := v1_mount(controller)) is not None:
        return str(v1)
    root = find_root()
    return str(root) if controller in (root / "cgroup.controllers").read_text().split() else ""


@dataclass(frozen=True, slots=True)
class Freezer:
    """The file by which the kernel stops every task of a cgroup, and the words for it."""

    folder: Path
    v1: bool = False

    @property
    def files(self) -> list[list[str]]:
        """[[path, what stops, what frees]], as the spawner wants them."""
        if self.v1:
            return [[str(self.folder / "freezer.state"), "FROZEN", "THAWED"]]
        return [[str(self.folder / "cgroup.freeze"), "1", "0"]]

    @property
    def frozen(self) -> bool:
        """Whether every task is stopped now."""
        with contextlib.suppress(FileNotFoundError):
            if self.v1:
                return (self.folder / "freezer.state").read_text().strip() == "FROZEN"
            return "frozen 1" in (self.folder / "cgroup.events").read_text()
        return False

    def settled(self, until_ns: int) -> bool:
        """Whether every task is stopped, a moment later at most: each stops on its way out of the kernel. True also
        once the freeze has ended, at `until_ns` (CLOCK_MONOTONIC): then nobody can say."""
        end_ns = time.monotonic_ns() + FREEZE_NS
        while not self.frozen:
            now_ns = time.monotonic_ns()
            if now_ns >= min(end_ns, until_ns):
                return now_ns >= until_ns
            time.sleep(0.001)
        return True


@dataclass(frozen=True, slots=True)
class Place:
    """The cgroup that somebody else's manager gave a service. It gives the next instance one of the same path."""

    group: Cgroup

    def living(self) -> tuple[int, ...]:
        """What lives there."""
        with contextlib.suppress(OSError):
            return self.group.pids()
        return ()

    def living_id(self) -> int:
        """Its id where something lives there, else 0."""
        with contextlib.suppress(OSError):
            return self.group.id if self.group.populated() else 0
        return 0


class ServiceGroups:
    """The folders of one instance below the executor's parent folder."""

    def __init__(self, relative: str) -> None:
        self.relative = relative
        self._main = Cgroup(find_root() / relative)
        self._v1 = {name: mount / relative for name in LIMITED if (mount := v1_mount(name)) is not None}
        self.freezer = Freezer(self._main.path)

    @classmethod
    def fresh(cls, parent: str, name: str) -> Self:
        """Folders that nobody had before: the clock does not go back before the next boot."""
        return cls(f"{parent}/{name}.{time.monotonic_ns()}")

    @property
    def folder(self) -> Path:
        """The v2 folder, whether it exists or not."""
        return self._main.path

    @property
    def id(self) -> int:
        """Of the v2 folder. OSError where it does not exist."""
        return self._main.id

    def create(self, *, memory_bytes: int | None = None) -> int:
        """Make the folders; the v2 cgroup's id."""
        try:
            self._main.path.mkdir()
        except FileNotFoundError:
            self._main.path.mkdir(parents=True)
        if memory_bytes is not None:
            self._limit_memory(memory_bytes)
        return self._main.id

    def limit_tasks(self, limit: int) -> None:
        """No more processes and threads at once, whoever they run as. OSError where nothing here can hold that."""
        (self._with("pids") / "pids.max").write_text(str(limit))

    def _limit_memory(self, limit: int) -> None:
        folder = self._with("memory")
        if "memory" in self._v1:
            (folder / "memory.limit_in_bytes").write_text(str(limit))
        else:
            (folder / "memory.max").write_text(str(limit))
            (folder / "memory.swap.max").write_text("0")

    def _with(self, controller: str) -> Path:
        """The folder with this controller: on a pure v2 host the main one, on a hybrid host one of the v1 hierarchy."""
        if (v1 := self._v1.get(controller)) is not None:
            v1.mkdir(parents=True, exist_ok=True)
            return v1
        root = find_root()
        if controller not in (root / "cgroup.controllers").read_text().split():
            raise FileNotFoundError(errno.ENOENT, f"no controller {controller} in cgroups")
        for parent in reversed(self._main.path.relative_to(root).parents):
            control = root / parent / "cgroup.subtree_control"
            if controller not in control.read_text().split():
                control.write_text(f"+{controller}")
        return self._main.path

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[int, ...]]:
        """Descriptors of the v2 folder, to be born in, and of cgroup.procs of each v1 folder that there is."""
        found = [os.open(self._main.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
        try:
            for folder in filter(Path.exists, dict.fromkeys(self._v1.values())):
                found.append(os.open(folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))  # noqa: PERF401 - each is closed
            yield tuple(found)
        finally:
            for fd in found:
                os.close(fd)

    def destroy(self) -> None:
        """Kill what is left and wait until nothing lives; the folders go a little later. Nothing there is no error."""
        _empty(self._main)
        folders = [self._main.path, *dict.fromkeys(self._v1.values())]
        CHORES.later(REMOVE_AFTER_SECONDS, functools.partial(_remove_all, folders))


def _empty(group: Cgroup) -> None:
    """Kill and wait. Looks often: recovery waits. (Of changes the kernel tells every 10 ms at most.)"""
    with contextlib.suppress(FileNotFoundError):
        if not group.populated():
            return
        group.kill()
        deadline = time.monotonic() + EMPTY_SECONDS
        while group.populated():
            if time.monotonic() > deadline:
                raise OSError(f"{group.path.name}: a killed task does not end")
            time.sleep(0.0002)


def instances(parent: str, name: str) -> set[str]:
    """What an earlier executor left of a service: paths of folders `<name>.<n>` below `parent`, in any tree."""
    return {
        str(f.relative_to(root)) for root in trees() for f in _folders(root / parent) if instance_of(f.name) == name
    }


def lives(parent: str, name: str) -> bool:
    """Whether anything runs in an instance: an empty folder may wait a moment longer to be removed."""
    main = find_root()
    for relative in instances(parent, name):
        with contextlib.suppress(OSError):
            if Cgroup(main / relative).populated():
                return True
    return False


def _folders(parent: Path) -> list[Path]:
    return [folder for folder in parent.glob("*.*") if instance_of(folder.name) and folder.is_dir()]


def instance_of(name: str) -> str:
    """Whose instance a folder of this name is; empty: nobody's."""
    service, _, number = name.rpartition(".")
    return service if number.isdecimal() else ""


def give_instances(parent: str, uid: int, gid: int) -> None:
    """Let an account end what another executor started below `parent`; for root. Empty v1 folders go: the account may
    not remove them. In those that live on nothing has to be written: the v2 folder ends the same processes."""
    main, *others = trees()
    for folder in _folders(main / parent):
        for path, _, files in os.walk(folder):
            for name in ("", *files) if path == str(folder) else ("",):
                with contextlib.suppress(FileNotFoundError):  # it ends meanwhile
                    os.chown(Path(path, name), uid, gid, follow_symlinks=False)
    for folder in (folder for root in others for folder in _folders(root / parent)):
        with contextlib.suppress(OSError):
            folder.rmdir()


def destroy_leftovers(parent: str, name: str, *, keep: str = "") -> None:
    """Kill and remove every instance but `keep`. Frozen tasks can be killed. OSError where something lives on; an empty
    folder of somebody else's stays."""
    for relative in instances(parent, name) - {keep}:
        for root in trees():
            if (root / relative).is_dir():
                _kill(Cgroup(root / relative))
                with contextlib.suppress(PermissionError):
                    _remove(root / relative)


def _kill(group: Cgroup) -> None:
    """Kill what lives, and wait in v2; of a v1 folder only its tasks can be asked, one by one."""
    if (group.path / "cgroup.events").exists():
        _empty(group)
    else:
        group.kill()


def remove_empty(relative: str) -> None:
    """Remove a folder and its parents from every tree as far as nothing lives in them."""
    CHORES.finish()
    for root in trees():
        folder = root / relative
        with contextlib.suppress(OSError):
            while folder != root:
                folder.rmdir()
                folder = folder.parent


def _remove_all(folders: Sequence[Path]) -> None:
    """One that cannot be removed costs no other. OSError of one of them."""
    with contextlib.ExitStack() as each:
        for folder in reversed(folders):
            each.callback(_remove, folder)


def _remove(folder: Path) -> None:
    """With what the service made below. rmdir works once the last task is gone; a killed one takes a moment."""
    deadline = time.monotonic() + EMPTY_SECONDS
    while folder.exists():
        try:
            for below in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
                below.rmdir()
            folder.rmdir()
        except FileNotFoundError:
            continue
        except PermissionError:
            raise
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)


def _group_line(pid: int, controller: str) -> str:
    """The cgroup of a process in one hierarchy (`` for v2), without slashes around it; empty for its root or no one."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    rows = (line.split(":", 2) for line in lines)
    return next((path.strip("/") for _, names, path in rows if controller in names.split(",")), "") if pid else ""


def group_of(pid: int) -> Cgroup | None:
    """The v2 cgroup of a process; None if it is gone, or in the root of the tree and so in none of its own."""
    found = _group_line(pid, "")
    return Cgroup(find_root() / found) if found else None


def v1_group_of(pid: int) -> Freezer | None:
    """The v1 freezer of a process that has no v2 cgroup of its own."""
    found, mount = _group_line(pid, "freezer"), v1_mount("freezer")
    return Freezer(mount / found, v1=True) if found and mount is not None else None
