"""Where an installation pins its breaker and its isolations in bpffs, and the record of what the breaker was then.

Trust: the record is trusted as far as the state folder is. Who can write it can hand this node other programs only
together with the pins, which need root; kernel/pins.py compares the two.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from pointcall_executor.durable import write_whole
from pointcall_executor.kernel.breaker import BreakerSensor, let_pass, pinned_refusing
from pointcall_executor.kernel.cgroup import by_id, find_root
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.identity import Identity
from pointcall_executor.kernel.isolation import end_pinned, pinned_isolations
from pointcall_executor.kernel.pins import Pinned, unpin

BPFFS: Final = Path("/sys/fs/bpf")


class Pins:
    """Where this installation pins its breaker and its isolations, and the record of what the breaker was then."""

    def __init__(self, state_dir: Path, bpffs: Path = BPFFS) -> None:
        self._record, self._lost = state_dir / "pins.json", state_dir / "pins.lost"
        self._record_next, self._record_old = state_dir / "pins.json.next", state_dir / "pins.json.old"
        self.folder = bpffs / f"pointcall_{hashlib.sha256(str(state_dir).encode()).hexdigest()[:12]}"
        self._next = bpffs / f"{self.folder.name}_next"  # pins that are about to be `folder`
        self._old = bpffs / f"{self.folder.name}_old"  # pins that were `folder` until a moment ago
        self.isolations = bpffs / f"{self.folder.name}_isolated"

    def adopt(self, make: Callable[[Pinned | None], BreakerSensor]) -> BreakerSensor:
        """The pinned breaker if it is exactly what was recorded and wanted, else a new one. The pins stay as they are:
        what they hold protects until something else is kept, or until it is detached."""
        try:
            identity = Identity.from_dict(json.loads(self._record.read_bytes()))
            return make(Pinned(self.folder, identity))
        except (OSError, ValueError, KeyError, TypeError, KernelError):
            return make(None)

    @contextlib.contextmanager
    def keep(self, breaker: BreakerSensor, *, taken_up: bool) -> Iterator[None]:
        """Let the breaker outlive this process, instead of what was pinned before; that goes when the block ends. Where
        the block fails all is as it was. KernelError `kernel.pin` where bpffs is not mounted or the record cannot be
        written. `taken_up`: it is the same one, and what it had lost then stays noted."""
        with contextlib.ExitStack() as undo:
            undo.callback(unpin, self._next)
            undo.callback(self._record_next.unlink, missing_ok=True)
            self._prepare(breaker)
            _swap(self._next, self.folder, self._old, undo)
            _swap(self._record_next, self._record, self._record_old, undo)
            if not taken_up:
                undo.callback(self.note_lost, self.lost)
                self._lost.unlink(missing_ok=True)
            yield
            undo.pop_all()
        with contextlib.suppress(OSError):  # what is kept is in place; the next time tries again
            unpin(self._old)
            self._record_old.unlink(missing_ok=True)

    def _prepare(self, breaker: BreakerSensor) -> None:
        """Pins and record beside those that are there, on the disk."""
        for leftover in (self._next, self._old):  # of a process that was killed
            unpin(leftover)
        pinned = breaker.pin(self._next)
        try:
            write_whole(self._record_next, json.dumps(pinned.identity.as_dict()).encode())
        except OSError as error:
            raise KernelError(
                "what is pinned could not be recorded", id="kernel.pin", want="a state folder with space",
                got=error.strerror or "", hint="make space in the state folder, and arm again",
            ) from None  # fmt: skip

    def drop(self) -> None:
        """Remove all pins. What this process holds stays."""
        for pins in (self._next, self._old, self.folder):
            unpin(pins)
        for file in (self._record, self._record_next, self._record_old, self._lost):
            file.unlink(missing_ok=True)
        end_pinned(self.isolations, only_expired=False)
        with contextlib.suppress(FileNotFoundError):
            self.isolations.rmdir()

    def in_force(self) -> dict[str, list[str]]:
        """What an earlier executor left refusing in the kernel: destinations, and cgroups that are isolated."""
        circuits = {str(to) for folder in (self.folder, self._next, self._old) for to in pinned_refusing(folder)}
        isolations = {_cgroup(number) for number in pinned_isolations(self.isolations)}
        found = {"circuits": sorted(circuits), "isolations": sorted(isolations)}
        return {what: targets for what, targets in found.items() if targets}

    def let_pass(self) -> None:
        """Nothing that an earlier executor pinned refuses anything from now on: circuits only watch, isolations end.
        What cannot be told so is removed. Twice without harm."""
        end_pinned(self.isolations, only_expired=False)
        told = [let_pass(folder) for folder in (self.folder, self._next, self._old)]
        if not all(told):
            self.drop()

    def found(self) -> bool:
        """Whether anything is pinned."""
        return any(folder.exists() for folder in (self.folder, self._next, self._old, self.isolations))

    @property
    def lost(self) -> int:
        """Records that the pinned breaker had lost when an executor looked last."""
        try:
            return int(self._lost.read_text())
        except (OSError, ValueError):
            return 0

    def note_lost(self, count: int) -> None:
        """Remember it for the next executor; written only when it grows."""
        if count > self.lost:
            self._lost.write_text(str(count))


def _cgroup(number: int) -> str:
    """Its path below the root of the tree; the number of one that is gone."""
    try:
        return str(by_id(number).path.relative_to(find_root()))
    except KernelError:
        return f"cgroup {number}"


def _swap(new: Path, place: Path, old: Path, undo: contextlib.ExitStack) -> None:
    """Put `new` in its place, and aside what is there."""
    if place.exists():
        place.rename(old)
        undo.callback(old.rename, place)
    new.rename(place)
    undo.callback(place.rename, new)
