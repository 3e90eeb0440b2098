"""`pointcall mcp`: the tools of an agent over MCP, in a process that can do no more than the agent's socket allows."""

from __future__ import annotations

import argparse
import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING

from pointcall_executor.cli import output

if TYPE_CHECKING:
    from pointcall_executor.agent_api.mcp_tokens import Tokens

OTHERS_CAN_WRITE = 0o022


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the agent's socket (default: that of the state)")
    parser.add_argument("--author", default="agent", help="who proposes, where the agent talks over standard input")
    parser.add_argument("--listen", metavar="ADDRESS:PORT", help="serve HTTP on a loopback address, not standard input")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="with --listen: who may call (docs/spec/mcp.md)")


def run(args: argparse.Namespace) -> int:
    try:
        from pointcall_executor.agent_api import mcp_server
    except ImportError as missing:
        raise output.EnvironmentRefusal(
            "the MCP library is not installed", id="mcp.missing", got=str(missing), hint="pip install pointcall[agents]"
        ) from None
    socket = args.socket or output.state_dir(args) / "run" / "agent.sock"
    if args.listen is None:
        mcp_server.serve_stdio(socket, args.author)
        return output.Exit.OK
    host, port = _loopback(args.listen)
    mcp_server.serve_http(socket, host, port, _tokens(args.tokens))
    return output.Exit.OK


def _loopback(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    try:
        local = ipaddress.ip_address(host.strip("[]")).is_loopback and 0 < int(port) < 65_536
    except ValueError:
        local = False
    if not local:
        raise output.UsageRefusal(
            "MCP is served on loopback only", want="--listen 127.0.0.1:PORT", got=text, hint="put a TLS proxy before it"
        )
    return host.strip("[]"), int(port)


def _tokens(path: Path | None) -> Tokens:
    from pointcall_executor.agent_api.mcp_tokens import MAX_FILE_BYTES, Tokens

    if path is None:
        raise output.UsageRefusal("HTTP needs tokens", want="--tokens FILE")
    if path.stat().st_mode & OTHERS_CAN_WRITE:
        raise output.UsageRefusal(
            "others can write the token file", id="mcp.tokens", want="mode 0644 or less", got=str(path)
        )
    with path.open("rb") as file:
        return Tokens.parse(file.read(MAX_FILE_BYTES + 1))
