"""Parameters of sensors: which are the programs', which are ours, and the page that lists them."""

from __future__ import annotations

import datetime as dt
import hashlib
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from pointcall_attest.errors import MalformedError
from pointcall_attest.manifest import NOTHING, WITHOUT_BLOB, Manifest, Sensor
from pointcall_executor.arming import SENSORS, ArmingError
from pointcall_executor.sensor_objects import pressure_watch
from pointcall_executor.sensor_params import CONSTANTS, OWN_PARAMS, split
from pointcall_keys.assemble import assemble
from pointcall_keys.recovery_manifest import RecoveryManifest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "spec" / "kernel-abi.md"


def sensor(name: str, **params: int) -> Sensor:
    return Sensor(name=name, blob=None if name in WITHOUT_BLOB else f"blobs/{name}.blob", params=params)


def test_ours_are_taken_out_and_the_rest_are_constants() -> None:
    assert split(sensor("breaker", threshold=3, stuck_ms=500)) == ({"threshold": 3}, {"stuck_ms": 500})
    assert split(sensor("breaker")) == ({}, {"stuck_ms": 60_000})
    assert split(sensor("transport", resets_min=3)) == ({"resets_min": 3}, {})


@pytest.mark.parametrize(
    "wrong",
    [
        sensor("breaker", stuck_ms=-1),
        sensor("storage", hung_ms=-1),
        sensor("fuse", hung_ms=999),
        sensor("fsync", hung_ms=3_600_001),
        sensor("pressure", cpu_ms=10_001),
        sensor("pressure", disk_ms=1),
        sensor("pressure", window_ms=1_000),
        sensor("pressure", window_ms=3_000),
        sensor("pressure", window_ms=12_000),
        sensor("transport", window_ns=0),
        sensor("syscalls", error_percent=101),
        sensor("storage", slow_percent=101),
        sensor("vfs", window_ns=3_600_000_000_001),
        sensor("breaker", scope_cgroup=1),
        sensor("breaker", scope_level=1),
        sensor("tamper", executor=1),
    ],
)
def test_out_of_range_or_unknown_is_refused_by_name(wrong: Sensor) -> None:
    with pytest.raises(ArmingError) as refused:
        split(wrong)
    assert refused.value.id == "arm.sensor-param"
    assert next(iter(wrong.params)) in refused.value.got


def test_hung_may_be_never_or_a_second_and_more() -> None:
    for name in ("storage", "fuse", "fsync", "vfs"):
        assert split(sensor(name, slow_ns=1)) == ({"slow_ns": 1}, {"hung_ms": 20_000 if name == "storage" else 60_000})
        assert [split(sensor(name, hung_ms=ms))[1]["hung_ms"] for ms in (0, 1_000, 3_600_000)] == [0, 1_000, 3_600_000]
    with pytest.raises(ArmingError) as refused:
        split(sensor("vfs", hung_ms=500))
    assert "hung_ms 0 or 1000..3600000" in refused.value.want


def test_the_kernels_rule_for_windows_is_said() -> None:
    with pytest.raises(ArmingError) as refused:
        split(sensor("pressure", window_ms=3_000))
    assert "window_ms 2000..10000, a multiple of 2000" in refused.value.want
    assert split(sensor("pressure", window_ms=4_000))[1]["window_ms"] == 4_000


def test_a_pressure_sensor_that_watches_nothing_is_refused() -> None:
    with pytest.raises(ArmingError) as refused:
        pressure_watch(split(sensor("pressure", window_ms=4_000))[1])
    assert (refused.value.id, refused.value.got) == ("arm.sensor-param", "all 0")


def test_the_page_has_the_bounds_of_constants() -> None:
    page = PAGE.read_text()
    for limits in CONSTANTS.values():
        assert all(f"`{name}` {limit.lo}..{limit.hi}" in page for name, limit in limits.items())


@pytest.mark.parametrize(("name", "blob"), [("pressure", "blobs/pressure.blob"), ("breaker", None)])
def test_a_sensor_has_its_blob_or_none(name: str, blob: str | None) -> None:
    with pytest.raises(ValidationError, match="blob"):
        Sensor(name=name, blob=blob, params={})


def test_the_page_lists_every_sensor_and_its_parameters() -> None:
    table = PAGE.read_text().split("## 14.")[1]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)$", table, re.MULTILINE))
    assert set(rows) == set(SENSORS)
    for name, params in OWN_PARAMS.items():
        assert all(f"`{param}`" in rows[name] for param in params), name
        for param, limit in params.items():
            assert str(limit.default) in rows[name], (name, param)


def test_a_manifest_yaml_declares_them_by_name(tmp_path: Path) -> None:
    """`pressure` has no file; every other sensor has the blob of its name."""
    for name in set(SENSORS) - WITHOUT_BLOB:
        (tmp_path / f"{name}.blob").write_bytes(name.encode())
    body = {
        "apiVersion": "pointcall.dev/v1",
        "kind": "RecoveryManifest",
        "metadata": {"name": "all"},
        "spec": {"sensors": [{"name": name} for name in SENSORS]},
    }
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    built = assemble(
        RecoveryManifest.parse(body), tmp_path, tmp_path, sequence=1, not_before=start, expires=start + dt.timedelta(1)
    )
    manifest = Manifest.parse(built.statement)
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in SENSORS}
    assert manifest.sensor_blobs == digests | {"pressure": NOTHING}
    assert set(built.files) == {f"blobs/{name}.blob" for name in set(SENSORS) - WITHOUT_BLOB}
    wrong = body | {"spec": {"sensors": [{"name": "breaker"}, {"name": "pressure", "blob": "breaker"}]}}
    with pytest.raises(MalformedError, match="pressure has no blob"):
        assemble(
            RecoveryManifest.parse(wrong), tmp_path, tmp_path, sequence=1, not_before=start,
            expires=start + dt.timedelta(1),
        )  # fmt: skip
