"""A node at the edge: everything that `pointcall run` does on this kernel, with its network at its worst or gone.

The node's only network is a real bad link (tests/fault/link.py): 2 s latency each way and 30 % of the packets lost, or
all of them lost, or the interface down. Behind it is all that the executor talks to: the mirror (PostgreSQL), a witness
that takes its keys from the mirror, an OpenTelemetry collector, a webhook over TLS. Signatures, manifests and evidence
are on the node already. The full catch-up over the link at its worst takes many minutes; here it heals first.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import http.client
import http.server
import ipaddress
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pointcall_attest.receipt import Receipt
from pointcall_executor import cli
from pointcall_executor.api.client import Client
from pointcall_executor.api.roles import Role
from pointcall_executor.cli.output import Exit
from pointcall_executor.demo import story
from pointcall_executor.journal import JournalReader
from pointcall_executor.journal_check import check_journal
from pointcall_executor.kernel.cgroup import Cgroup, find_root, own
from pointcall_executor.kernel.probe import BLOBS
from tests.fault import link
from tests.fault.link import CENTRE, BadLink
from tests.fault.log import postgres
from tests.kernel.lab import connect
from tests.lab import Lab
from tests.scenario import test_real_story as real
from tests.scenario.test_real_story import Running, running

PORT = 18447
HTTP = 9464
HOOK, COLLECTOR = 8443, 4318
WAIT_S = 20
HEALED_S = 40
STOP_S = 30  # a request over the link may take 90 s
RUNBOOK = '''"""Tell somebody, hold the circuit, recreate what is behind it; in that order."""
from pointcall_runbook import (
    CircuitOpened, Decision, Level, Notify, OpenCircuit, Recreate, channel, runbook, seconds
)

@runbook
def opened(e: CircuitOpened) -> Decision:
    return [
        Notify(channel=channel("pager"), level=Level.WARNING, code=1),
        OpenCircuit(address=e.address, port=e.port, hold=seconds(1)),
        Recreate(service=e.service),
    ]
'''
Trouble = Callable[[BadLink], None]


def worst(between: BadLink) -> None:
    between.become(latency_s=2.0, loss=0.3)


def all_lost(between: BadLink) -> None:
    between.become(latency_s=0.0, loss=1.0)


def no_interface(between: BadLink) -> None:
    between.down()


TROUBLES: list[Trouble] = [worst, all_lost, no_interface]


# ---- the centre ------------------------------------------------------------------------------------------------------


class Heard(http.server.ThreadingHTTPServer):
    """A web server in the centre that remembers which paths were posted to."""

    daemon_threads = True

    def __init__(self, port: int, chain: Path | None = None) -> None:
        self.posts: Counter[str] = Counter()

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 60

            def do_POST(handler) -> None:  # noqa: N805
                handler.rfile.read(int(handler.headers["Content-Length"]))
                self.posts[handler.path] += 1
                handler.send_response(200)
                handler.send_header("Content-Length", "0")
                handler.end_headers()

            def log_message(handler, format: str, *args: object) -> None:  # noqa: N805
                pass

        super().__init__((CENTRE, port), Handler)
        self._context = None
        if chain is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(chain)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """TLS in the request's own thread: a client that is far away holds up nobody."""
        with contextlib.suppress(OSError):
            if self._context is not None:
                request.settimeout(60)
                request = self._context.wrap_socket(request, server_side=True)
            super().finish_request(request, client_address)


def certificate(file: Path) -> None:
    """A certificate of the centre with its key, one file."""
    key, at = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hook")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(CENTRE))])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, at - dt.timedelta(1), at + dt.timedelta(1))
    made = made.add_extension(address, critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM) + secret)


class Edge:
    """The link, and what is in the centre."""

    def __init__(self, between: BadLink, port: int, folder: Path, ending: contextlib.ExitStack) -> None:
        self.link, self.folder, self._port = between, folder, port
        self.mirror = f"host={CENTRE} port={port} user={postgres.USER} dbname=postgres"
        self.chain = folder / "chain.pem"
        certificate(self.chain)
        self.policy = folder / "witnesses"
        with between.at_centre():
            self.hook, self.collector = Heard(HOOK, self.chain), Heard(COLLECTOR)
        for server in (self.hook, self.collector):
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            ending.callback(thread.join)
            ending.callback(server.server_close)
            ending.callback(server.shutdown)
        self._witness(ending)

    def _witness(self, ending: contextlib.ExitStack) -> None:
        command = [sys.executable, "-m", "pointcall_executor.cli", "witness"]
        common = ["--name", "w.example/w", "--key", str(self.folder / "key"), "--json"]
        made = subprocess.run([*command, "key", *common], check=True, capture_output=True, env=real.ENVIRONMENT)
        serving = ["serve", *common, "--state", str(self.folder / "w.db"), "--listen", f"{CENTRE}:0"]
        with self.link.at_centre():
            process = subprocess.Popen(
                [*command, *serving, "--mirror", self.mirror], stdout=subprocess.PIPE, env=real.ENVIRONMENT
            )
        ending.callback(process.wait)
        ending.callback(process.terminate)
        assert process.stdout is not None
        ending.callback(process.stdout.close)
        where = json.loads(process.stdout.readline())["address"]
        self.policy.write_text(f"witness w {json.loads(made.stdout)['verifier']} {where}\nquorum w\n")

    @contextlib.contextmanager
    def database(self) -> Iterator[Any]:
        """The mirror, as somebody in the centre sees it."""
        import psycopg

        with self.link.at_centre(), psycopg.connect(self.mirror, autocommit=True) as db:
            yield db

    def held(self, origin: str) -> list[bytes]:
        """The entries that the mirror has of a log, by index; every index once."""
        with self.database() as db:
            if db.execute("select to_regclass('entry')").fetchone()[0] is None:
                return []
            rows = db.execute("select i, raw from entry where origin = %s order by i", (origin,)).fetchall()
        assert [row[0] for row in rows] == list(range(len(rows)))
        return [bytes(row[1]) for row in rows]


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    if missing := story.missing_features():
        pytest.skip("the kernel lacks " + ", ".join(f"{f.id} ({f.detail})" for f in missing))
    lack = link.missing() or postgres.missing()
    if lack is not None:
        pytest.skip(f"{lack} is missing")
    with contextlib.ExitStack() as ending:
        between = ending.enter_context(BadLink(seed=8))
        with between.at_centre():
            port = ending.enter_context(postgres.server(CENTRE))
        yield Edge(between, port, tmp_path_factory.mktemp("centre"), ending)


# ---- the node --------------------------------------------------------------------------------------------------------


def put(lab: Lab, pager: dict[str, str]) -> None:
    """Sign one manifest and lay it where `pointcall run` looks."""
    script = Path(str(resources.files("pointcall_executor.demo"))) / "service.py"
    argv = [str(Path(sys.executable).resolve()), "-I", "-S", str(script), str(PORT)]
    files = [{"path": p, "sha256": hashlib.sha256(Path(p).read_bytes()).hexdigest()} for p in argv if p.startswith("/")]
    ready = {"tcp": f"127.0.0.1:{PORT}", "timeout_ms": 10_000}
    lab.runbook("fix", RUNBOOK)
    grants = {
        "actions": ["recreate", "notify", "open_circuit"],
        "services": ["api"],
        "channels": ["pager"],
        "networks": ["127.0.0.0/8"],
    }
    declaration = lab.declare("api", {"argv": argv, "files": files, "ready": ready})
    listen = [{"address": "127.0.0.1", "port": PORT}]
    body: dict[str, Any] = {
        "runbooks": [{"name": "fix", "source": "fix", "grants": grants}],
        "sensors": [{"name": "breaker"}, {"name": "lifecycle"}],
        "services": [{"name": "api", "declaration": declaration, "listen": listen}],
        "channels": [{"name": "pager"} | pager],
    }
    assembled = lab.assemble(body, blobs=BLOBS)
    folder = lab.state / "manifest"
    assembled.write(folder)
    (folder / "manifest.sigstore.json").write_bytes(lab.sign(assembled).signatures[0])


def until(what: Callable[[], Any], seconds: float = WAIT_S) -> Any:
    """What it gives as soon as that is something."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it never was"
        time.sleep(0.05)
    return found


def receipts(lab: Lab) -> list[Receipt]:
    with contextlib.closing(JournalReader.open(lab.state / "journal.db")) as journal:
        return [e.receipt() for e in journal.entries("receipt")]


def origin_of(lab: Lab) -> str:
    with contextlib.closing(JournalReader.open(lab.state / "journal.db")) as journal:
        return journal.origin


def members(group: str) -> set[int]:
    folder = find_root() / group / "services"
    return {int(line) for path in folder.glob("*/cgroup.procs") for line in path.read_text().split()}


def incident(lab: Lab) -> Receipt:
    """Kill the service while a client connects: it accepts again, and there is a receipt."""
    group = f"pointcall-run-{os.getpid()}"
    (before,) = members(group)
    home = own()
    Cgroup(find_root() / group / "clients").add(0)
    try:
        os.kill(before, signal.SIGKILL)
        time.sleep(0.02)
        until(lambda: connect(PORT) and members(group) - {before} and connect(PORT) == "OK")
    finally:
        home.add(0)
    found = until(lambda: receipts(lab))
    return next(r for r in found if r.trigger.event == "CircuitOpened")


def shape(receipt: Receipt) -> list[tuple[str, str, str]]:
    """What was done about it, whoever was told."""
    done = [(a.action, a.target, a.outcome) for a in receipt.actions if a.action != "notify"]
    return [(receipt.trigger.event, receipt.runbook.name, ""), *done]


def copies(lab: Lab) -> dict[str, Any]:
    with Client(lab.state / "run" / f"{Role.OPERATOR.value}.sock") as client:
        return {c.name: c for c in client.call("Status/GetStatus").copies}


def get(path: str) -> tuple[int, str]:
    asking = http.client.HTTPConnection("127.0.0.1", HTTP, timeout=WAIT_S)
    with contextlib.closing(asking):
        asking.request("GET", path)
        answer = asking.getresponse()
        return answer.status, answer.read().decode()


def stop(run: Running) -> None:
    run.process.send_signal(signal.SIGTERM)
    run.until("stopped")
    assert run.process.wait(timeout=STOP_S) == Exit.OK


def settings(edge: Edge) -> dict[str, Any]:
    """Everything that goes over the network, as far as the executor can be told to."""
    collector = f"http://{CENTRE}:{COLLECTOR}"
    return {"mirror": edge.mirror, "witnesses": str(edge.policy), "otlp": collector, "http": f"127.0.0.1:{HTTP}"}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What a node without any peers did, once it was asked."""
    return {}


@pytest.mark.kernel
def test_a_node_without_peers_says_what_is_to_be_done(edge: Edge, lab: Lab, alone: dict[str, Any]) -> None:
    put(lab, {"kind": "log"})
    with edge.link.at_node(), running(lab, node="alone") as run:
        run.until("armed")
        alone["shape"] = shape(incident(lab))
        stop(run)
    assert [row[0] for row in alone["shape"]] == ["CircuitOpened", "open_circuit", "recreate"]
    assert {row[2] for row in alone["shape"][1:]} == {"applied"}


@pytest.mark.kernel
@pytest.mark.parametrize("trouble", TROUBLES)
def test_the_network_is_no_part_of_recovery_and_gets_everything_later(
    trouble: Trouble, edge: Edge, lab: Lab, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = trouble.__name__.replace("_", "-")
    monkeypatch.setitem(real.ENVIRONMENT, "SSL_CERT_FILE", str(edge.chain))
    put(lab, {"kind": "webhook", "address": f"https://{CENTRE}:{HOOK}/pager"})
    trouble(edge.link)
    told = edge.hook.posts["/pager"]
    try:
        with edge.link.at_node(), running(lab, node=name, **settings(edge)) as run:
            run.until("armed")
            receipt = incident(lab)
            assert shape(receipt) == alone["shape"]
            recovered_without_waiting(receipt, trouble)
            lag_is_said(lab, run)
            stop(run)  # while everything is still being asked
        assert edge.held(origin_of(lab)) == []
        assert edge.hook.posts["/pager"] == told
        with edge.link.at_node(), running(lab, node=name, **settings(edge)) as run:
            run.until("armed")
            edge.link.heal()
            everything_arrives(edge, lab)
            stop(run)
    finally:
        edge.link.heal()
    with contextlib.closing(JournalReader.open(lab.state / "journal.db")) as journal:
        assert check_journal(journal).passed
        kinds = [e.kind for e in journal.entries()]
    assert kinds[-1] == "epoch-close"  # both lives ended as they should
    assert kinds.count("epoch-close") == kinds.count("epoch-open")
    the_copy_is_a_log(edge, lab)


def recovered_without_waiting(receipt: Receipt, trouble: Trouble) -> None:
    """The message that comes first in the decision was tried all the while, and failed; nothing else waited for it."""
    acted = {a.action: a for a in receipt.actions}
    notify, recreate = acted["notify"], acted["recreate"]
    assert notify.outcome == "failed"
    assert recreate.ended_ns is not None
    assert notify.ended_ns is not None
    if trouble is not no_interface:  # there it fails at once
        assert recreate.ended_ns < notify.ended_ns


def lag_is_said(lab: Lab, run: Running) -> None:
    """Nothing has arrived, and that is what is said: all of the log is behind. It does not make the node unready."""
    found = until(lambda: (c := copies(lab)) and all(one.behind_ms for one in c.values()) and c)
    assert set(found) == {"mirror", "witnesses"}
    with contextlib.closing(JournalReader.open(lab.state / "journal.db")) as journal:
        head = journal.head()
    assert head is not None
    for copy in found.values():
        assert copy.covered == 0
        assert 0 < copy.behind <= head.size
    assert get("/readyz") == (200, "armed\n")
    assert run.process.poll() is None


def everything_arrives(edge: Edge, lab: Lab) -> None:
    """Mirror and witness get every entry that the log has, in its order, each once."""
    with contextlib.closing(JournalReader.open(lab.state / "journal.db")) as journal:
        size, origin = journal.size, journal.origin

        def caught_up() -> bool:
            signed = max((note.size for note, _ in journal.cosigned()), default=0)
            return signed >= size and len(edge.held(origin)) >= size

        until(caught_up, HEALED_S)
        held = edge.held(origin)
        assert held == journal.raws(0, len(held))
    until(lambda: all(copy.covered >= size for copy in copies(lab).values()))


def the_copy_is_a_log(edge: Edge, lab: Lab) -> None:
    """Whoever has only the mirror can check it."""
    words = ["--state-dir", str(lab.state), "--json"]
    with edge.link.at_centre():
        tiles = str(lab.state / "tiles")
        assert cli.main(["mirror", "tiles", edge.mirror, "--log", origin_of(lab), "--out", tiles, *words]) == Exit.OK
    assert cli.main(["verify", tiles, "--allow-emulated", *words]) == Exit.OK
