"""Completion scripts in the shells themselves, compared with the command line that they are made from."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from pointcall_executor import cli
from pointcall_executor.cli.command_tree import Command, tree
from pointcall_executor.cli.completion import SHELLS, completion

LINES = {
    "pointcall sta": {"status"},
    "pointcall log ": {"list", "tail", "show", "stream", "prove", "export", "tiles", "check", "prune", "erase"},
    "pointcall log list --ki": {"--kind"},
    "pointcall log stream --format ": {"ocsf", "otel"},
    "pointcall completion ": {"bash", "zsh", "fish"},
    "pointcall tr": {"trip"},
    "pointcall pause --f": {"--for"},
    "pointcall attest measure s": {"snp"},
}


def shell(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture(scope="module")
def root() -> Command:
    return tree()


def test_the_tree_has_every_verb_and_the_options_that_all_have(root: Command) -> None:
    assert [c.words[0] for c in root.commands] == list(cli.VERBS)
    for command in root.commands:
        assert {"--json", "--state-dir", "--help"} <= {flag for o in command.options for flag in o.flags}


def test_every_positional_and_every_option_with_a_file_is_known_as_such(root: Command) -> None:
    run = next(c for c in root.commands if c.words == ("run",))
    takes = {o.flags[-1]: o.takes for o in run.options}
    assert (takes["--config"], takes["--manifest"], takes["--json"]) == ("file", "folder", "nothing")


@pytest.mark.parametrize("name", SHELLS)
def test_the_script_is_the_same_each_time_and_printed_by_the_verb(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["completion", name]) == 0
    assert capsys.readouterr().out == completion(name) == completion(name)


@pytest.mark.parametrize("name", SHELLS)
def test_the_shell_accepts_the_script(name: str, tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text(completion(name))
    done = subprocess.run([shell(name), "-n", str(path)], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def bash_says(line: str, folder: Path) -> set[str]:
    """What bash offers where the cursor stands at the end of the line."""
    words = line.split(" ")
    program = (
        f"source {folder}/script; COMP_WORDS=({' '.join(w or repr('') for w in words)}); "
        f"COMP_CWORD={len(words) - 1}; _pointcall; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(
        [shell("bash"), "--norc", "-c", program], capture_output=True, text=True, timeout=30, check=True, cwd=folder
    )
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize("line", LINES)
def test_bash_completes(line: str, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(completion("bash"))
    assert bash_says(line, tmp_path) == LINES[line]


def test_bash_offers_every_verb_of_every_command(root: Command, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(completion("bash"))
    for command in root.all():
        if command.commands:
            line = " ".join(("pointcall", *command.words, ""))
            assert bash_says(line, tmp_path) == {c.words[-1] for c in command.commands}


def test_bash_offers_files_and_folders_where_they_are_meant(tmp_path: Path) -> None:
    (tmp_path / "script").write_text(completion("bash"))
    (tmp_path / "settings.toml").touch()
    (tmp_path / "state folder").mkdir()
    assert {"script", "settings.toml"} <= bash_says("pointcall run --config ", tmp_path)
    assert bash_says("pointcall status --state-dir stat", tmp_path) == {"state", "folder"}  # one reply with a space


@pytest.mark.parametrize("line", LINES)
def test_fish_completes(line: str, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(completion("fish"))
    program = f"source {tmp_path}/script; complete -C '{line}'"
    done = subprocess.run(
        [shell("fish"), "--no-config", "-c", program],
        capture_output=True, text=True, timeout=30, check=True, env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stderr == ""
    assert {row.split("\t")[0] for row in done.stdout.splitlines()} == LINES[line]


def test_zsh_completes_at_a_terminal(tmp_path: Path) -> None:
    """zsh completes only for its line editor, so it gets a terminal and a key press."""
    (tmp_path / "_pointcall").write_text(completion("zsh"))
    setup = f"PS1='READY> '; fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -D; bindkey -e\n"
    (tmp_path / ".zshrc").write_text(setup)
    zsh = shell("zsh")
    child, terminal = pty.fork()
    if child == 0:
        os.execve(zsh, [zsh, "-d", "-i"], {"TERM": "dumb", "HOME": str(tmp_path), "PATH": os.environ["PATH"]})
    try:
        said(terminal, r"READY> ")
        for typed, expected in (("pointcall stat", r"status "), ("pointcall completion fi", r"fish ")):
            os.write(terminal, typed.encode() + b"\t")
            assert said(terminal, rf"{re.escape(typed)}{expected.removeprefix(typed.split()[-1])}")
            os.write(terminal, b"\x15")
        os.write(terminal, b"pointcall log stream --format \t\t")
        assert said(terminal, r"ocsf\s+otel")
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


def said(terminal: int, pattern: str, seconds: float = 20) -> str:
    """What comes until the pattern is there. AssertionError where it does not come."""
    text, deadline = "", time.monotonic() + seconds
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            text += os.read(terminal, 65536).decode(errors="replace")
        if re.search(pattern, text):
            return text
    raise AssertionError(f"{pattern!r} was not said: {text!r}")
