"""Pins in a bpf file system: a sensor that outlives its executor, and one that is taken up again at restart.

Trust: who can write into the folder can hand us other programs. So what is adopted must be, id by id and tag by tag,
what this node recorded when it armed it; anything else is refused. Spec: docs/spec/kernel-abi.md section 11.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pointcall_executor.kernel import bpf
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.identity import Identity, differences, read
from pointcall_executor.kernel.loader import Loaded


@dataclass(frozen=True, slots=True)
class Pinned:
    """Where a sensor was pinned, and what it was then."""

    folder: Path
    identity: Identity


def pin(folder: Path, loaded: Loaded, links: Mapping[str, int]) -> None:
    """Pin everything below `folder`, a new folder in a bpf file system. All or nothing."""
    try:
        folder.mkdir(mode=0o700, parents=True)
        for name, fd in _named(loaded, links).items():
            bpf.pin(fd, str(folder / name))
    except OSError as error:
        if error.errno != errno.EEXIST:
            unpin(folder)
        raise KernelError(
            "the sensor could not be pinned", id="kernel.pin", want="a new folder in a bpf file system",
            got=f"{folder.name}: {error.strerror}", hint="mount -t bpf bpf /sys/fs/bpf; remove pins of an earlier run",
        ) from None  # fmt: skip


def adopt(blob: Blob, pinned: Pinned, constants: Mapping[str, int]) -> tuple[Loaded, dict[str, int]]:
    """The pinned sensor's descriptors. KernelError where anything is not what was recorded, or where `constants` are
    not those that it was armed with; then nothing is held."""
    wanted = hashlib.sha256(blob.with_constants(constants)).hexdigest()
    with contextlib.ExitStack() as stack:
        loaded, links = _open(blob, pinned, stack)
        now = read(blob.sha256, loaded, links)
        found = differences(pinned.identity, now)
        if now.constants != wanted:
            found.append("it was armed with other constants than those of the manifest")
        if found:
            raise KernelError(
                "what is pinned is not what was armed", id="kernel.pin.identity", want="the recorded identity",
                got=found[0][:200], hint="do not adopt it: unpin it, and arm from the manifest again",
            )  # fmt: skip
        stack.pop_all()
    return loaded, links


def unpin(folder: Path) -> None:
    """Remove the pins; what nothing else holds leaves the kernel. Twice does no harm."""
    with contextlib.suppress(FileNotFoundError):
        for name in folder.iterdir():
            name.unlink()
        folder.rmdir()


def _named(loaded: Loaded, links: Mapping[str, int]) -> dict[str, int]:
    """File name -> descriptor. A bpf file system allows no dots."""
    return (
        {f"map_{name}": fd for name, fd in loaded.maps.items()}
        | {f"prog_{name}": fd for name, fd in loaded.programs.items()}
        | {f"link_{name}": fd for name, fd in links.items()}
    )


def _open(blob: Blob, pinned: Pinned, stack: contextlib.ExitStack) -> tuple[Loaded, dict[str, int]]:
    def descriptor(name: str) -> int:
        try:
            fd = bpf.pinned(str(pinned.folder / name))
        except OSError as error:
            raise KernelError(
                "a pin is missing", id="kernel.pin.absent", want=name, got=error.strerror or "",
                hint="nothing protects now: arm from the manifest again",
            ) from None  # fmt: skip
        stack.callback(os.close, fd)
        return fd

    loaded = Loaded(
        {name: descriptor(f"map_{name}") for name in blob.maps},
        {program.name: descriptor(f"prog_{program.name}") for program in blob.programs},
    )
    return loaded, {link.name: descriptor(f"link_{link.name}") for link in pinned.identity.links}
