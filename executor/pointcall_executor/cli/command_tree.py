"""Every verb with its options as plain values, read from the argparse parsers themselves: there is no second list."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Takes = Literal["nothing", "file", "folder", "choice", "text"]


@dataclass(frozen=True, slots=True)
class Argument:
    """An option with its spellings, or a positional (none). `choices` where it takes one of them."""

    flags: tuple[str, ...]
    help: str
    takes: Takes
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Command:
    """`pointcall <words>`. `commands` are its own verbs."""

    words: tuple[str, ...]
    help: str
    options: tuple[Argument, ...]
    positionals: tuple[Argument, ...]
    commands: tuple[Command, ...]

    def all(self) -> tuple[Command, ...]:
        """This one and everything below it."""
        return (self, *(found for command in self.commands for found in command.all()))


def tree() -> Command:
    """The whole command line."""
    from pointcall_executor.cli import VERBS, parser_of

    verbs = []
    for verb, text in VERBS.items():
        parser = parser_of(verb)
        importlib.import_module(f"pointcall_executor.cli.{verb.replace('-', '_')}").configure(parser)
        verbs.append(_command((verb,), text, parser))
    ours = (Argument(("-h", "--help"), "list the verbs", "nothing"), Argument(("-V", "--version"), "", "nothing"))
    return Command((), "", ours, (), tuple(verbs))


def _command(words: tuple[str, ...], text: str, parser: argparse.ArgumentParser) -> Command:
    options, positionals, commands = [], [], []
    for action in parser._actions:  # argparse has no other way to ask
        if isinstance(action, argparse._SubParsersAction):
            helps = {c.dest: c.help or "" for c in action._choices_actions}
            commands += [_command((*words, n), helps.get(n, ""), p) for n, p in action.choices.items()]
        elif action.option_strings:
            options.append(_argument(action))
        else:
            positionals.append(_argument(action))
    return Command(words, text, tuple(options), tuple(positionals), tuple(commands))


def _argument(action: argparse.Action) -> Argument:
    text = "" if action.help in (None, argparse.SUPPRESS) else str(action.help).replace("%%", "%")
    flags = tuple(action.option_strings)
    if action.nargs == 0:
        return Argument(flags, text, "nothing")
    if action.choices:
        return Argument(flags, text, "choice", tuple(map(str, action.choices)))
    if action.metavar == "DIR":
        return Argument(flags, text, "folder")
    return Argument(flags, text, "file" if action.type is Path or action.metavar == "FILE" else "text")
