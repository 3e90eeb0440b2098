"""`pointcall <verb>`: one module a verb, imported only when that verb is called.

A verb module has `configure(parser)` and `run(args) -> int`; it calls one function, renders one result and returns
an exit code of `output.Exit`. `--json` and `--state-dir` exist on every verb.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

from pointcall_executor import VERSION

VERBS: Final[Mapping[str, str]] = {
    "demo": "run the whole loop for real on this machine",
    "new": "scaffold a runbook with its cases",
    "test": "run a runbook's cases, with the coverage of its source",
    "simulate": "show what a runbook would have done on recorded events",
    "build": "compile runbooks and assemble a manifest",
    "sign": "sign a manifest, its provenance or a notice",
    "manifest": "compare and verify manifests, carry them, point to the newest, revoke",
    "sign-bundle": "sign a file with Sigstore",
    "verify-bundle": "verify a Sigstore bundle over a file",
    "inspect": "show what a module, blob or manifest grants and costs",
    "explain": "print the schema of an event, an action or a field",
    "run": "run the executor on this node",
    "status": "show what is armed and what happened last",
    "top": "watch this node, full screen: what is wrong, what was done, what is held back",
    "events": "show what happens on this node, as it happens",
    "arm": "load a newer manifest into the running executor",
    "disarm": "stop acting: detach everything; services go on",
    "halt": "the kill switch: hold the node still until a person clears it",
    "approve": "a second person's signed word for an action that is held back",
    "acknowledge": "say that somebody has seen an escalation",
    "pause": "let no runbook act for a while",
    "resume": "end a pause",
    "trip": "refuse connects to a destination for a while",
    "release": "close a circuit now",
    "log": "list, follow, prove, export, check, prune and erase log entries",
    "witness": "be a witness of other nodes' logs",
    "mirror": "keep a copy of many nodes' logs in PostgreSQL",
    "verify": "check a receipt offline, down to the root key",
    "replay": "decide recorded runs again with the second implementation",
    "report": "write a compliance report from the log",
    "attest": "parse, verify and explain TEE evidence",
    "propose": "submit a runbook as a proposal, or export one as a patch",
    "mcp": "serve agents over MCP: read and propose, nothing else",
    "drill": "rehearse: inject a fault that is guaranteed to end",
    "probe": "run a BCC probe for diagnosis: unmeasured, and the log says so",
    "doctor": "say what this machine offers and what is missing; write a support bundle",
    "completion": "print the completion script of a shell",
}


class Parser(argparse.ArgumentParser):
    """Words that do not fit leave as every other error does: with an id, and as JSON where that was asked for."""

    def error(self, message: str) -> NoReturn:
        from pointcall_executor.cli.output import UsageRefusal

        raise UsageRefusal(message, hint=f"{self.prog} --help")


def parser_of(verb: str) -> Parser:
    """The parser of one verb, with the options that all have; the verb adds its own."""
    parser = Parser(prog=f"pointcall {verb}", description=VERBS[verb])
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument(
        "--state-dir", metavar="DIR", help="where all state lives (default: the node's for root, else XDG)"
    )
    return parser


def _usage() -> str:
    width = max(map(len, VERBS)) + 2
    rows = "\n".join(f"  {verb:{width}}{text}" for verb, text in VERBS.items())
    return (
        "usage: pointcall <verb> [options]\n\n"
        "Attested recovery runbooks: nothing acts on a guess, every step is checked and written down.\n\n"
        f"{rows}\n\n`pointcall <verb> --help` shows the options of one verb; `--version` the version.\n"
        "exit codes: 0 ok, 1 refused by policy, 2 usage, 3 emulated evidence without --allow-emulated,\n"
        "            4 malformed input, 5 environment, 65 a log that cannot be gone on with,\n"
        "            70 a bug in pointcall, 75 a failure that a restart may mend\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Never a traceback for outside input: errors leave through `output.failed`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(_usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        sys.stdout.write(f"pointcall {VERSION}\n")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        from pointcall_executor.cli import output

        unknown = output.UsageRefusal(f"no verb is called {verb!r}", id="cli.verb", hint="pointcall --help")
        return output.failed(unknown, as_json="--json" in rest)
    return _run(verb, rest)


def _run(verb: str, rest: list[str]) -> int:
    module = importlib.import_module(f"pointcall_executor.cli.{verb.replace('-', '_')}")
    parser = parser_of(verb)
    module.configure(parser)
    from pointcall_executor.cli import output

    output.speak_safely()
    try:
        args = parser.parse_args(rest)
    except output.UsageRefusal as error:
        return output.failed(error, as_json="--json" in rest)
    try:
        return int(module.run(args))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return output.closed_pipe()
    except Exception as error:  # the one place where anything becomes an exit code
        return output.failed(error, as_json=args.json)
