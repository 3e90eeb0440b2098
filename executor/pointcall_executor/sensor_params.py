"""Parameters of a sensor in the manifest: constants of its programs, and a few that user space keeps. Pure.

Spec: docs/spec/kernel-abi.md section 14; a test compares that page with `OWN_PARAMS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    off: bool = False  # 0 as well, whatever the range: never

    def takes(self, value: int) -> bool:
        return (self.lo <= value <= self.hi and value % self.step == 0) or (self.off and value == 0)

    def __str__(self) -> str:
        off = "0 or " if self.off else ""
        return f"{off}{self.lo}..{self.hi}" + (f", a multiple of {self.step}" if self.step > 1 else "")


HOUR_MS: Final = 3_600_000
STORAGE: Final = ("storage", "fuse", "fsync", "vfs")
# What goes on for less than a second is seen when it ends, by the programs.
HUNG_MS: Final = Param(60_000, 1_000, HOUR_MS, off=True)
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
    **{name: {"hung_ms": HUNG_MS} for name in STORAGE},
    "storage": {"hung_ms": replace(HUNG_MS, default=20_000)},  # disks give up after 30 s, and begin again
}

PERCENT: Final = Param(0, 0, 100)
WINDOW_NS: Final = Param(0, MS_NS, HOUR_MS * MS_NS)
# Constants whose programs would say nothing, whatever happens, with a value outside. The breaker's are checked by it.
CONSTANTS: Final[Mapping[str, Mapping[str, Param]]] = {
    "transport": {"window_ns": WINDOW_NS},
    "syscalls": {"window_ns": WINDOW_NS, "error_percent": PERCENT},
    **{name: {"window_ns": WINDOW_NS, "slow_percent": PERCENT} for name in STORAGE},
}
SET_HERE: Final[Mapping[str, frozenset[str]]] = {  # constants that the executor sets, whatever a manifest says
    "breaker": frozenset({"scope_cgroup", "scope_level"}),
    "tamper": frozenset({"executor"}),
}


def split(sensor: Sensor) -> tuple[dict[str, int], dict[str, int]]:
    """A sensor's parameters: the constants of its programs, and those that are user space's, with their defaults.

    ArmingError `arm.sensor-param` where one is out of range, or is not a manifest's to set. The blob knows the
    unknown ones.
    """
    limits = OWN_PARAMS.get(sensor.name, {})
    constants = {name: value for name, value in sensor.params.items() if name not in limits}
    own = {name: sensor.params.get(name, limit.default) for name, limit in limits.items()}
    bounds = CONSTANTS.get(sensor.name, {})
    wrong = [f"{name}={own[name]}" for name, limit in limits.items() if not limit.takes(own[name])]
    wrong += [f"{n}={constants[n]}" for n, limit in bounds.items() if n in constants and not limit.takes(constants[n])]
    wrong += sorted(constants.keys() & SET_HERE.get(sensor.name, frozenset()))
    if sensor.blob is None:
        wrong += sorted(constants)
    if wrong:
        ranges = ", ".join(f"{name} {limit}" for name, limit in {**limits, **bounds}.items())
        raise ArmingError(
            f"a parameter of sensor {sensor.name} is unknown or out of range", id="arm.sensor-param",
            want=ranges or "constants of its programs that the executor does not set itself", got=", ".join(wrong),
        )  # fmt: skip
    return constants, own
