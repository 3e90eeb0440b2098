"""Isolation of a cgroup: all its IP traffic refused until a deadline that the kernel holds, loopback included.

It follows the cgroup in which a socket was made, established connections too. Unix sockets, pipes and packet sockets
(AF_PACKET) are not touched. The deadline ends it also when nobody is left; without `pins` it ends at the latest with
this process, with them it lasts until its deadline. Nothing is decided here. Spec: docs/spec/kernel-abi.md section 13.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pointcall_executor.kernel import bpf
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.cgroup import by_id
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.kernel_object import KernelObject
from pointcall_executor.kernel.maps import Map
from pointcall_executor.kernel.pins import unpin

VALUE: Final = struct.Struct("<QQQQ")  # struct isolation
LEASE_MAX_NS: Final = 3_600_000_000_000  # every lease ends within the hour
PREFIX: Final = "isolate_"
NEXT: Final = "_next"  # pins that are about to be those of that cgroup


@dataclass(frozen=True, slots=True)
class Isolation:
    """One isolated cgroup: until when (CLOCK_MONOTONIC ns), and what was refused so far."""

    cgroup: int
    until_ns: int
    calls: int  # connects and sends
    packets_out: int
    packets_in: int


class Isolator(KernelObject):
    """The loaded programs, and a set of links for each isolated cgroup. May be called from any thread."""

    def __init__(self, blob: Blob, pins: Path | None = None, *, constants: Mapping[str, int] | None = None) -> None:
        super().__init__(blob, constants=constants)
        self._lock, self._pins = threading.Lock(), pins
        self._held: dict[int, dict[str, int]] = {}  # cgroup id -> links

    def isolate(self, cgroup_id: int, until_ns: int) -> None:
        """Refuse all traffic of this cgroup until `until_ns`; one that is isolated for longer stays so.

        KernelError `kernel.isolation.lease` where that is over or more than an hour away, `kernel.cgroup.gone` where
        there is no such cgroup, `kernel.attach` where the kernel refuses the programs; then nothing is changed.
        """
        left = until_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        if not 0 < left <= LEASE_MAX_NS:
            raise KernelError(
                "an isolation must end within the hour", id="kernel.isolation.lease",
                want=f"1..{LEASE_MAX_NS} ns from now", got=f"{left} ns",
            )  # fmt: skip
        with self._lock:
            if cgroup_id not in self._held:
                self._begin({cgroup_id: until_ns})
            else:
                self._extend(cgroup_id, until_ns)

    def take_over(self, isolations: Mapping[int, int]) -> None:
        """Isolate these (cgroup id -> until when), instead of who isolates them now. What is over or whose cgroup is
        gone is left out. KernelError `kernel.attach` or `kernel.pin`; then nothing is changed, of none of them."""
        now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        with self._lock:
            self._begin(
                {i: until for i, until in isolations.items() if 0 < until - now_ns <= LEASE_MAX_NS and _lives(i)}
            )

    def end(self, cgroup_id: int) -> Isolation | None:
        """End it now; what it refused, None where the cgroup is not isolated. Twice does no harm."""
        with self._lock:
            found = self._read(cgroup_id)
            self._release(cgroup_id)
        return found

    def isolations(self) -> list[Isolation]:
        """Every isolation that still holds."""
        now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        with self._lock:
            found = [self._read(cgroup_id) for cgroup_id in list(self._held)]
        return [i for i in found if i is not None and i.until_ns > now_ns]

    def sweep(self) -> None:
        """Take the programs off cgroups whose time is over: there they only cost."""
        now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        with self._lock:
            for cgroup_id in list(self._held):
                found = self._read(cgroup_id)
                if found is None or found.until_ns <= now_ns:
                    self._release(cgroup_id)

    def detach(self) -> None:
        """Let go of all of them; a pinned one lasts until its deadline."""
        with self._lock:
            while self._held:
                _close(self._held.popitem()[1])

    @property
    def _slot(self) -> Map:
        return self._maps["isolations"]

    def _place(self, cgroup_id: int) -> Path | None:
        """Where it is pinned, if the settings say so."""
        return self._pins / f"{PREFIX}{cgroup_id}" if self._pins is not None else None

    def _begin(self, isolations: Mapping[int, int]) -> None:
        """Cgroup id -> until when. All that can fail is done, of each, before anything is taken from who was before."""
        begun: dict[int, dict[str, int]] = {}
        try:
            for cgroup_id, until_ns in isolations.items():
                begun[cgroup_id] = self._begun(cgroup_id, until_ns)
        except (KernelError, OSError):
            for cgroup_id, links in begun.items():
                if (place := self._place(cgroup_id)) is not None:
                    unpin(_next(place))
                _close(links)
            raise
        self._held |= begun
        for cgroup_id in begun:
            if (place := self._place(cgroup_id)) is not None:
                _end(place, cgroup_id)  # perhaps an earlier executor's: these take over from it without a gap
                _next(place).rename(place)

    def _begun(self, cgroup_id: int, until_ns: int) -> dict[str, int]:
        """Links on this cgroup with their deadline, pinned beside what is pinned there now."""
        path, place = by_id(cgroup_id).path, self._place(cgroup_id)
        links: dict[str, int] = {}
        try:
            if place is not None:
                _finish(place, cgroup_id)
            for program in self.blob.programs:
                links[program.name] = self._attach_cgroup(program.name, program.section, path)
            # a slot is there as long as a program is attached
            self._extend(cgroup_id, max(until_ns, _pinned_until(place, cgroup_id) if place is not None else 0))
            if place is not None:
                _pin(_next(place), links, self._slot.fd)
        except (KernelError, OSError):
            _close(links)
            raise
        return links

    def _extend(self, cgroup_id: int, until_ns: int) -> None:
        key = struct.pack("<Q", cgroup_id)
        known = VALUE.unpack(self._slot.get(key) or bytes(VALUE.size))
        self._slot.set(key, VALUE.pack(max(until_ns, known[0]), *known[1:]))

    def _read(self, cgroup_id: int) -> Isolation | None:
        raw = self._slot.get(struct.pack("<Q", cgroup_id)) if cgroup_id in self._held else None
        return Isolation(cgroup_id, *VALUE.unpack(raw)) if raw else None

    def _release(self, cgroup_id: int) -> None:
        links = self._held.pop(cgroup_id, {})
        if links and self._slot.get(struct.pack("<Q", cgroup_id)) is not None:
            self._slot.set(struct.pack("<Q", cgroup_id), bytes(VALUE.size))
        if (place := self._place(cgroup_id)) is not None:  # perhaps an earlier executor's
            _finish(place, cgroup_id)
            _end(place, cgroup_id)
        _close(links)


def end_pinned(folder: Path, *, only_expired: bool) -> list[int]:
    """Take off isolations that an earlier executor pinned below `folder`; ids of the cgroups whose isolation lasts.

    `only_expired` leaves those alone whose deadline is still ahead.
    """
    lasting = pinned_isolations(folder) if only_expired else {}
    for cgroup_id, place in _places(folder):
        if cgroup_id not in lasting:
            _end(place, cgroup_id)
    return sorted(lasting)


def pinned_isolations(folder: Path) -> dict[int, int]:
    """Cgroup id -> until when (CLOCK_MONOTONIC ns), of what is pinned below `folder` and still holds."""
    now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    found: dict[int, int] = {}
    for cgroup_id, place in _places(folder):
        found[cgroup_id] = max(found.get(cgroup_id, 0), _pinned_until(place, cgroup_id))
    return {cgroup_id: until_ns for cgroup_id, until_ns in found.items() if until_ns > now_ns}


def _places(folder: Path) -> list[tuple[int, Path]]:
    """Cgroup id and pins; one cgroup has two where an executor was killed while it took over."""
    places = sorted(folder.glob(f"{PREFIX}*"))
    return [(int(place.name.removeprefix(PREFIX).removesuffix(NEXT)), place) for place in places]


def _next(place: Path) -> Path:
    return place.with_name(place.name + NEXT)


def _finish(place: Path, cgroup_id: int) -> None:
    """What an executor that was killed began: one of the two goes on."""
    if _pinned_until(_next(place), cgroup_id) > _pinned_until(place, cgroup_id):
        _end(place, cgroup_id)
        _next(place).rename(place)
    else:
        unpin(_next(place))


def _lives(cgroup_id: int) -> bool:
    try:
        by_id(cgroup_id)
    except KernelError:
        return False
    return True


def _pinned_until(place: Path, cgroup_id: int) -> int:
    with _pinned_slot(place) as slot:
        raw = slot.get(struct.pack("<Q", cgroup_id)) if slot is not None else None
        return int(VALUE.unpack(raw)[0]) if raw else 0


@contextlib.contextmanager
def _pinned_slot(place: Path) -> Iterator[Map | None]:
    try:
        fd = bpf.pinned(str(place / "isolations"))
    except OSError:
        yield None
        return
    try:
        yield Map(fd)
    finally:
        os.close(fd)


def _end(place: Path, cgroup_id: int) -> None:
    """End what is pinned there, and now: the kernel lets go of a link some time after its pin is gone."""
    key = struct.pack("<Q", cgroup_id)
    with _pinned_slot(place) as slot:
        if slot is not None and slot.get(key) is not None:
            slot.set(key, bytes(VALUE.size))
    unpin(place)


def _pin(folder: Path, links: dict[str, int], slot: int) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True)
        for name, fd in links.items():
            bpf.pin(fd, str(folder / name))
        bpf.pin(slot, str(folder / "isolations"))
    except OSError as error:
        unpin(folder)
        raise KernelError(
            "the isolation could not be pinned", id="kernel.pin", want="a bpf file system", got=error.strerror or "",
            hint="mount -t bpf bpf /sys/fs/bpf",
        ) from None  # fmt: skip


def _close(links: dict[str, int]) -> None:
    while links:
        os.close(links.popitem()[1])
