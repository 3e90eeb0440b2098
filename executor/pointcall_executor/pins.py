"""Where an installation pins its breaker and its isolations in bpffs, and the record of what the breaker was then.

Trust: the record is trusted as far as the state folder is. Who can write it can hand this node other programs only
together with the pins, which need root; kernel/pins.py compares the two.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pointcall_executor.kernel.breaker import BreakerSensor
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.identity import Identity
from pointcall_executor.kernel.isolation import end_pinned
from pointcall_executor.kernel.pins import Pinned, unpin

BPFFS: Final = Path("/sys/fs/bpf")


class Pins:
    """Where this installation pins its breaker and its isolations, and the record of what the breaker was then."""

    def __init__(self, state_dir: Path, bpffs: Path = BPFFS) -> None:
        self._record, self._lost = state_dir / "pins.json", state_dir / "pins.lost"
        self.folder = bpffs / f"pointcall_{hashlib.sha256(str(state_dir).encode()).hexdigest()[:12]}"
        self._next = bpffs / f"{self.folder.name}_next"  # pins that are about to be `folder`
        self.isolations = bpffs / f"{self.folder.name}_isolated"

    def adopt(self, make: Callable[[Pinned | None], BreakerSensor]) -> BreakerSensor:
        """The pinned breaker if it is exactly what was recorded and wanted, else a new one. The pins stay as they are:
        what they hold protects until something else is kept, or until it is detached."""
        try:
            identity = Identity.from_dict(json.loads(self._record.read_bytes()))
            return make(Pinned(self.folder, identity))
        except (OSError, ValueError, KeyError, TypeError, KernelError):
            return make(None)

    def keep(self, breaker: BreakerSensor, *, taken_up: bool) -> None:
        """Let the breaker outlive this process, instead of what was pinned before. KernelError where bpffs is not
        mounted: then that stays pinned. `taken_up`: it is the same one, and what it had lost then stays noted."""
        unpin(self._next)
        pinned = breaker.pin(self._next)
        self._drop_breaker()
        if not taken_up:
            self._lost.unlink(missing_ok=True)
        self._next.rename(self.folder)
        self._record.write_text(json.dumps(pinned.identity.as_dict()))

    def drop(self) -> None:
        """Remove all pins. What this process holds stays."""
        unpin(self._next)
        self._drop_breaker()
        self._lost.unlink(missing_ok=True)
        end_pinned(self.isolations, only_expired=False)
        with contextlib.suppress(FileNotFoundError):
            self.isolations.rmdir()

    def found(self) -> bool:
        """Whether anything is pinned."""
        return any(folder.exists() for folder in (self.folder, self._next, self.isolations))

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

    def _drop_breaker(self) -> None:
        unpin(self.folder)
        self._record.unlink(missing_ok=True)
