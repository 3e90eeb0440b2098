"""`pointcall demo`: the whole loop for real on this machine, told as a timeline."""

from __future__ import annotations

import argparse

WIDTH = 112  # of the timeline where there is no terminal to ask


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--require-kernel", action="store_true", help="fail (exit code 5) where the kernel cannot do it for real"
    )


def run(args: argparse.Namespace) -> int:
    import time

    from rich.console import Console

    from pointcall_executor.cli.output import EnvironmentRefusal, Exit, print_json, state_dir
    from pointcall_executor.demo.narration import Narration, duration
    from pointcall_executor.demo.story import Story, missing_features

    missing = missing_features()
    if missing and args.require_kernel:
        first = missing[0]
        raise EnvironmentRefusal(
            "the demo cannot run for real here",
            id="demo.kernel",
            want=", ".join(f.id for f in missing),
            got=first.detail,
            hint="run as root on a kernel with BTF; `pointcall doctor` lists everything",
        )
    terminal = Console(highlight=False)
    narration = Narration(terminal if terminal.is_terminal else Console(highlight=False, width=WIDTH))
    begin = time.perf_counter_ns()
    story = Story(state_dir(args).absolute(), real=not missing, missing=missing)
    if not args.json:
        narration.title("Pointcall demo", "point at each signal, call it, then act")
    for step in story.tell():
        if args.json:
            print_json(step.as_dict())
        else:
            narration.show(step)
    if not args.json:
        narration.end(f"Recovered and proved in {duration(time.perf_counter_ns() - begin)}.", story.next_lines())
    return Exit.OK
