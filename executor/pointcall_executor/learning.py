"""What services have been learned to call, so that a recreated one is not learned again. Lives as long as the executor.

A service is known by its name and the digest of its declaration: another program is learned anew. Not kept on disk.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pointcall_executor.kernel.syscalls import SyscallSensor

Key = tuple[str, str]  # name, SHA-256 of its declaration


@dataclass(slots=True)
class Learned:
    """System calls by service, and until when (CLOCK_MONOTONIC ns) each is learned."""

    calls: dict[Key, frozenset[int]] = field(default_factory=dict)
    until_ns: dict[Key, int] = field(default_factory=dict)


class Learning:
    """Feeds one sensor from what is known, and keeps what it sees."""

    def __init__(self, sensor: SyscallSensor, learned: Learned, learn_ns: int) -> None:
        self._sensor, self._learned, self._learn_ns = sensor, learned, learn_ns
        self._watched: dict[int, Key] = {}

    def watch(self, cgroup_id: int, key: Key, now_ns: int) -> None:
        """A service runs in this cgroup now. What it learned before counts, and so does the time that it took."""
        until_ns = self._learned.until_ns.setdefault(key, now_ns + self._learn_ns)
        self._sensor.learn(cgroup_id, self._learned.calls.get(key, frozenset()), until_ns=until_ns)
        self._watched[cgroup_id] = key

    def refresh(self) -> None:
        """Take in what another session has kept meanwhile."""
        for cgroup_id, key in self._watched.items():
            known = self._learned.calls.get(key, frozenset()) | self._sensor.habits(cgroup_id).calls
            self._sensor.learn(cgroup_id, known, until_ns=self._learned.until_ns[key])

    def unwatch(self, cgroup_id: int) -> None:
        """It does not run there any more. Twice does no harm."""
        key = self._watched.pop(cgroup_id, None)
        if key is not None:
            self._keep(cgroup_id, key)
            self._sensor.forget(cgroup_id)

    def keep(self) -> None:
        """Keep what was seen so far: the next session goes on from there."""
        for cgroup_id, key in self._watched.items():
            self._keep(cgroup_id, key)

    def _keep(self, cgroup_id: int, key: Key) -> None:
        self._learned.calls[key] = self._learned.calls.get(key, frozenset()) | self._sensor.habits(cgroup_id).calls
