"""Threads, locks, futures, pools, event descriptors and epoll on simulated tasks: as much of each as the executor uses.

They stand in for `threading`, `concurrent.futures`, `select` and parts of `os` while the executor's modules run in a
simulation (machine.py puts them there). A lock belongs to a task here: real locks would take all tasks for one thread.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

from tests.sim.scheduler import Scheduler, Task


class Future:
    """concurrent.futures.Future, as far as it is used."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._waiters: list[Task] = []
        self._done, self._value = False, None
        self._error: BaseException | None = None

    def done(self) -> bool:
        return self._done

    def _finish(self) -> None:
        assert not self._done, "a future ends once"
        self._done = True
        for task in self._waiters:
            self._scheduler.wake(task)

    def set_result(self, value: Any) -> None:
        self._value = value
        self._finish()

    def set_exception(self, error: BaseException) -> None:
        self._error = error
        self._finish()

    def result(self, timeout: float | None = None) -> Any:
        scheduler = self._scheduler
        scheduler.alive()
        deadline = None if timeout is None else scheduler.now + int(timeout * 1e9)
        while not self._done:
            assert scheduler.current is not None
            self._waiters.append(scheduler.current)
            left = None if deadline is None else deadline - scheduler.now
            if not scheduler.wait(left) and not self._done:
                raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._value


class Lock:
    """threading.RLock; used for Lock too, where taking it twice is refused."""

    def __init__(self, scheduler: Scheduler, *, again: bool) -> None:
        self._scheduler, self._again = scheduler, again
        self._owner: Task | None = None
        self._depth = 0
        self._waiters: collections.deque[Task] = collections.deque()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        scheduler, own = self._scheduler, self._scheduler.current
        deadline = None if timeout < 0 else scheduler.now + int(timeout * 1e9)
        scheduler.preempt()
        if self._owner is own and own is not None:
            assert self._again, "a lock is taken twice by one thread"
            self._depth += 1
            return True
        while self._owner is not None:
            if not blocking:
                return False
            assert own is not None
            left = None if deadline is None else deadline - scheduler.now
            if left is not None and left <= 0:
                return False
            self._waiters.append(own)
            if not scheduler.wait(left):
                self._waiters.remove(own)
        self._owner, self._depth = own, 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._owner = None
        if self._waiters:
            self._scheduler.wake(self._waiters.popleft())

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Condition(Lock):
    """threading.Condition with its own lock."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler, again=True)
        self._watchers: list[Task] = []

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        scheduler = self._scheduler
        deadline = None if timeout is None else scheduler.now + int(timeout * 1e9)
        while not predicate():
            left = None if deadline is None else deadline - scheduler.now
            if left is not None and left <= 0:
                return False
            assert scheduler.current is not None
            self._watchers.append(scheduler.current)
            self.release()
            try:
                scheduler.wait(left)
            finally:
                if not scheduler.current.process.dead:
                    self.acquire()
        return True

    def notify_all(self) -> None:
        watchers, self._watchers = self._watchers, []
        for task in watchers:
            self._scheduler.wake(task)


class Thread:
    """threading.Thread."""

    def __init__(
        self, scheduler: Scheduler, target: Callable[[], Any], name: str = "thread", daemon: bool | None = None
    ) -> None:
        self._scheduler, self._target, self.name = scheduler, target, name
        self._task: Task | None = None

    def start(self) -> None:
        scheduler = self._scheduler
        scheduler.alive()
        assert scheduler.current is not None
        self._task = scheduler.spawn(scheduler.current.process, self.name, self._target)
        self._task.local["thread"] = self

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done

    def join(self) -> None:
        task, own = self._task, self._scheduler.current
        assert task is not None
        assert own is not None
        while not task.done:
            task.finished.append(own)
            self._scheduler.wait()


class Threading:
    """The module `threading`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def Lock(self) -> Lock:
        return Lock(self._scheduler, again=False)

    def RLock(self) -> Lock:
        return Lock(self._scheduler, again=True)

    def Condition(self) -> Condition:
        return Condition(self._scheduler)

    def Thread(self, **how: Any) -> Thread:
        return Thread(self._scheduler, **how)

    def current_thread(self) -> object:
        task = self._scheduler.current
        return task.local.get("thread", task) if task is not None else self

    def main_thread(self) -> object:
        return self


class Pool:
    """concurrent.futures.ThreadPoolExecutor."""

    def __init__(self, scheduler: Scheduler, size: int, thread_name_prefix: str = "pool") -> None:
        self._scheduler, self._size, self._name = scheduler, size, thread_name_prefix
        self._jobs: collections.deque[tuple[Callable[..., Any], tuple[Any, ...]]] = collections.deque()
        self._busy = 0
        self._ended = False
        self._waiters: list[Task] = []

    def submit(self, work: Callable[..., Any], *args: Any) -> None:
        self._scheduler.alive()
        if self._ended:
            raise RuntimeError("cannot schedule new futures after shutdown")
        self._jobs.append((work, args))
        if self._busy < self._size:
            self._busy += 1
            assert self._scheduler.current is not None
            self._scheduler.spawn(self._scheduler.current.process, self._name, self._work)

    def _work(self) -> None:
        while self._jobs:
            work, args = self._jobs.popleft()
            work(*args)
        self._busy -= 1
        if not self._busy:
            for task in self._waiters:
                self._scheduler.wake(task)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._ended = True
        if cancel_futures:
            self._jobs.clear()
        while wait and self._busy:
            assert self._scheduler.current is not None
            self._waiters.append(self._scheduler.current)
            self._scheduler.wait()


class Descriptor:
    """Something that can be readable: an eventfd, a ring."""

    def __init__(self) -> None:
        self.count = 0
        self.polls: set[Epoll] = set()


class Descriptors:
    """Open descriptors of the machine, by number."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._open: dict[int, Descriptor] = {}
        self._next = 3

    def open(self) -> int:
        self._next += 1
        self._open[self._next] = Descriptor()
        return self._next

    def close(self, fd: int) -> None:
        del self._open[fd]

    def get(self, fd: int) -> Descriptor:
        if fd not in self._open:
            raise OSError(9, "Bad file descriptor")
        return self._open[fd]

    def readable(self, fd: int) -> bool:
        return fd in self._open and self._open[fd].count > 0

    def signal(self, fd: int, count: int) -> None:
        """Set how much is there to be read; whoever polls is woken."""
        found = self._open[fd]
        found.count = count
        if count:
            for poll in found.polls:
                poll.wake()


class Epoll:
    """select.epoll: level-triggered reading."""

    def __init__(self, descriptors: Descriptors) -> None:
        self._descriptors = descriptors
        self._fds: dict[int, None] = {}
        self._waiter: Task | None = None

    def register(self, fd: int, mask: int) -> None:
        self._descriptors.scheduler.alive()
        assert fd not in self._fds, f"descriptor {fd} is registered twice"
        self._descriptors.get(fd).polls.add(self)
        self._fds[fd] = None

    def unregister(self, fd: int) -> None:
        if fd not in self._fds:
            raise FileNotFoundError(2, "No such file or directory")
        del self._fds[fd]
        self._descriptors.get(fd).polls.discard(self)

    def wake(self) -> None:
        if self._waiter is not None:
            self._descriptors.scheduler.wake(self._waiter)

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        scheduler = self._descriptors.scheduler
        scheduler.alive()
        ready = self._ready()
        if not ready:
            self._waiter = scheduler.current
            scheduler.wait(int(timeout * 1e9))
            self._waiter = None
            ready = self._ready()
        return ready

    def _ready(self) -> list[tuple[int, int]]:
        return [(fd, 1) for fd in self._fds if self._descriptors.readable(fd)]

    def close(self) -> None:
        for fd in list(self._fds):
            if self._descriptors.readable(fd) or fd in self._descriptors._open:
                self._descriptors.get(fd).polls.discard(self)
        self._fds.clear()


class Select:
    """The module `select`."""

    EPOLLIN = 1

    def __init__(self, descriptors: Descriptors) -> None:
        self._descriptors = descriptors

    def epoll(self) -> Epoll:
        return Epoll(self._descriptors)


class Os:
    """What the daemon uses of `os`."""

    EFD_NONBLOCK = EFD_CLOEXEC = EFD_SEMAPHORE = 0

    def __init__(self, scheduler: Scheduler, descriptors: Descriptors) -> None:
        self._scheduler, self._descriptors = scheduler, descriptors

    def urandom(self, size: int) -> bytes:
        return self._scheduler.random.randbytes(size)

    def eventfd(self, count: int, flags: int = 0) -> int:
        self._scheduler.alive()
        return self._descriptors.open()

    def eventfd_write(self, fd: int, value: int) -> None:
        self._scheduler.alive()
        self._descriptors.signal(fd, self._descriptors.get(fd).count + value)

    def eventfd_read(self, fd: int) -> int:
        count = self._descriptors.get(fd).count
        if not count:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        self._descriptors.signal(fd, 0)
        return count

    def close(self, fd: int) -> None:
        self._descriptors.close(fd)
