"""What every loaded blob shares: its programs and links, what the kernel says that they are, and their end. No ring.

An object owns all its descriptors. When it is closed, or its process dies, everything leaves the kernel, unless it was
pinned.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from pointcall_executor.kernel import bpf, identity
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.errors import LoadError
from pointcall_executor.kernel.identity import Identity
from pointcall_executor.kernel.loader import Loaded, load
from pointcall_executor.kernel.maps import Map

CGROUP_ATTACH: Final[Mapping[str, bpf.AttachType]] = {
    "cgroup/connect4": bpf.AttachType.CGROUP_INET4_CONNECT,
    "cgroup/connect6": bpf.AttachType.CGROUP_INET6_CONNECT,
    "cgroup/sendmsg4": bpf.AttachType.CGROUP_UDP4_SENDMSG,
    "cgroup/sendmsg6": bpf.AttachType.CGROUP_UDP6_SENDMSG,
    "cgroup_skb/ingress": bpf.AttachType.CGROUP_INET_INGRESS,
    "cgroup_skb/egress": bpf.AttachType.CGROUP_INET_EGRESS,
}
Loader = Callable[[Blob, Mapping[str, int] | None], Loaded]


class KernelObject:
    """One loaded blob. LoadError where the kernel refuses it."""

    def __init__(
        self,
        blob: Blob,
        *,
        constants: Mapping[str, int] | None = None,
        loader: Loader = load,
        loaded: Loaded | None = None,
    ) -> None:
        self.blob = blob
        self._links: dict[str, int] = {}
        self._loaded: Loaded | None = loaded or loader(blob, constants)
        self._maps = {name: Map(fd) for name, fd in self._loaded.maps.items()}

    def programs(self) -> list[tuple[str, int, str]]:
        """(name, kernel id, tag) of every loaded program, as the kernel reports them now."""
        infos = ((name, bpf.program_info(fd)) for name, fd in self._alive.programs.items())
        return [(name, info.id, info.tag) for name, info in infos]

    def identity(self) -> Identity:
        """What the kernel says that this object is now: record it when arming."""
        return identity.read(self.blob.sha256, self._alive, self._links)

    def recheck(self, expected: Identity) -> list[str]:
        """What is no longer as recorded, one plain line each: a swapped program, a link that was taken off."""
        return identity.differences(expected, self.identity())

    def detach(self) -> None:
        """Stop seeing and refusing; maps and counters stay."""
        while self._links:
            os.close(self._links.popitem()[1])

    def close(self) -> None:
        """Detach and free everything. Twice does no harm."""
        if self._loaded is None:
            return
        self.detach()
        self._loaded.close()
        self._loaded = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _alive(self) -> Loaded:
        assert self._loaded is not None, "the object is closed"
        return self._loaded

    def _attach_cgroup(self, name: str, section: str, cgroup: Path) -> int:
        """A link of one program to a cgroup."""
        try:
            target = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                return bpf.link_create(self._alive.programs[name], target, CGROUP_ATTACH[section])
            finally:
                os.close(target)
        except OSError as error:
            raise does_not_attach(name, section, error) from None


def does_not_attach(name: str, section: str, error: OSError) -> LoadError:
    return LoadError(
        f"{name} does not attach to {section}",
        id="kernel.attach",
        got=str(error.strerror),
        hint="is the cgroup a folder of the v2 tree, and still there?"
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EBADF)
        else "another program may hold the cgroup exclusively: bpftool cgroup tree",
    )
