"""Identity and pins: a swapped program is noticed, protection outlives its executor, only what was armed is adopted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointcall_executor.core.breaker import State
from pointcall_executor.kernel import bpf
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.breaker import BreakerSensor
from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.identity import Identity
from pointcall_executor.kernel.pins import Pinned, unpin
from tests.kernel.conftest import FAST, Make
from tests.kernel.lab import BLOCKED, REFUSED, connects, here, kinds
from tests.kernel.test_kernel_leftovers import gone

pytestmark = pytest.mark.kernel
PORT = 30601
LINK_UPDATE, LINK_DETACH = 29, 34


@pytest.fixture
def folder() -> Iterator[Path]:
    root = Path("/sys/fs/bpf")
    if not os.path.ismount(root):
        pytest.skip("no bpf file system at /sys/fs/bpf")
    path = root / f"pctest-{os.getpid()}"
    yield path
    unpin(path)


def raw_bpf(command: int, attr: bytes) -> None:
    bpf.bpf(type("Raw", (int,), {"name": "raw"})(command), attr)  # a command that the product has no use for


def test_an_untouched_sensor_stays_what_it_was(make: Make) -> None:
    breaker = make()
    recorded = breaker.identity()
    breaker.arm(here(PORT))
    connects(5, PORT)
    assert breaker.recheck(recorded) == []
    assert Identity.from_dict(json.loads(json.dumps(recorded.as_dict()))) == recorded
    assert {link.name for link in recorded.links} == {p.name for p in breaker.blob.programs} - {"pc_command"}


def test_the_kernels_own_hash_of_the_constants_is_recorded(make: Make) -> None:
    breaker = make()
    recorded = breaker.identity()
    if not recorded.map_hash:
        pytest.skip("this kernel does not hash maps (since 6.18)")
    image = breaker.blob.with_constants(constants_of(breaker))
    padded = image.ljust(-(-len(image) // 8) * 8, b"\0")
    assert recorded.map_hash == hashlib.sha256(padded).hexdigest()
    (line,) = breaker.recheck(dataclasses.replace(recorded, map_hash="00" * 32))
    assert "hash" in line


def constants_of(breaker: BreakerSensor) -> dict[str, int]:
    """What the kernel has, read back."""
    raw = breaker._maps["rodata"].get(bytes(4)) or b""
    return {c.name: int.from_bytes(raw[c.offset : c.offset + c.size], "little") for c in breaker.blob.constants}


def test_a_swapped_program_is_noticed(make: Make) -> None:
    breaker = make()
    recorded = breaker.identity()
    impostor = bpf.prog_load(
        bpf.ProgramType.CGROUP_SOCK_ADDR,
        struct.pack("<BBhiBBhi", 0xB7, 0, 0, 1, 0x95, 0, 0, 0),
        name="pc_connect4",
        attach_type=bpf.AttachType.CGROUP_INET4_CONNECT,
    )
    try:
        raw_bpf(LINK_UPDATE, struct.pack("<IIII", breaker._links["pc_connect4"], impostor, 0, 0))
    finally:
        os.close(impostor)
    (line,) = breaker.recheck(recorded)
    assert line.startswith("link pc_connect4")


def test_a_link_that_was_taken_off_is_noticed(make: Make) -> None:
    breaker = make()
    recorded = breaker.identity()
    raw_bpf(LINK_DETACH, struct.pack("<I", breaker._links["pc_connect6"]))
    (line,) = breaker.recheck(recorded)
    assert line.startswith("link pc_connect6")


def test_protection_outlives_the_executor_and_is_taken_up_again(
    breaker_blob: Blob, group: Cgroup, make: Make, folder: Path
) -> None:
    first = make()
    first.arm(here(PORT))
    first.allow(12345)
    pinned = first.pin(folder)
    connects(2, PORT)
    first.close()
    assert connects(3, PORT) == [REFUSED, BLOCKED, BLOCKED]  # nobody is there, and still it opens and refuses

    second = BreakerSensor(breaker_blob, cgroup=group.path, constants=FAST, pinned=pinned)
    assert kinds(second) == ["CIRCUIT_OPENED"]  # what happened meanwhile
    circuit = second.circuit(here(PORT))
    assert (circuit.state, circuit.refused, second.lost()) == (State.OPEN, 2, 0)
    assert second.recheck(pinned.identity) == []
    second.close_circuit(here(PORT))
    assert connects(1, PORT) == [REFUSED]
    ids = {number for _, number, _ in second.programs()}
    unpin(folder)
    unpin(folder)
    second.close()
    assert gone(ids)
    assert connects(5, PORT) == [REFUSED] * 5


@pytest.mark.parametrize("change", ["tag", "id", "constants", "blob", "link"])
def test_only_what_was_armed_is_adopted(
    breaker_blob: Blob, group: Cgroup, make: Make, folder: Path, change: str
) -> None:
    pinned = make().pin(folder)
    was = pinned.identity
    program, link = was.programs[0], was.links[0]
    other = {
        "tag": dataclasses.replace(was, programs=(dataclasses.replace(program, tag="00" * 8), *was.programs[1:])),
        "id": dataclasses.replace(was, programs=(dataclasses.replace(program, id=1), *was.programs[1:])),
        "constants": dataclasses.replace(was, constants="00" * 32),
        "blob": dataclasses.replace(was, blob="00" * 32),
        "link": dataclasses.replace(was, links=(dataclasses.replace(link, cgroup=1), *was.links[1:])),
    }[change]
    with pytest.raises(KernelError) as refused:
        BreakerSensor(breaker_blob, cgroup=group.path, constants=FAST, pinned=Pinned(folder, other))
    assert refused.value.id == "kernel.pin.identity"


def test_other_constants_are_not_adopted(breaker_blob: Blob, group: Cgroup, make: Make, folder: Path) -> None:
    pinned = make().pin(folder)
    with pytest.raises(KernelError) as refused:
        BreakerSensor(breaker_blob, cgroup=group.path, constants=FAST | {"threshold": 9}, pinned=pinned)
    assert refused.value.id == "kernel.pin.identity"
    assert "constants" in refused.value.got


def test_a_missing_pin_is_named(breaker_blob: Blob, group: Cgroup, make: Make, folder: Path) -> None:
    pinned = make().pin(folder)
    (folder / "link_pc_connect4").unlink()
    with pytest.raises(KernelError) as refused:
        BreakerSensor(breaker_blob, cgroup=group.path, constants=FAST, pinned=pinned)
    assert (refused.value.id, refused.value.want) == ("kernel.pin.absent", "link_pc_connect4")


def test_pins_of_an_earlier_run_are_not_overwritten(make: Make, folder: Path) -> None:
    first, second = make(), make()
    first.pin(folder)
    with pytest.raises(KernelError) as refused:
        second.pin(folder)
    assert refused.value.id == "kernel.pin"
    assert sorted(folder.iterdir())


def test_pinning_outside_a_bpf_file_system_fails_and_leaves_nothing(make: Make, tmp_path: Path) -> None:
    with pytest.raises(KernelError) as refused:
        make().pin(tmp_path / "pins")
    assert refused.value.id == "kernel.pin"
    assert not (tmp_path / "pins").exists()
