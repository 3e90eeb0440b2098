"""`pointcall completion bash|zsh|fish`: a completion script, made from the command line itself.

bash: `source <(pointcall completion bash)`; zsh: into a folder of $fpath as `_pointcall`; fish: into
~/.config/fish/completions/pointcall.fish.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from pointcall_executor.cli import output

if TYPE_CHECKING:
    from pointcall_executor.cli.command_tree import Argument, Command

SHELLS: Final = ("bash", "zsh", "fish")
_NOTE: Final = "# Made by `pointcall completion {}`; make it again after an update.\n"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS)


def run(args: argparse.Namespace) -> int:
    script = completion(args.shell)
    if args.json:
        output.print_json({"shell": args.shell, "script": script})
    else:
        sys.stdout.write(script)
    return output.Exit.OK


def completion(shell: str) -> str:
    """The script of one of SHELLS."""
    from pointcall_executor.cli.command_tree import tree

    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](tree())


# ---- bash ------------------------------------------------------------------------------------------------------------

_BASH: Final = """\
{note}_pointcall() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} path="" word
  local -i i
  for ((i = 1; i < COMP_CWORD; i++)); do
    word="${{path:+$path }}${{COMP_WORDS[i]}}"
    case "$word" in
      {paths}) path=$word ;;
    esac
  done
  COMPREPLY=()
  compopt +o nospace 2>/dev/null
  case "$path $before" in
{values}
  esac
  if [[ $current == -* ]]; then
    case "$path" in
{options}
    esac
    return
  fi
  case "$path" in
{positionals}
  esac
}}
complete -F _pointcall pointcall
"""


def _bash(root: Command) -> str:
    commands = root.all()
    values, options, positionals = [], [], []
    for command in commands:
        path = " ".join(command.words)
        for option in command.options:
            if option.takes != "nothing":
                names = "|".join(f'"{path} {flag}"' for flag in option.flags)
                values.append(f"    {names}) {_bash_reply(option)}; return ;;")
        words = " ".join(flag for option in command.options for flag in option.flags)
        options.append(f"""      "{path}") COMPREPLY=($(compgen -W '{words}' -- "$current")) ;;""")
        reply = _bash_words(command)
        if reply:
            positionals.append(f'    "{path}") {reply} ;;')
    return _BASH.format(
        note=_NOTE.format("bash"),
        paths="|".join(f'"{" ".join(c.words)}"' for c in commands if c.words),
        values="\n".join(values),
        options="\n".join(options),
        positionals="\n".join(positionals),
    )


def _bash_words(command: Command) -> str:
    if command.commands:
        words = " ".join(c.words[-1] for c in command.commands)
        return f"""COMPREPLY=($(compgen -W '{words}' -- "$current"))"""
    return _bash_reply(command.positionals[0]) if command.positionals else ""


def _bash_reply(argument: Argument) -> str:
    match argument.takes:
        case "choice":
            return f"""COMPREPLY=($(compgen -W '{" ".join(argument.choices)}' -- "$current"))"""
        case "file":
            return 'compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$current")'
        case "folder":
            return 'compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -d -- "$current")'
        case _:
            return "COMPREPLY=()"


_ZSH_END: Final = """\
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _pointcall "$@"; else compdef _pointcall pointcall; fi
"""

# ---- zsh -------------------------------------------------------------------------------------------------------------


def _zsh(root: Command) -> str:
    functions = "\n".join(_zsh_function(command) for command in reversed(root.all()))
    return f"#compdef pointcall\n{_NOTE.format('zsh')}\n{functions}\n{_ZSH_END}"


def _zsh_name(command: Command) -> str:
    return "_".join(("_pointcall", *command.words)).replace("-", "_")


def _zsh_function(command: Command) -> str:
    specs = [_zsh_option(option) for option in command.options]
    lines = [f"{_zsh_name(command)}() {{"]
    if not command.commands:
        specs += [f"'*:{_zsh_text(p.help or 'argument')}:{_zsh_kind(p)}'" for p in command.positionals[:1]]
        return "\n".join([*lines, f"  _arguments -s {' '.join(specs)}", "}"])
    rows = " ".join(f"'{c.words[-1]}:{_zsh_text(c.help)}'" for c in command.commands)
    cases = " ".join(f"{c.words[-1]}) {_zsh_name(c)} ;;" for c in command.commands)
    lines += [
        "  local state line",
        f"  _arguments -C {' '.join(specs)} '1: :->verb' '*:: :->rest'",
        "  case $state in",
        f"    verb) local -a verbs=({rows}); _describe verb verbs ;;",
        f"    rest) case $line[1] in {cases} esac ;;",
        "  esac",
        "}",
    ]
    return "\n".join(lines)


def _zsh_option(option: Argument) -> str:
    text = f"[{_zsh_text(option.help)}]"
    value = "" if option.takes == "nothing" else f":value:{_zsh_kind(option)}"
    if len(option.flags) == 1:
        return f"'{option.flags[0]}{text}{value}'"
    return f"'({' '.join(option.flags)})'{{{','.join(option.flags)}}}'{text}{value}'"


def _zsh_kind(argument: Argument) -> str:
    kinds: Mapping[str, str] = {"file": "_files", "folder": "_files -/", "choice": f"({' '.join(argument.choices)})"}
    return kinds.get(argument.takes, " ")


def _zsh_text(text: str) -> str:
    """Quoted for the inside of a specification in single quotes."""
    for character in "\\[]:":
        text = text.replace(character, f"\\{character}")
    return text.replace("'", "’").replace("`", "")


# ---- fish ------------------------------------------------------------------------------------------------------------

_FISH: Final = """\
{note}function __pointcall_at
    set -l path
    for word in (commandline -opc)[2..-1]
        if contains -- (string join -- ' ' $path $word) {paths}
            set -a path $word
        end
    end
    test "$path" = "$argv[1]"
end
complete -c pointcall -f
{rows}
"""


def _fish(root: Command) -> str:
    rows = []
    for command in root.all():
        at = f"-n '__pointcall_at \"{' '.join(command.words)}\"'"
        rows += [f"complete -c pointcall {at} -a {c.words[-1]} -d {_fish_text(c.help)}" for c in command.commands]
        rows += [f"complete -c pointcall {at} {_fish_option(option)}" for option in command.options]
        if not command.commands and command.positionals:
            kind = _fish_kind(command.positionals[0])
            rows += [f"complete -c pointcall {at} {kind}"] if kind else []
    paths = " ".join(_fish_text(" ".join(c.words)) for c in root.all() if c.words)
    return _FISH.format(note=_NOTE.format("fish"), paths=paths, rows="\n".join(rows))


def _fish_option(option: Argument) -> str:
    flags = [f"-l {f[2:]}" if f.startswith("--") else f"-s {f[1:]}" for f in option.flags]
    required = "-x" if option.takes == "choice" else "-r"
    value = [] if option.takes == "nothing" else [required, _fish_kind(option)]
    return " ".join(filter(None, [*flags, *value, f"-d {_fish_text(option.help)}"]))


def _fish_kind(argument: Argument) -> str:
    kinds: Mapping[str, str] = {
        "file": "-F",
        "folder": "-a '(__fish_complete_directories)'",
        "choice": f"-a {_fish_text(' '.join(argument.choices))}",
    }
    return kinds.get(argument.takes, "")


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
