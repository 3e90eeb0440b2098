"""Fixtures of the kernel tests: each test has its own network namespace and cgroup, and loads its own sensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.breaker import BreakerSensor
from pointcall_executor.kernel.cgroup import Cgroup
from tests.kernel import lab
from tests.kernel.slowfs import SlowFs, mounted, private_mounts

# Times that a test does not wait for are far away, so that a slow machine does not change the story.
FAST = {"threshold": 3, "cooldown_us": 60_000_000, "probe_us": 60_000_000, "window_us": 60_000_000}
SHORT_US = 250_000


@pytest.fixture(scope="session")
def breaker_blob() -> Blob:
    return lab.need_blob("breaker")


@pytest.fixture(scope="session")
def lifecycle_blob() -> Blob:
    return lab.need_blob("lifecycle")


@pytest.fixture
def network(breaker_blob: Blob) -> Iterator[None]:
    with lab.private_network():
        yield


@pytest.fixture
def group(breaker_blob: Blob) -> Iterator[Cgroup]:
    with lab.member("main") as cgroup:
        yield cgroup


Make = Callable[..., BreakerSensor]


@pytest.fixture
def make(breaker_blob: Blob, network: None, group: Cgroup) -> Iterator[Make]:
    """make(threshold=..., ...) -> an attached breaker on the test's cgroup; closed at the end."""
    open_sensors: list[BreakerSensor] = []

    def build(**constants: int) -> BreakerSensor:
        sensor = BreakerSensor(breaker_blob, cgroup=group.path, constants=FAST | constants)
        open_sensors.append(sensor)
        sensor.attach()
        return sensor

    yield build
    for sensor in open_sensors:
        sensor.close()


@pytest.fixture
def slow_fs(tmp_path: Path) -> Iterator[SlowFs]:
    """A FUSE file system whose answers a test can delay."""
    with private_mounts(), mounted(tmp_path) as fs:
        yield fs
