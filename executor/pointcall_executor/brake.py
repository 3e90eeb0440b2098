"""The brake: what people have said that holds this executor back, and whether what was decided may still begin.

Halted (halt.py), disarmed by hand, paused. Said from any thread, obeyed at the last moment: a durable action begins
under `lock`, so nobody hears that it has stopped while something begins. What the guard knows of a pause is the loop's.
"""

from __future__ import annotations

import threading
from pathlib import Path

from pointcall_executor.arming import ArmingError
from pointcall_executor.core.guard import Refusal
from pointcall_executor.halt import halted
from pointcall_executor.loop import Loop
from pointcall_executor.run import Run


class Brake:
    """Thread-safe."""

    def __init__(self, state_dir: Path, loop: Loop) -> None:
        self._state_dir, self._loop = state_dir, loop
        self.lock = threading.Lock()  # held while an action begins, and while beginning is forbidden
        self.generation = 0  # of disarming: what was decided before one is not done after it
        self.paused = ""  # why no durable action may begin now: the pause that somebody asked for
        self.disarmed_by_hand = ""  # why: it stays so, also after a restart, until a person arms

    def outdate(self) -> None:
        """From here on nothing begins that was decided before."""
        with self.lock:
            self.generation += 1

    def pause(self, reason: str) -> None:
        """From here on nothing begins; with an empty reason it may again."""
        with self.lock:
            self.paused = reason

    def called_off(self, run: Run) -> Refusal | None:
        """What this executor was told meanwhile, so that an action of this run does not begin."""
        if run.generation != self.generation or self._loop.failure is not None:
            return Refusal("guard.disarmed", "armed", "disarmed before it began", "arm a manifest")
        if self.paused:
            return Refusal("guard.paused", "not paused", f"paused: {self.paused}", "pointcall resume")
        return None

    def too_late(self, run: Run) -> Refusal | None:
        """What forbids that an action of this run begins now, though the guard has let it through. Under the lock."""
        if halted(self._state_dir) is not None:  # looked at last: the switch works without this executor
            return Refusal("guard.disarmed", "armed", "halted before it began", "pointcall halt --clear, then arm")
        return self.called_off(run)

    def require_not_halted(self) -> None:
        """ArmingError `executor.halted` while the kill switch is on."""
        held = halted(self._state_dir)
        if held is not None:
            hint = "pointcall halt --clear"
            raise ArmingError("the node is halted", id="executor.halted", got=held.reason, hint=hint)

    def require(self, generation: int) -> None:
        """ArmingError `arm.interrupted` where it was disarmed since this generation."""
        if self.generation != generation:
            raise ArmingError("it was disarmed meanwhile", id="arm.interrupted", hint="arm again if that is meant")

    def require_not_paused(self) -> None:
        """ArmingError `executor.paused` while somebody has paused the executor."""
        if self.paused:
            raise ArmingError(
                "the executor is paused", id="executor.paused", want="not paused", got=self.paused,
                hint="pointcall resume",
            )  # fmt: skip

    def require_not_disarmed(self, *, by_itself: bool) -> None:
        """ArmingError `arm.by-hand` where a person has disarmed, and none asks for arming now."""
        if by_itself and self.disarmed_by_hand:
            raise ArmingError(
                "a person has disarmed this node", id="arm.by-hand", want="a person who arms it",
                got=self.disarmed_by_hand, hint="pointcall arm",
            )  # fmt: skip
