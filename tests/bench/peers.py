"""What others do with the same failure: `python -m tests.bench.peers`, one JSON object a figure.

A dependency refuses its clients. How many connects still reach it after the third refusal, and how long does it take
until none does? First the breaker in the kernel, then what a user would pick instead, all in this one run and network
namespace, on loopback: bpftrace with nft, fail2ban, a one-second poll, passive checks of haproxy and of nginx. The
client connects once a millisecond. A peer that is not installed, or does not start, is named with the reason. Needs
root.

Not the same thing: fail2ban and nft drop packets, so a client waits for its own timeout (50 ms here); the breaker
refuses the connect. A proxy sees each failure itself, so its passive checks decide at once, for those who connect
through it: it has no time to block, only what it sent on to the dead server.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pointcall_executor.kernel.breaker import BreakerSensor
from pointcall_executor.kernel.cgroup import Cgroup, own
from tests.bench.figures import figure, percentile
from tests.kernel.lab import here, private_network, read_blob

THRESHOLD = 3
PACE_S = 0.001
TIMEOUT_S = 0.05  # of the client, where packets are dropped
GIVE_UP_S = 8.0
FIRST_PORT = 32100
TABLE = """table inet pcpeer {
  set bad {
    type inet_service
  }
  chain out {
    type filter hook output priority 0
    tcp dport @bad drop
  }
}
"""


class AbsentError(Exception):
    """The peer cannot run here; the text says why."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one client saw of one failure: connects that reached the dead server after the third, and how long."""

    leaked: int
    blocked_after_ms: float | None  # None: it decides itself, where it connects


def client(port: int, note: Callable[[], None] = lambda: None) -> Seen:
    """Connect once a millisecond until a connect does not reach the dead server any more. `note`: after a refusal."""
    refused, third, start = 0, 0.0, time.monotonic()
    while time.monotonic() - start < GIVE_UP_S:
        began = time.monotonic()
        with socket.socket() as sock:
            sock.settimeout(TIMEOUT_S)
            try:
                code = sock.connect_ex(("127.0.0.1", port))
            except TimeoutError:
                code = errno.ETIMEDOUT
        if code != errno.ECONNREFUSED:
            return Seen(refused - THRESHOLD, (began - third) * 1000)
        refused += 1
        note()
        if refused == THRESHOLD:
            third = time.monotonic()
        time.sleep(max(0.0, PACE_S - (time.monotonic() - began)))
    return Seen(refused - THRESHOLD, GIVE_UP_S * 1000)


# ---- each of them ----------------------------------------------------------------------------------------------------


def breaker(rounds: int, _folder: Path) -> list[Seen]:
    home, group = own(), Cgroup.create(f"pcpeer-{os.getpid()}")
    constants = {"threshold": THRESHOLD, "cooldown_us": 60_000_000, "window_us": 60_000_000}
    try:
        with BreakerSensor(read_blob("breaker"), cgroup=group.path, constants=constants) as sensor:
            sensor.attach()
            group.add(0)
            for n in range(rounds):
                sensor.arm(here(FIRST_PORT + n))
            return [client(FIRST_PORT + n) for n in range(rounds)]
    finally:
        home.add(0)
        group.remove()


BPFTRACE = """tracepoint:sock:inet_sock_set_state /args->protocol == 6 && args->oldstate == 2 && args->newstate == 7/ {
  @n[args->dport]++;
  if (@n[args->dport] == THRESHOLD) { system("nft add element inet pcpeer bad { %d }", args->dport); }
}
BEGIN { printf("ready\\n"); }
"""


# Its tracepoints are read from tracefs, which is not mounted everywhere.
WITH_TRACEFS = 'mount -t tracefs tracefs /sys/kernel/tracing; exec bpftrace -B none --unsafe -e "$1"'


def bpftrace(rounds: int, _folder: Path) -> list[Seen]:
    script = BPFTRACE.replace("THRESHOLD", str(THRESHOLD))
    need("bpftrace")
    with nft(), begun(["unshare", "-m", "sh", "-c", WITH_TRACEFS, "sh", script]) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "ready" in line:
                break
        else:
            raise AbsentError(f"bpftrace did not start: {last_words(process)}")
        time.sleep(0.3)  # the probe attaches after BEGIN
        return [client(FIRST_PORT + n) for n in range(rounds)]


def fail2ban(rounds: int, folder: Path) -> list[Seen]:
    """It reads a log that the client writes, as a service would."""
    need("fail2ban-server", "fail2ban-client")
    log, port = folder / "client.log", FIRST_PORT
    log.touch()
    for sub in ("action.d", "filter.d", "jail.d"):
        (folder / sub).mkdir(exist_ok=True)
    (folder / "fail2ban.conf").write_text(
        "[DEFAULT]\n[Definition]\nloglevel = ERROR\nsyslogsocket = auto\ndbfile = None\ndbpurgeage = 1d\n"
    )
    (folder / "filter.d" / "pc.conf").write_text("[Definition]\nfailregex = ^.* refused by <HOST>$\n")
    (folder / "jail.conf").write_text(
        f"[DEFAULT]\n[pc]\nenabled = true\nbackend = polling\nfilter = pc\nlogpath = {log}\nmaxretry = {THRESHOLD}\n"
        "findtime = 60\nbantime = 600\nignoreself = false\nignoreip =\naction = pc\n"
    )
    found = []
    for n in range(rounds):
        port = FIRST_PORT + n
        (folder / "action.d" / "pc.conf").write_text(
            f"[Definition]\nactionban = nft add element inet pcpeer bad {{ {port} }}\nactionunban = true\n"
        )
        log.write_text("")
        sock = folder / f"f2b{n}.sock"
        words = ["fail2ban-server", "-f", "-c", str(folder), "-s", str(sock), "-p", str(folder / "f2b.pid"), "start"]
        with nft(), begun([*words[:1], *words[1:-1], "--logtarget", str(folder / "f2b.log"), "start"]) as process:
            wait_for(sock.exists, process, "fail2ban")
            time.sleep(2)  # until its jail reads

            def note() -> None:
                with log.open("a") as lines:
                    lines.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} refused by 127.0.0.1\n")

            found.append(client(port, note))
    return found


POLL = """
import socket, subprocess, sys, time
failures, port = 0, int(sys.argv[1])
print("ready", flush=True)
while failures < int(sys.argv[2]):
    time.sleep(1)
    with socket.socket() as sock:
        failures = failures + 1 if sock.connect_ex(("127.0.0.1", port)) else 0
subprocess.run(["nft", "add", "element", "inet", "pcpeer", "bad", "{ %d }" % port])
"""


def poll(rounds: int, _folder: Path) -> list[Seen]:
    found = []
    for n in range(rounds):
        port = FIRST_PORT + n
        with nft(), begun([sys.executable, "-c", POLL, str(port), str(THRESHOLD)]) as process:
            assert process.stdout is not None
            process.stdout.readline()
            found.append(client(port))
    return found


def haproxy(rounds: int, folder: Path) -> list[Seen]:
    """Passive checks (`observe layer4`): what it sent on to the dead server, by its own counters."""
    need("haproxy")
    found = []
    for n in range(rounds):
        front, dead, stats = FIRST_PORT + 100 + n, FIRST_PORT + n, folder / f"haproxy{n}.sock"
        config = folder / "haproxy.cfg"
        config.write_text(
            f"global\n  stats socket {stats} mode 600 level admin\n"
            "defaults\n  mode tcp\n  retries 0\n  timeout connect 1s\n  timeout client 1s\n  timeout server 1s\n"
            f"frontend f\n  bind 127.0.0.1:{front}\n  default_backend b\n"
            f"backend b\n  server dead 127.0.0.1:{dead} check inter 60s fastinter 60s downinter 60s "
            f"observe layer4 error-limit {THRESHOLD} on-error mark-down\n"
        )
        with listening(dead) as alive, begun(["haproxy", "-db", "-f", str(config)]) as process:
            wait_for(lambda front=front: accepts(front), process, "haproxy")  # type: ignore[misc]
            time.sleep(0.2)
            before = haproxy_counters(stats)[1]
            alive.close()  # it was healthy; now it is not
            found.append(through(front, lambda stats=stats, before=before: haproxy_state(stats, before)))  # type: ignore[misc]
    return found


def haproxy_state(stats: Path, before: int) -> tuple[int, bool]:
    status, errors = haproxy_counters(stats)
    return errors - before, status.startswith("DOWN")


def haproxy_counters(stats: Path) -> tuple[str, int]:
    """(status, connection errors) of the server."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(stats))
        sock.sendall(b"show stat\n")
        raw = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
    names, *rows = (line.split(",") for line in raw.lstrip("# ").splitlines() if line)
    row = next(dict(zip(names, row, strict=False)) for row in rows if row[1] == "dead")
    return row["status"], int(row["econ"] or 0)


def nginx(rounds: int, folder: Path) -> list[Seen]:
    """`max_fails`: connects to the dead server, by its error log. It is the busiest of two, or nginx would not stop."""
    need("nginx")
    found = []
    for n in range(rounds):
        front, dead, alive = FIRST_PORT + 100 + n, FIRST_PORT + n, FIRST_PORT + 200 + n
        errors, config = folder / f"nginx{n}.log", folder / "nginx.conf"
        paths = "".join(
            f"  {p}_temp_path {folder}/{p};\n" for p in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        config.write_text(
            f"daemon off;\nmaster_process off;\npid {folder}/nginx.pid;\nerror_log {errors} warn;\n"
            "events { worker_connections 512; }\n"
            f"http {{\n  access_log off;\n{paths}"
            f"  upstream u {{ server 127.0.0.1:{dead} weight=1000 max_fails={THRESHOLD} fail_timeout=60s; "
            f"server 127.0.0.1:{alive}; }}\n"
            f"  server {{ listen 127.0.0.1:{alive}; return 200; }}\n"
            f"  server {{ listen 127.0.0.1:{front}; location / {{ proxy_pass http://u; }} }}\n}}\n"
        )
        with begun(["nginx", "-c", str(config), "-p", str(folder), "-e", str(errors)]) as process:
            wait_for(lambda front=front: accepts(front), process, "nginx")  # type: ignore[misc]
            found.append(through(front, lambda errors=errors, dead=dead: nginx_state(errors, dead), http=True))  # type: ignore[misc]
    return found


def nginx_state(errors: Path, dead: int) -> tuple[int, bool]:
    text = errors.read_text()
    return len(re.findall(rf"connect\(\) failed.*:{dead}/", text)), "upstream server temporarily disabled" in text


def through(front: int, state: Callable[[], tuple[int, bool]], *, http: bool = False) -> Seen:
    """The same client through a proxy, until the proxy has taken the dead server out."""
    start = time.monotonic()
    while time.monotonic() - start < GIVE_UP_S:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.settimeout(1)
            sock.connect(("127.0.0.1", front))
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n" if http else b"x")
            sock.recv(64)
        errors, out = state()
        if out:
            return Seen(max(0, errors - THRESHOLD), None)
        time.sleep(PACE_S)
    raise AbsentError(f"it never took the server out: {state()}")


# ---- surroundings ----------------------------------------------------------------------------------------------------


def need(*programs: str) -> None:
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        raise AbsentError(f"not installed: {' '.join(missing)}")


@contextlib.contextmanager
def nft() -> Iterator[None]:
    """The table that the peers without a gate of their own fill; gone afterwards."""
    need("nft")
    made = subprocess.run(["nft", "-f", "-"], input=TABLE, text=True, capture_output=True)
    if made.returncode:
        raise AbsentError(f"nft: {made.stderr.strip()[:200]}")
    try:
        yield
    finally:
        subprocess.run(["nft", "delete", "table", "inet", "pcpeer"], check=True)


@contextlib.contextmanager
def begun(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    need(command[0])
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str], name: str) -> None:
    deadline = time.monotonic() + 10
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AbsentError(f"{name} did not start: {last_words(process)}")
        time.sleep(0.05)


def last_words(process: subprocess.Popen[str]) -> str:
    process.terminate()
    said = process.stdout.read() if process.stdout is not None else ""
    return " | ".join(said.strip().splitlines()[-3:])[:300]


def accepts(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def listening(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port), backlog=64)


PEERS: dict[str, tuple[Callable[[int, Path], list[Seen]], int]] = {  # name -> how, rounds
    "bpftrace + nft": (bpftrace, 5),
    "fail2ban": (fail2ban, 2),
    "1-second poll + nft": (poll, 2),
    "haproxy, passive": (haproxy, 3),
    "nginx, passive": (nginx, 3),
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if os.geteuid():
        sys.exit("tests.bench.peers needs root")
    compare()


def compare() -> None:
    """All of them, one after the other."""
    with private_network(), tempfile.TemporaryDirectory(prefix="pcpeer") as name:
        ours = told("breaker", breaker(20, Path(name)), None)
        for peer, (measure, rounds) in PEERS.items():
            folder = Path(name) / re.sub(r"\W+", "-", peer)
            folder.mkdir()
            try:
                told(peer, measure(rounds, folder), ours)
            except AbsentError as reason:
                print(json.dumps({"suite": "peers", "peer": peer, "absent": str(reason)}), flush=True)


def told(peer: str, seen: list[Seen], ours: float | None) -> float:
    """Print the figures; the median time to block."""
    leaked, ms = [s.leaked for s in seen], [s.blocked_after_ms for s in seen if s.blocked_after_ms is not None]
    name, what = (None, "") if ours is None else (peer, "the breaker in this run")
    figure("peers", "leaked_connects_max", max(leaked), "connects", len(seen), peer=name, baseline=what)
    if not ms:
        return 0.0
    middle = percentile(ms, 0.5)
    ratio = None if ours is None else middle / ours
    figure("peers", "time_to_block_ms_p50", middle, "ms", len(seen), peer=name, baseline=what, ratio=ratio)
    return middle


if __name__ == "__main__":
    main()
