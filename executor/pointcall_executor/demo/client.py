"""The demo's client: connects in a loop and writes one JSON line whenever the result changes.

Times are CLOCK_MONOTONIC ns. `last_ns` is when the previous result was seen for the last time, `took_ns` how long this
connect() took. Joins the cgroup whose cgroup.procs it is given, so that the breaker's gate sees it.

usage: python -I client.py PORT CGROUP_PROCS     (CGROUP_PROCS "-": stay where you are)
"""

import contextlib
import errno
import json
import socket
import sys
import time
from pathlib import Path

PAUSE_SECONDS = 0.0005


def attempt(port: int) -> tuple[str, int, int]:
    """Result of one connect, when it returned, how long it took."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        begin = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        try:
            client.connect(("127.0.0.1", port))
            result = "OK"
        except OSError as error:
            result = errno.errorcode.get(error.errno or 0, str(error))
        end = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        if result == "OK":
            with contextlib.suppress(OSError):
                client.recv(16)
        return result, end, end - begin


def main() -> None:
    port, procs = int(sys.argv[1]), sys.argv[2]
    if procs != "-":
        Path(procs).write_text("0")
    before, last_ns, count = "", 0, 0
    while True:
        result, now_ns, took_ns = attempt(port)
        if result != before:
            line = {"result": result, "at_ns": now_ns, "took_ns": took_ns, "last_ns": last_ns, "before": before}
            sys.stdout.write(json.dumps(line | {"count": count}) + "\n")
            sys.stdout.flush()
            before, count = result, 0
        count, last_ns = count + 1, now_ns
        time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    main()
