"""What a service has learned to call goes with it: to its next cgroup, to the next session, not to another program."""

from __future__ import annotations

from pointcall_executor.kernel.syscalls import Habits
from pointcall_executor.learning import Learned, Learning

API, OTHER = ("api", "aa" * 32), ("api", "bb" * 32)
LEARN_NS = 1000


class Sensor:
    """Remembers like the map in the kernel."""

    def __init__(self) -> None:
        self.watched: dict[int, Habits] = {}

    def learn(self, cgroup_id: int, known: frozenset[int] = frozenset(), *, until_ns: int = 0) -> None:
        self.watched[cgroup_id] = Habits(0, until_ns, 0, known)

    def habits(self, cgroup_id: int) -> Habits:
        return self.watched[cgroup_id]

    def forget(self, cgroup_id: int) -> None:
        self.watched.pop(cgroup_id, None)

    def calls(self, cgroup_id: int, *numbers: int) -> None:
        habits = self.watched[cgroup_id]
        self.watched[cgroup_id] = Habits(0, habits.armed_ns, 0, habits.calls | set(numbers))


def test_a_recreated_service_goes_on_where_it_was() -> None:
    sensor, learned = Sensor(), Learned()
    learning = Learning(sensor, learned, LEARN_NS)  # type: ignore[arg-type]
    learning.watch(1, API, 100)
    sensor.calls(1, 0, 257)
    learning.unwatch(1)
    learning.unwatch(1)
    assert sensor.watched == {}
    learning.watch(2, API, 900)
    assert sensor.watched[2] == Habits(0, 1100, 0, frozenset({0, 257}))  # the time it took counts, too


def test_another_program_under_the_same_name_is_learned_anew() -> None:
    sensor, learned = Sensor(), Learned()
    learning = Learning(sensor, learned, LEARN_NS)  # type: ignore[arg-type]
    learning.watch(1, API, 100)
    sensor.calls(1, 0)
    learning.unwatch(1)
    learning.watch(2, OTHER, 900)
    assert sensor.watched[2] == Habits(0, 1900, 0, frozenset())


def test_the_next_session_takes_it_over() -> None:
    sensor, after, learned = Sensor(), Sensor(), Learned()
    learning, following = Learning(sensor, learned, LEARN_NS), Learning(after, learned, LEARN_NS)  # type: ignore[arg-type]
    learning.watch(1, API, 100)
    sensor.calls(1, 0, 1)
    following.watch(1, API, 500)
    after.calls(1, 2)
    learning.keep()
    following.refresh()
    assert after.watched[1] == Habits(0, 1100, 0, frozenset({0, 1, 2}))
