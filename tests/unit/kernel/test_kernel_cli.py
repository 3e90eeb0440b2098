"""The verbs of the kernel room: doctor names what is missing, drill refuses what makes no sense."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from pointcall_executor.cli import doctor, drill, output
from pointcall_executor.kernel import probe
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.probe import Feature, missing
from pointcall_executor.services import groups

FEATURES = [
    Feature("ring", True, "created", "events"),
    Feature("gate", False, "Operation not permitted", "refusing"),
    Feature("fentry", False, "absent", "nothing", required=False),
]


def parsed(module: object, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--state-dir")
    module.configure(parser)  # type: ignore[attr-defined]
    return parser.parse_args(words)


def test_only_required_features_are_missing() -> None:
    assert [f.id for f in missing(FEATURES)] == ["gate"]


@pytest.mark.parametrize(("features", "code"), [(FEATURES, 5), (FEATURES[:1], 0), (FEATURES[2:], 0)])
def test_doctor_says_so_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], features: list[Feature], code: int
) -> None:
    monkeypatch.setattr(probe, "probe", lambda: features)
    assert doctor.run(parsed(doctor, "--json")) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is (code == 0)
    assert [f["id"] for f in answer["features"]] == [*(f.id for f in features), "cgroup.memory", "cgroup.pids"]
    assert doctor.run(parsed(doctor)) == code
    shown = capsys.readouterr()
    assert all(f.id in shown.out for f in features)
    assert ("missing: gate" in shown.err) is (code == 5)
    assert ("everything that is required is there" in shown.out) is (code == 0)


def test_what_doctor_says_is_whole_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    place = "/sys/fs/cgroup/" + "x" * 60
    monkeypatch.setattr(probe, "probe", lambda: [Feature("cgroup2", True, place, "the gate's scope and more words")])
    assert doctor.run(parsed(doctor)) == 0
    text = capsys.readouterr().out
    assert "…" not in text
    assert text.count("x") >= 60


def test_doctor_says_where_the_limits_of_services_are_held_and_that_nothing_holds_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "probe", lambda: FEATURES[:1])
    monkeypatch.setattr(groups, "limit_place", lambda name: "" if name == "pids" else "/sys/fs/cgroup/memory")
    assert doctor.run(parsed(doctor, "--json")) == 0
    _, memory, pids = json.loads(capsys.readouterr().out)["features"]
    assert (memory["present"], memory["detail"]) == (True, "/sys/fs/cgroup/memory")
    assert (pids["present"], pids["required"]) == (False, False)
    assert "root" in pids["needed_for"]


@pytest.mark.parametrize(
    "words",
    [
        ("--to", "127.0.0.1:80"),
        ("--to", "127.0.0.1:80", "--first", "1", "--errno", "ENOSUCH"),
        ("--to", "host:80", "--first", "1"),
        ("--to", "127.0.0.1:http", "--first", "1"),
        ("--to", "127.0.0.1:70000", "--first", "1"),
        ("--to", "127.0.0.1:80", "--refuse", "1.1"),
        ("--to", "127.0.0.1:80", "--lose", "-0.1"),
        ("--to", "127.0.0.1:80", "--first", "1", "--seed", "-1"),
        ("--to", "127.0.0.1:80", "--first", "1", "--seed", str(2**64)),
        ("--to", "127.0.0.1:80", "--first", "1", "--seconds", "nan"),
        ("--to", "127.0.0.1:80", "--first", "1", "--seconds", "inf"),
        ("--to", "127.0.0.1:80", "--first", "1", "--seconds", "0"),
        ("--to", "127.0.0.1:80", "--first", "1", "--seconds", "601"),
        ("--to", "127.0.0.1:80", "--lose", "nan"),
        ("--to", "127.0.0.1:80", "--delay-ms", "inf"),
        ("--to", "127.0.0.1:80", "--first", "1", "--slow-ms", "0"),
        ("--to", "[fe80::1%lo]:80", "--first", "1"),
        ("--to", "::1:80", "--first", "1"),
        ("--to", "127.0.0.1:٨٠", "--first", "1"),
    ],
)
def test_a_drill_that_makes_no_sense_is_a_usage_error(words: tuple[str, ...]) -> None:
    for mode in ((), ("--cgroup", "/sys/fs/cgroup/none")):
        with pytest.raises(output.UsageRefusal):
            drill.run(parsed(drill, *mode, *words))


def test_a_cgroup_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drill, "_blob", lambda _: None)
    words = ("--to", "127.0.0.1:80", "--first", "1", "--cgroup")
    with pytest.raises(output.UsageRefusal, match="no such cgroup"):
        drill.run(parsed(drill, *words, str(tmp_path / "none")))
    with pytest.raises(KernelError) as refused:
        drill.run(parsed(drill, *words, str(tmp_path)))
    assert refused.value.id == "kernel.cgroup.outside"


@pytest.mark.parametrize(("share", "ppm"), [("0.57", 570_000), ("0.29", 290_000), ("1", 1_000_000)])
def test_a_share_is_what_was_said(share: str, ppm: int) -> None:
    args = parsed(drill, "--to", "127.0.0.1:80", "--refuse", share, "--lose", share)
    fault = drill._fault(args)
    assert (fault.refuse_ppm, fault.loss_ppm) == (ppm, ppm)


def test_doctor_names_what_drills_and_diagnosis_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of it is required; what is absent has a reason."""
    ids = {"fuse", "fq", "libbpf", "bcc", "headers"}
    for held, expected in (({"fq"}, True), ({"noqueue", "pfifo_fast"}, False)):
        monkeypatch.setattr(probe, "qdiscs", lambda held=held: held)
        found = {feature.id: feature for feature in probe._beside()}
        assert found.keys() == ids
        assert not any(feature.required for feature in found.values())
        assert all(feature.detail and feature.needed_for for feature in found.values())
        assert found["fq"].present is expected
    assert found["fq"].detail == "only noqueue, pfifo_fast"
