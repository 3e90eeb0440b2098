"""What an SRE writes, and how it becomes Wasm. Pure: this room does no I/O at all.

Two doors. For authors: `from pointcall_runbook import CircuitOpened, Recreate, runbook, seconds`, every name of
`sdk.NAMES`. For the other rooms: `compile_source`, `verify_module`, `Interpreter` and their types. Names
are loaded when they are first used, so that importing the package costs nothing. Both lists are stable.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pointcall_runbook.binary import ModuleError as ModuleError
    from pointcall_runbook.compiler import Compiled as Compiled
    from pointcall_runbook.compiler import CompileError as CompileError
    from pointcall_runbook.compiler import compile_source as compile_source
    from pointcall_runbook.decision import Decided as Decided
    from pointcall_runbook.decision import Trap as Trap
    from pointcall_runbook.interpreter import Interpreter as Interpreter
    from pointcall_runbook.meta import Parameter as Parameter
    from pointcall_runbook.meta import Slot as Slot
    from pointcall_runbook.module import Handler as Handler
    from pointcall_runbook.module import ModuleInfo as ModuleInfo
    from pointcall_runbook.module import verify_module as verify_module
    from pointcall_runbook.sdk import Decision as Decision
    from pointcall_runbook.sdk import milliseconds as milliseconds
    from pointcall_runbook.sdk import minutes as minutes
    from pointcall_runbook.sdk import parameter as parameter
    from pointcall_runbook.sdk import remembered as remembered
    from pointcall_runbook.sdk import runbook as runbook
    from pointcall_runbook.sdk import seconds as seconds
    from pointcall_runbook.vocabulary import NO_SERVICE as NO_SERVICE
    from pointcall_runbook.vocabulary import ActionDone as ActionDone
    from pointcall_runbook.vocabulary import ActionKind as ActionKind
    from pointcall_runbook.vocabulary import Address as Address
    from pointcall_runbook.vocabulary import Again as Again
    from pointcall_runbook.vocabulary import Call as Call
    from pointcall_runbook.vocabulary import Channel as Channel
    from pointcall_runbook.vocabulary import CircuitClosed as CircuitClosed
    from pointcall_runbook.vocabulary import CircuitOpened as CircuitOpened
    from pointcall_runbook.vocabulary import CircuitStuck as CircuitStuck
    from pointcall_runbook.vocabulary import CloseCircuit as CloseCircuit
    from pointcall_runbook.vocabulary import ConnectionsReset as ConnectionsReset
    from pointcall_runbook.vocabulary import ConnectSlow as ConnectSlow
    from pointcall_runbook.vocabulary import DiskError as DiskError
    from pointcall_runbook.vocabulary import Escalate as Escalate
    from pointcall_runbook.vocabulary import FilesystemSlow as FilesystemSlow
    from pointcall_runbook.vocabulary import Freeze as Freeze
    from pointcall_runbook.vocabulary import Isolate as Isolate
    from pointcall_runbook.vocabulary import Kill as Kill
    from pointcall_runbook.vocabulary import KillConnections as KillConnections
    from pointcall_runbook.vocabulary import Level as Level
    from pointcall_runbook.vocabulary import Network as Network
    from pointcall_runbook.vocabulary import Notify as Notify
    from pointcall_runbook.vocabulary import OomKilled as OomKilled
    from pointcall_runbook.vocabulary import OpenCircuit as OpenCircuit
    from pointcall_runbook.vocabulary import Operation as Operation
    from pointcall_runbook.vocabulary import Outcome as Outcome
    from pointcall_runbook.vocabulary import PressureHigh as PressureHigh
    from pointcall_runbook.vocabulary import ProcessExited as ProcessExited
    from pointcall_runbook.vocabulary import Recreate as Recreate
    from pointcall_runbook.vocabulary import Remember as Remember
    from pointcall_runbook.vocabulary import Resource as Resource
    from pointcall_runbook.vocabulary import RetransmitStorm as RetransmitStorm
    from pointcall_runbook.vocabulary import Service as Service
    from pointcall_runbook.vocabulary import SyscallUnusual as SyscallUnusual
    from pointcall_runbook.vocabulary import Thaw as Thaw
    from pointcall_runbook.vocabulary import Timer as Timer
    from pointcall_runbook.vocabulary import Unusual as Unusual
    from pointcall_runbook.vocabulary import channel as channel
    from pointcall_runbook.vocabulary import service as service

_ROOMS: Final = {
    "CompileError": "compiler",
    "Compiled": "compiler",
    "compile_source": "compiler",
    "Decided": "decision",
    "Trap": "decision",
    "Interpreter": "interpreter",
    "Parameter": "meta",
    "Slot": "meta",
    "Handler": "module",
    "ModuleInfo": "module",
    "verify_module": "module",
    "ModuleError": "binary",
    "Call": "vocabulary",
}


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    if name in _ROOMS:
        return getattr(importlib.import_module(f"pointcall_runbook.{_ROOMS[name]}"), name)
    from pointcall_runbook.sdk import NAMES

    if name not in NAMES:
        raise AttributeError(f"pointcall_runbook has no {name!r}")
    return NAMES[name]
