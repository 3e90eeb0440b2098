"""Services of kind `container` on a real Podman: by digest, never pulled, made anew each time."""

from __future__ import annotations

import json
import os
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from pointcall_executor.services import container
from pointcall_executor.services.container import LABEL, ContainerService, Podman, _own
from pointcall_executor.services.groups import remove_empty
from pointcall_executor.services.managed import NOTHING_LEFT, ServiceError
from pointcall_executor.services.spawning import Spawner
from tests.unit.services.podman import PodmanService
from tests.unit.services.world import declared, wait_for

PARENT = f"pointcall-boxes-{os.getpid()}"
SLEEP = ["/bin/busybox", "sleep", "600"]

real = pytest.mark.skipif(PodmanService.missing() != "", reason=f"needs {PodmanService.missing()}")


class Stage:
    def __init__(self, podman: PodmanService, spawner: Spawner) -> None:
        self.podman, self.spawner = podman, spawner
        self.client = Podman(str(podman.socket))

    def service(self, **over: Any) -> ContainerService:
        body = {"image": self.podman.image, "command": SLEEP, "ready": {"timeout_ms": 5000}} | over
        return ContainerService(declared("container", "box", body), self.client, self.spawner)

    def about(self) -> dict[str, Any] | None:
        return self.client.ask("GET", "/containers/pointcall-box/json")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with PodmanService(tmp_path_factory.mktemp("p")) as podman:
        spawner = Spawner(PARENT).watch()
        yield Stage(podman, spawner)
        spawner.close()
    remove_empty(PARENT)


@pytest.fixture
def stage(shared: Stage) -> Iterator[Stage]:
    yield shared
    shared.service().destroy(0)


@real
def test_a_container_is_made_from_its_image_as_declared(stage: Stage) -> None:
    one, moved = stage.service(environment={"COLOUR": "red"}, user="1000"), []
    started = one.start(moved.append)
    command = Path(f"/proc/{started.pid}/cmdline")
    wait_for(lambda: command.read_bytes() == b"/bin/busybox\x00sleep\x00600\x00")  # the runtime has executed it
    assert moved == [started.cgroup_id] == [one.cgroup_id]
    assert one.running
    assert one.healthy() == ""
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{one.pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert (status["NoNewPrivs"], status["CapEff"].strip("0"), status["Uid"].split()[0]) == ("1", "", "1000")
    assert b"COLOUR=red" in Path(f"/proc/{one.pid}/environ").read_bytes()
    assert len(Path(f"/proc/{one.pid}/net/dev").read_text().splitlines()) == 3  # nothing but loopback
    about = stage.about()
    assert about is not None
    assert about["Config"]["Labels"][LABEL] == one.declaration.sha256
    assert about["HostConfig"]["ReadonlyRootfs"]
    one.destroy(0)
    one.destroy(0)
    assert stage.about() is None
    assert not one.running


@real
def test_an_image_that_is_not_here_by_this_digest_is_refused_and_not_pulled(stage: Stage) -> None:
    wrong = "localhost/box@sha256:" + "0" * 64
    with pytest.raises(ServiceError) as refusal:
        stage.service(image=wrong).start()
    assert (refusal.value.id, refusal.value.want) == ("service.image", wrong)


@real
def test_a_killed_container_is_made_anew(stage: Stage) -> None:
    one = stage.service()
    first = one.start()
    one.signal(signal.SIGKILL)
    wait_for(lambda: not one.running)
    assert one.healthy() == "its main process does not run"
    with pytest.raises(ServiceError) as refusal:
        one.signal(signal.SIGTERM)
    assert refusal.value.id == "service.not-running"
    one.destroy(0)
    assert one.start().pid != first.pid


@real
def test_a_freeze_is_a_lease(stage: Stage) -> None:
    one = stage.service()
    one.start()
    one.freeze(time.monotonic_ns() + 500_000_000)
    wait_for(lambda: one.healthy() == "it is frozen")
    wait_for(lambda: one.healthy() == "")
    one.freeze(time.monotonic_ns() + 600_000_000_000)
    one.thaw()
    one.thaw()
    wait_for(lambda: one.healthy() == "")


@real
def test_a_container_that_ends_or_is_never_ready_is_an_error_and_is_removed(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(ServiceError) as refusal:
        stage.service(command=["/bin/busybox", "false"], ready={"file": str(tmp_path / "never")}).start()
    assert refusal.value.id == "service.ended"
    with pytest.raises(ServiceError) as refusal:
        stage.service(ready={"file": str(tmp_path / "never"), "timeout_ms": 100}).start()
    assert refusal.value.id == "service.not-ready"
    assert stage.about() is None


@real
def test_a_mount_is_what_was_declared(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    script = "echo ready > /out/flag; echo no > /in/flag; exec /bin/busybox sleep 600"
    mounts = [
        {"source": str(tmp_path / "out"), "target": "/out", "read_only": False},
        {"source": str(tmp_path), "target": "/in"},
    ]
    one = stage.service(
        command=["/bin/busybox", "sh", "-c", script], mounts=mounts, read_only_root=False,
        ready={"file": str(tmp_path / "out/flag")},
    )  # fmt: skip
    one.start()
    assert (tmp_path / "out/flag").read_text() == "ready\n"
    assert not (tmp_path / "flag").exists()


@real
def test_the_next_executor_adopts_what_was_made_from_the_same_declaration(stage: Stage) -> None:
    first = stage.service()
    pid = first.start().pid
    second = stage.service()
    assert second.adopt() == ""
    assert second.pid == pid
    assert stage.service(environment={"A": "b"}).adopt() == "it was declared otherwise"
    assert stage.about() is None
    assert stage.service().adopt() == NOTHING_LEFT


@contextmanager
def answering(path: Path, status: str, body: bytes) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as channel:
                channel.recv(65536)
                channel.sendall(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body))

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "got"),
    [
        ("500 Oops", json.dumps({"message": "storage is full"}).encode(), "500 storage is full"),
        ("409 Conflict", b"[]", "409 "),
        ("200 OK", b"not json", "Expecting value"),
    ],
)
def test_what_podman_refuses_is_an_error_with_its_words(tmp_path: Path, status: str, body: bytes, got: str) -> None:
    with answering(tmp_path / "s", status, body), pytest.raises(ServiceError) as refusal:
        Podman(str(tmp_path / "s")).ask("GET", "/info")
    assert refusal.value.id == "service.manager"
    assert refusal.value.got.startswith(got)


Answer = tuple[int, Any]


@contextmanager
def scripted(path: Path, answers: Callable[[str, str], Answer]) -> Iterator[Podman]:
    """A Podman that answers what the script says to (method, path below the version)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            self.rfile.read(length)
            status, found = answers(self.command, self.path.partition("/libpod")[2])
            body = b"" if found is None else json.dumps(found).encode()
            with suppress(OSError):  # who asked has gone
                self.wfile.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))

        do_POST = do_DELETE = do_GET  # noqa: N815 - the names of the library

        def address_string(self) -> str:
            return "podman"

        def log_message(self, *_: object) -> None:
            pass

    with socketserver.ThreadingUnixStreamServer(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Podman(str(path))
        server.shutdown()
        thread.join()


def box(client: Podman, **over: Any) -> ContainerService:
    body = {"image": "localhost/box@sha256:" + "a" * 64} | over
    spawner: Any = None
    return ContainerService(declared("container", "box", body), client, spawner)


@pytest.mark.parametrize("labels", [{"Labels": None}, {}])
def test_a_container_without_labels_was_declared_otherwise(tmp_path: Path, labels: dict[str, Any]) -> None:
    removed: list[str] = []

    def answers(method: str, path: str) -> Answer:
        if method == "DELETE":
            removed.append(path.partition("?")[0])
        return 200, {"Id": "b" * 64, "Config": labels, "State": {"Running": False}}

    with scripted(tmp_path / "s", answers) as client:
        assert box(client).adopt() == "it was declared otherwise"
    assert removed == ["/containers/pointcall-box"]


def test_a_stop_is_waited_for_as_long_as_the_grace_that_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "ANSWER_SECONDS", 0.3)
    asked: list[str] = []

    def answers(method: str, path: str) -> Answer:
        asked.append(f"{method} {path.partition('?')[0]}")
        if path.startswith("/containers/pointcall-box/stop"):
            time.sleep(0.8)
        return 200, None

    with scripted(tmp_path / "s", answers) as client:
        one = box(client)
        one._pidfd = os.pidfd_open(os.getpid())  # something that runs
        one.destroy(2_000_000_000)
    assert asked == ["POST /containers/pointcall-box/stop", "DELETE /containers/pointcall-box"]
    assert not one.running


def test_a_container_that_cannot_be_removed_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "REMOVE_SECONDS", 0.1)
    with scripted(tmp_path / "s", lambda _method, _path: (500, {"message": "storage is busy"})) as client:
        one = box(client)
        one.pid, one._pidfd = os.getpid(), os.pidfd_open(os.getpid())
        with pytest.raises(ServiceError, match="Podman refuses"):
            one.destroy(0)
        assert one.running
        assert one.alive() == os.getpid()
    one._let_go()


def test_an_image_that_is_removed_meanwhile_is_named(tmp_path: Path) -> None:
    def answers(_method: str, path: str) -> Answer:
        return (200, {"Id": "i", "Digest": "sha256:" + "a" * 64}) if path.startswith("/images") else (404, {})

    with scripted(tmp_path / "s", answers) as client, pytest.raises(ServiceError) as refusal:
        box(client).start()
    assert refusal.value.id == "service.image"


@real
def test_one_that_somebody_has_started_again_is_found_and_is_not_ours(stage: Stage) -> None:
    one = stage.service()
    started = one.start()
    assert (one.found_in(), one.alive()) == (started.cgroup_id, started.pid)
    stage.client.ask("POST", "/containers/pointcall-box/restart", t=0)
    wait_for(lambda: one.alive() not in (0, started.pid))
    assert one.found_in() not in (0, started.cgroup_id)
    assert not one.held
    assert one.start().pid == one.alive()
    one.destroy(0)
    assert (one.found_in(), one.alive()) == (0, 0)


@real
def test_one_that_somebody_has_paused_is_not_healthy_and_is_made_anew(stage: Stage) -> None:
    one = stage.service()
    pid = one.start().pid
    stage.client.ask("POST", "/containers/pointcall-box/pause")
    wait_for(lambda: one.healthy() == "it is frozen")
    one.destroy(1_000_000_000)
    assert stage.about() is None
    pid = one.start().pid
    stage.client.ask("POST", "/containers/pointcall-box/pause")
    assert stage.service().adopt() == "it does not run"
    assert one.start().pid != pid
    assert one.healthy() == ""


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{", b"HTTP/1.1 200 OK\r\n\r\n{"])
def test_an_answer_that_comes_a_byte_at_a_time_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    monkeypatch.setattr(container, "ANSWER_SECONDS", 0.5)

    def drip(listener: socket.socket) -> None:
        with listener.accept()[0] as channel, suppress(OSError):
            channel.recv(65536)
            channel.sendall(head)
            for _ in range(40):
                time.sleep(0.1)
                channel.sendall(b" ")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        begin = time.monotonic()
        with pytest.raises(ServiceError, match="does not answer"):
            Podman(str(tmp_path / "s")).ask("GET", "/info")
        assert time.monotonic() - begin < 3
        thread.join()


def test_a_socket_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServiceError) as refusal:
        Podman(str(tmp_path / "s")).ask("GET", "/info")
    assert (refusal.value.id, refusal.value.want) == ("service.manager", str(tmp_path / "s"))


@pytest.mark.parametrize(
    ("path", "id", "own"),
    [
        (f"/c/libpod_parent/libpod-{'a' * 64}", "a" * 64, f"/c/libpod_parent/libpod-{'a' * 64}"),
        (f"/c/machine.slice/libpod-{'a' * 64}.scope/container", "a" * 64, f"/c/machine.slice/libpod-{'a' * 64}.scope"),
        ("/c/user.slice/podman.service", "a" * 64, None),
        (f"/c/libpod-{'b' * 64}", "a" * 64, None),
        ("/c/libpod-a", "a", None),
        ("/c", "", None),
    ],
)
def test_only_the_containers_own_cgroup_is_ever_taken(path: str, id: str, own: str | None) -> None:
    found = _own(Path(path), id)
    assert (str(found) if found else None) == own
