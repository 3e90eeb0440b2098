"""The systemd unit and its neighbours, checked by systemd's own tools and against the code."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import tomllib
import typing
from pathlib import Path

import pytest

from pointcall_executor.cli import parser_of
from pointcall_executor.cli import run as run_verb
from pointcall_executor.cli.output import Exit
from pointcall_executor.config import Config
from pointcall_executor.privileges import NEEDED

FOLDER = Path(__file__).resolve().parents[3] / "deploy/systemd"
UNIT = FOLDER / "pointcall.service"
EXPOSURE_MAX = 60  # tenths, as `systemd-analyze security` counts; services inherit what is forbidden


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that is there."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/usr/bin/pointcall", "/bin/true"))
    return path


def setting(name: str) -> str:
    found = configparser.RawConfigParser(strict=False, comment_prefixes=("#",), delimiters=("=",))
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read_string(UNIT.read_text())
    return found["Service"][name]


def test_systemd_finds_nothing_wrong_with_the_unit(unit: Path) -> None:
    done = subprocess.run(
        [tool("systemd-analyze"), "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_its_exposure_stays_low(unit: Path) -> None:
    done = subprocess.run(
        [tool("systemd-analyze"), "security", "--offline=true", "--no-pager", f"--threshold={EXPOSURE_MAX}", str(unit)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_the_accounts_are_well_formed() -> None:
    done = subprocess.run(
        [tool("systemd-sysusers"), "--dry-run", str(FOLDER / "pointcall.sysusers.conf")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_unit_keeps_what_the_executor_keeps() -> None:
    assert set(NEEDED) <= set(setting("CapabilityBoundingSet").split())
    assert "MemoryDenyWriteExecute" not in re.findall(r"^(\w+)=", UNIT.read_text(), re.MULTILINE)


def test_the_unit_has_what_the_spawner_needs_and_what_a_setting_may_ask_for() -> None:
    allowed = set(setting("CapabilityBoundingSet").split())
    (item,) = typing.get_args(Config.model_fields["capabilities"].annotation)[:1]
    assert set(typing.get_args(item)) <= allowed
    assert "CAP_SYS_PTRACE" in allowed, "adopting a service of another user takes a look at its program"


def test_the_command_of_the_unit_is_one_that_the_verb_takes() -> None:
    words = setting("ExecStart").split()
    parser = parser_of(words[1])
    run_verb.configure(parser)
    args = parser.parse_args(words[2:])
    assert str(args.state_dir) == "/var/lib/pointcall"
    assert str(args.config) == "/etc/pointcall/pointcall.toml"


def after(code: str, status: str) -> str:
    """What the unit does after an end, before it would start it again: the words of the pause."""
    command = setting("ExecStopPost").removeprefix("/bin/sh -c ").strip("'").replace("$$", "$")
    done = subprocess.run(
        ["/bin/sh", "-c", f"sleep() {{ echo sleep $1; }}; {command}"],
        env={"EXIT_CODE": code, "EXIT_STATUS": status}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_who_was_killed_is_started_again_at_once_and_who_ended_by_itself_after_a_pause() -> None:
    assert [after("killed", number) for number in ("KILL", "SEGV", "9")] == ["", "", ""]
    assert after("dumped", "ABRT") == ""
    left = set(setting("RestartPreventExitStatus").split())
    assert left == {str(int(code)) for code in (Exit.USAGE, Exit.ENVIRONMENT, Exit.LOG)}
    for code in [*map(str, map(int, Exit)), "120", "255"]:
        assert after("exited", code) == ("" if code in left | {"0"} else "sleep 5"), code


def test_the_example_settings_are_valid_and_their_groups_are_made() -> None:
    config = Config.model_validate(tomllib.loads((FOLDER / "pointcall.toml").read_text()))
    made = re.findall(r"^[gu] (\S+)", (FOLDER / "pointcall.sysusers.conf").read_text(), re.MULTILINE)
    assert set(config.groups.values()) <= set(made)
    assert config.http
