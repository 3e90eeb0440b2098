"""Compiles and runs one BCC program, and prints what it traced. Run by the interpreter that has the distribution's bcc.

Nothing of Pointcall is imported here: that interpreter need not have it. usage: bcc_runner.py FILE SECONDS [TABLE...]
"""

import json
import os
import signal
import sys
import time

# The compiler inside bcc writes to standard output as it likes: that goes to standard error, the rows to a copy.
_rows = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def say(**row: object) -> None:
    _rows.write(json.dumps(row) + "\n")
    _rows.flush()


def text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(getattr(value, "value", value))


def main(path: str, seconds: float, tables: list[str]) -> int:
    import bcc  # type: ignore[import-not-found,unused-ignore]

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    program = bcc.BPF(src_file=path.encode())  # attaches what is named kprobe__, tracepoint__ or TRACEPOINT_PROBE
    say(attached=bool(program.num_open_kprobes() + program.num_open_tracepoints() + program.num_open_uprobes()))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        task, pid, _cpu, _flags, at, line = program.trace_fields(nonblocking=True)
        if line is None:
            time.sleep(0.01)
            continue
        say(at=float(at), pid=int(pid), task=text(task), line=text(line))
    for name in tables:
        say(table=name, rows=[[text(key), text(value)] for key, value in program[name].items()])
    program.cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), sys.argv[3:]))
