"""What root prepares before the executor becomes another user: its folders, its control groups, the spawner's place.

The state folder belongs to root and is sticky, so that the executor can write its journal but cannot put another trust
or manifest folder in place. Everything the executor itself writes is handed over by name.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pointcall_executor.kernel.cgroup import Cgroup, find_root, own
from pointcall_executor.privileges import PrivilegeError
from pointcall_executor.services.groups import LIMITED, give_instances, remove_empty

READ: Final = ("trust", "manifest", "notices")  # folders that it reads and must not write
OURS: Final = ("services", "proposals", "run")  # folders
# With these, all that is written.
FILES: Final = ("journal.db*", "pins.*", "probes.jsonl", "learned.json", "standing.json")
STATE_MODE: Final = 0o1771
SPAWNER: Final = "spawner"  # no service is called so: theirs have a number behind a dot


def hand_over(state: Path, user: str) -> None:
    """Let `user` write what the executor writes in the state folder, read trust and manifest, and nothing else."""
    account = _account(user)
    os.chown(state, 0, account.pw_gid)
    state.chmod(STATE_MODE)
    for name in OURS:
        for fd in _below(state / name):
            os.chown(fd, account.pw_uid, account.pw_gid)
    for name in READ:
        for fd in _below(state / name):
            os.chown(fd, 0, account.pw_gid)
            mode = os.fstat(fd).st_mode
            os.fchmod(fd, mode & 0o700 | (0o050 if stat.S_ISDIR(mode) else 0o040))
    for path in (path for pattern in FILES for path in sorted(state.glob(pattern))):
        with _opened(path.name, None, path) as fd:
            os.chown(fd, account.pw_uid, account.pw_gid)


def _below(folder: Path) -> Iterator[int]:
    """A descriptor of this folder, which is made where it is missing, and of every folder and regular file below.

    The account may have made links in an earlier life, and root follows none: PrivilegeError where the folder is one,
    or where a file has another name too, which may lie anywhere; below it links stay as they are.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o755)
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise _not_ours(folder, "no folder")
    for path, _folders, files, fd in os.fwalk(folder, follow_symlinks=False):
        yield fd
        for name in files:
            if stat.S_ISREG(os.lstat(name, dir_fd=fd).st_mode):
                with _opened(name, fd, Path(path, name)) as file:
                    yield file


@contextlib.contextmanager
def _opened(name: str, folder: int | None, path: Path) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path if folder is None else name, flags, dir_fd=folder)
    except OSError as error:
        raise _not_ours(path, str(error.strerror)) from None
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1:
            raise _not_ours(path, f"{about.st_nlink} names")
        yield fd
    finally:
        os.close(fd)


def _not_ours(path: Path, got: str) -> PrivilegeError:
    return PrivilegeError(
        "the state folder holds what is not handed over", id="privilege.handover", want="folders and files of one name",
        got=f"{path}: {got}"[:500], hint="find out who put it there, and remove it",
    )  # fmt: skip


def delegate(folder: str, user: str) -> None:
    """A control group that `user` may divide and fill, as Documentation/admin-guide/cgroup-v2.rst says; with what an
    executor that was somebody else left running in it."""
    account = _account(user)
    group = Cgroup.create(folder)
    _enable_limits(group.path)
    for name in ("", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"):
        os.chown(group.path / name, account.pw_uid, account.pw_gid)
    give_instances(folder, account.pw_uid, account.pw_gid)


@contextlib.contextmanager
def inside(folder: str) -> Iterator[None]:
    """Be in `<folder>/spawner` meanwhile, so that what starts now lives there: a process may only be moved between
    groups of one delegated tree."""
    before = own()
    Cgroup.create(f"{folder}/{SPAWNER}").add(0)
    try:
        yield
    finally:
        before.add(0)


def remove_place(folder: str) -> None:
    """The spawner's group, once it has ended, and what is above it where nothing else lives there."""
    with contextlib.suppress(OSError):
        (find_root() / folder / SPAWNER).rmdir()
        remove_empty(folder)


def _enable_limits(path: Path) -> None:
    """So that services can have limits; where the tree has not the controller, arming says so."""
    root = find_root()
    for parent in (root, *reversed([p for p in path.parents if p.is_relative_to(root) and p != root]), path):
        for controller in LIMITED:
            with contextlib.suppress(OSError):
                (parent / "cgroup.subtree_control").write_text(f"+{controller}")


def _account(user: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(user)
    except KeyError:
        hint = "deploy/systemd/pointcall.sysusers.conf makes it"
        raise PrivilegeError(f"no account {user}", id="privilege.user", want=user, hint=hint) from None
