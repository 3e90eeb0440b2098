"""Settings: precedence, and errors that name the setting."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pointcall_executor.config import Config, ConfigError, load

SPEC = Path(__file__).resolve().parents[3] / "docs/spec/config.md"


def test_every_setting_has_a_default() -> None:
    assert load(None, {}) == Config()


def test_drop_ins_override_the_file_and_the_environment_overrides_both(tmp_path: Path) -> None:
    path = tmp_path / "pointcall.toml"
    path.write_text('node = "a"\nepoch_minutes = 5\ncgroup = "x"\n')
    (tmp_path / "pointcall.toml.d").mkdir()
    (tmp_path / "pointcall.toml.d/20.toml").write_text('node = "c"\n')
    (tmp_path / "pointcall.toml.d/10.toml").write_text('node = "b"\nepoch_minutes = 6\n')
    config = load(path, {"POINTCALL_CGROUP": "y", "POINTCALL_UNKNOWN": "z", "HOME": "/"})
    assert (config.node, config.epoch_minutes, config.cgroup) == ("c", 6, "y")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("speed = 1", "speed"),
        ("epoch_minutes = 0", "epoch_minutes"),
        ('node = "two words"', "node"),
        ('cgroup = "../outside"', "cgroup"),
        ('cgroup = "/absolute"', "cgroup"),
        ('tee = "auto"', "tee"),
        ('cgroup = "a/../../b"', "cgroup"),
        ('gate = "a/.."', "gate"),
        ('allowed_cgroups = "one"', "allowed_cgroups"),
        ('allowed_cgroups = ["a/../../b"]', "allowed_cgroups"),
        ('allowed_cgroups = ["/sys/fs/cgroup/x"]', "allowed_cgroups"),
        ('allowed_cgroups = [""]', "allowed_cgroups"),
        (f"allowed_cgroups = {[f'a{n}' for n in range(65)]}", "allowed_cgroups"),
        ('protect_resolvers = "maybe"', "protect_resolvers"),
        ('groups = { operator = "adm" }', "groups"),
        ("node = ", "pointcall.toml"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "pointcall.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        load(path, {})
    assert word in str(refusal.value)
    assert refusal.value.hint


def test_cgroups_as_service_managers_name_them(tmp_path: Path) -> None:
    path, names = (
        tmp_path / "pointcall.toml",
        ("system.slice/check@1.service", "kubepods.slice/cri-containerd-0a.scope"),
    )
    path.write_text(f"allowed_cgroups = {list(names)}\nprotect_resolvers = false\n")
    config = load(path, {})
    assert (config.allowed_cgroups, config.protect_resolvers) == (names, False)
    assert (Config().allowed_cgroups, Config().protect_resolvers) == ((), True)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load(tmp_path / "none.toml", {})


def test_the_page_lists_every_setting() -> None:
    assert set(re.findall(r"^\| `([a-z_]+)`", SPEC.read_text(), re.MULTILINE)) == set(Config.model_fields)
