"""Parameters of a sensor in the manifest: constants of its programs, and a few that user space keeps. Pure.

Spec: docs/spec/kernel-abi.md section 14; a test compares that page with `OWN_PARAMS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pointcall_attest.manifest import Sensor
from pointcall_executor.arming import ArmingError

MS_NS: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a sensor that user space keeps, not a constant of its programs. The unit ends its name."""

    default: int
    lo: int
    hi: int
    step: int = 1  # only multiples of it

    def takes(self, value: int) -> bool:
        return self.lo <= value <= self.hi and value % self.step == 0

    def __str__(self) -> str:
        return f"{self.lo}..{self.hi}" + (f", a multiple of {self.step}" if self.step > 1 else "")


HOUR_MS: Final = 3_600_000
OWN_PARAMS: Final[Mapping[str, Mapping[str, Param]]] = {
    "breaker": {"stuck_ms": Param(60_000, 0, HOUR_MS)},  # 0: never reported
    "syscalls": {"learn_ms": Param(600_000, 0, 24 * HOUR_MS)},
    "drill": {  # which faults a manifest allows: 1 yes, 0 no
        "refuse": Param(0, 0, 1),
        "lose": Param(0, 0, 1),
        "delay": Param(0, 0, 1),
        "kill": Param(0, 0, 1),
        "slow_file": Param(0, 0, 1),
        "seconds_max": Param(60, 1, 600),
    },
    "pressure": {
        "cpu_ms": Param(0, 0, 10_000),  # 0: not watched
        "memory_ms": Param(0, 0, 10_000),
        "io_ms": Param(0, 0, 10_000),
        # The kernel takes no other from who has no CAP_SYS_RESOURCE, which the executor gives up.
        "window_ms": Param(2_000, 2_000, 10_000, 2_000),
    },
}


def split(sensor: Sensor) -> tuple[dict[str, int], dict[str, int]]:
    """A sensor's parameters: the constants of its programs, and those that are user space's, with their defaults.

    ArmingError `arm.sensor-param` where one of user space's is out of range.
    """
    limits = OWN_PARAMS.get(sensor.name, {})
    constants = {name: value for name, value in sensor.params.items() if name not in limits}
    own = {name: sensor.params.get(name, limit.default) for name, limit in limits.items()}
    wrong = [f"{name}={own[name]}" for name, limit in limits.items() if not limit.takes(own[name])]
    if sensor.blob is None:
        wrong += sorted(constants)
    if wrong:
        ranges = ", ".join(f"{name} {limit}" for name, limit in limits.items())
        raise ArmingError(
            f"a parameter of sensor {sensor.name} is unknown or out of range", id="arm.sensor-param", want=ranges,
            got=", ".join(wrong),
        )  # fmt: skip
    return constants, own
