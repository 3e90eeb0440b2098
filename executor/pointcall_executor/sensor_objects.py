"""From an entry of a manifest's `sensors[]` to its kernel object, loaded and not attached yet.

Not here: what is attached when, and how long it stays (sensors.py); values that are no constants (sensor_params.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pointcall_attest import manifest as manifests
from pointcall_executor.arming import SENSORS, ArmingError
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.breaker import BreakerSensor
from pointcall_executor.kernel.connections import ConnectionKiller
from pointcall_executor.kernel.drill import DrillInjector
from pointcall_executor.kernel.errors import KernelError, LoadError
from pointcall_executor.kernel.isolation import Isolator, end_pinned
from pointcall_executor.kernel.kernel_object import KernelObject
from pointcall_executor.kernel.lifecycle import LifecycleSensor
from pointcall_executor.kernel.pins import Pinned
from pointcall_executor.kernel.pressure import PressureWatch, probe_pressure
from pointcall_executor.kernel.probe import absent_hooks
from pointcall_executor.kernel.storage import StorageSensor
from pointcall_executor.kernel.syscalls import SyscallSensor
from pointcall_executor.kernel.tamper import TamperGuard
from pointcall_executor.kernel.transport import TransportSensor
from pointcall_executor.pins import Pins
from pointcall_executor.sensor_params import MS_NS
from pointcall_runbook.vocabulary import Network, Resource


class Loading:
    """Loads the objects of one session. `gate` is the cgroup of the breaker, `never` what it lets pass always."""

    def __init__(self, pins: Pins | None, gate: Path, never: tuple[Network, ...]) -> None:
        self._pins, self._gate, self._never = pins, gate, never
        self.taken_up = False  # the breaker is one that was pinned

    def loaded(self, sensor: manifests.Sensor, content: bytes, constants: Mapping[str, int]) -> KernelObject:
        """ArmingError `arm.sensor`; KernelError `kernel.hook` names what this kernel lacks, else as the loader."""
        blob = Blob.parse(content)
        if blob.name != sensor.name:
            raise ArmingError(
                f"sensor {sensor.name} has the blob of another one", id="arm.sensor", want=sensor.name, got=blob.name,
                hint="build the manifest again: pointcall build",
            )  # fmt: skip
        try:
            return self._made(sensor.name, blob, constants)
        except LoadError as refused:
            raise _lacking(sensor.name, blob, refused) from None

    def _made(self, name: str, blob: Blob, constants: Mapping[str, int]) -> KernelObject:
        match name:
            case "breaker":
                return self._breaker(blob, constants)
            case "lifecycle":
                return LifecycleSensor(blob, constants=constants)
            case "transport":
                return TransportSensor(blob, constants=constants)
            case "storage" | "fuse" | "fsync" | "vfs":
                return StorageSensor(blob, constants=constants)
            case "syscalls":
                return SyscallSensor(blob, constants=constants)
            case "drill":
                return DrillInjector(blob, constants=constants)
            case "tamper":
                return TamperGuard(blob, constants=constants)
            case "connections":
                return ConnectionKiller(blob, constants=constants)
            case "isolate":
                if self._pins is not None:
                    end_pinned(self._pins.isolations, only_expired=True)
                return Isolator(blob, self._pins.isolations if self._pins else None, constants=constants)
            case _:
                raise ArmingError("a sensor of an unknown kind", id="arm.sensor", want=", ".join(SENSORS), got=name)

    def _breaker(self, blob: Blob, constants: Mapping[str, int]) -> BreakerSensor:
        def make(pinned: Pinned | None) -> BreakerSensor:
            breaker = BreakerSensor(
                blob, cgroup=self._gate, constants=constants, never_touch=self._never, pinned=pinned
            )
            self.taken_up = pinned is not None
            return breaker

        return self._pins.adopt(make) if self._pins is not None else make(None)


def pressure_watch(own: Mapping[str, int]) -> PressureWatch:
    """The sensor `pressure`, which has no blob. ArmingError `arm.sensor-param`, or what the probe raises."""
    stalls = {r: own[f"{r.name.lower()}_ms"] * MS_NS for r in Resource if own[f"{r.name.lower()}_ms"]}
    if not stalls:
        raise ArmingError(
            "the pressure sensor watches nothing", id="arm.sensor-param", want="cpu_ms, memory_ms or io_ms",
            got="all 0", hint="name a stall of the window, such as memory_ms: 200, or take the sensor out",
        )  # fmt: skip
    try:
        watch = PressureWatch(stalls, own["window_ms"] * MS_NS)
    except ValueError as error:
        raise ArmingError(
            "the pressure sensor's values make no sense", id="arm.sensor-param", want="stalls within the window",
            got=str(error),
        ) from None  # fmt: skip
    probe_pressure(own["window_ms"] * MS_NS)
    return watch


def _lacking(name: str, blob: Blob, refused: LoadError) -> KernelError:
    """What exactly this kernel has not, where that is why it refused."""
    absent = absent_hooks(blob)
    if not absent:
        return refused
    return KernelError(
        f"this kernel cannot run sensor {name}", id="kernel.hook", want=f"every hook of {blob.name}",
        got="; ".join(absent), hint="take the sensor out of the manifest for this node; see pointcall doctor",
    )  # fmt: skip
