"""What root prepares before the executor becomes another user: its folders, its control groups, the spawner's place.

The state folder belongs to root and is sticky, so that the executor can write its journal but cannot put another trust
or manifest folder in place. Everything the executor itself writes is handed over by name.
"""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pointcall_executor.kernel.cgroup import Cgroup, find_root, own
from pointcall_executor.privileges import PrivilegeError
from pointcall_executor.services.groups import remove_empty

READ: Final = ("trust", "manifest")  # folders that it reads and must not write
OURS: Final = ("services", "proposals", "run")  # folders; with the journal and the record of pins all that is written
STATE_MODE: Final = 0o1771
SPAWNER: Final = "spawner"  # no service is called so: theirs have a number behind a dot


def hand_over(state: Path, user: str) -> None:
    """Let `user` write what the executor writes in the state folder, read trust and manifest, and nothing else."""
    account = _account(user)
    os.chown(state, 0, account.pw_gid)
    state.chmod(STATE_MODE)
    for name in OURS:
        (state / name).mkdir(mode=0o755, exist_ok=True)
        for path in (state / name, *(state / name).rglob("*")):
            os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
    for name in READ:
        for path in (state / name, *(state / name).rglob("*")) if (state / name).is_dir() else ():
            if not path.is_symlink():
                os.chown(path, 0, account.pw_gid)
                path.chmod(path.stat().st_mode & 0o700 | (0o050 if path.is_dir() else 0o040))
    for path in (*state.glob("journal.db*"), *state.glob("pins.json")):
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)


def delegate(folder: str, user: str) -> None:
    """A control group that `user` may divide and fill, as Documentation/admin-guide/cgroup-v2.rst says."""
    account = _account(user)
    group = Cgroup.create(folder)
    _enable_memory(group.path)
    for name in ("", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"):
        os.chown(group.path / name, account.pw_uid, account.pw_gid)


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


def _enable_memory(path: Path) -> None:
    """So that services can have memory limits; where the tree has not the controller, arming says so."""
    root = find_root()
    for parent in (root, *reversed([p for p in path.parents if p.is_relative_to(root) and p != root]), path):
        with contextlib.suppress(OSError):
            (parent / "cgroup.subtree_control").write_text("+memory")


def _account(user: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(user)
    except KeyError:
        hint = "deploy/systemd/pointcall.sysusers.conf makes it"
        raise PrivilegeError(f"no account {user}", id="privilege.user", want=user, hint=hint) from None
