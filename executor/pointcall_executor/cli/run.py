"""`pointcall run`: the executor on this node, until it is told to stop.

SIGTERM and SIGINT disarm and close the epoch; SIGHUP reads the settings and the manifest folder again. A failure that a
restart may mend has an exit code of its own: whoever supervises it starts it again. So has a log that no restart mends.
"""

from __future__ import annotations

import argparse
import errno
import gc
from pathlib import Path
from typing import Final

TRANSIENT: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS))  # a disk: full, failing, read-only
SCARCE: Final = frozenset((errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE))  # memory, processes, descriptors
# The same in SQLite's words, primary result codes: BUSY, LOCKED, READONLY, IOERR, FULL. Not CANTOPEN: a permission.
TRANSIENT_SQLITE: Final = frozenset((5, 6, 8, 10, 13))
NO_LOG: Final = frozenset(("journal.damaged", "journal.format", "journal.schema", "journal.origin"))


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML (docs/spec/config.md)")
    parser.add_argument(
        "--manifest", type=Path, metavar="DIR", help="what to arm: *.sigstore.json and files/ (default: STATE/manifest)"
    )


def run(args: argparse.Namespace) -> int:
    from pointcall_executor.cli.output import Exit, failed, state_dir
    from pointcall_runbook.errors import PointcallError

    state = state_dir(args).absolute()
    try:
        return _run(args, state)
    except Exception as error:
        if passes(error, state):
            return failed(error, as_json=args.json, code=Exit.FAILED)
        if isinstance(error, PointcallError) and error.id in NO_LOG:
            return failed(error, as_json=args.json, code=Exit.LOG)
        raise


def _run(args: argparse.Namespace, state: Path) -> int:
    gc.disable()  # imports free next to nothing: looking for garbage among them would take a sixth of their time
    try:
        from pointcall_executor.beginning import begin, leave_in_order

        leave_in_order()
        begun = begin(state, args.config)
    except BaseException:
        gc.enable()
        raise
    with begun.ending:
        try:
            from pointcall_executor.serving import Serving  # the large rest, without privileges by now
        finally:
            gc.enable()
        return Serving(begun, state, args.config, args.manifest or state / "manifest").run()


def passes(error: BaseException, state: Path) -> bool:
    """Whether a start failed in a way that ends without a person: the storage of `state` has no room or fails, another
    process holds its lock, or the machine is short of memory, processes or descriptors. Not: what is missing,
    forbidden, damaged or wrong."""
    from pointcall_runbook.errors import PointcallError

    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:  # what is raised again from itself is its own cause
        seen.add(id(cause))
        if isinstance(cause, PointcallError) and cause.id in ("journal.busy", "executor.running"):
            return True
        code = getattr(cause, "sqlite_errorcode", None)  # of sqlite3.Error; the lowest byte is the primary code
        if isinstance(code, int) and code & 0xFF in TRANSIENT_SQLITE:
            return True
        if isinstance(cause, OSError) and cause.errno in TRANSIENT:
            return cause.filename is None or Path(str(cause.filename)).is_relative_to(state)
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in SCARCE):
            return True
        cause = cause.__cause__
    return False
