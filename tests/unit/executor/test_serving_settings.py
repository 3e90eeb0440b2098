"""Settings that open doors or give things up: the mTLS listener, HTTP, the user, and what does not go together."""

from __future__ import annotations

import itertools
import signal
import socket
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from cryptography import x509

from pointcall_executor import service_manager, serving
from pointcall_executor.api.caller import CallerError
from pointcall_executor.api.server import serve
from pointcall_executor.arming import ArmingError
from pointcall_executor.beginning import mtls_of
from pointcall_executor.cli.output import Exit
from pointcall_executor.config import RESTART, Config, ConfigError, load
from pointcall_executor.services.managed import ServiceError
from pointcall_executor.tee.platform import PlatformError
from tests.unit.api.fake_backend import FakeBackend
from tests.unit.api.test_caller import AUDITOR, RELYING, Authority
from tests.unit.api.test_matrix import _status


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Authority]:
    authority = Authority.new()
    key, chain = authority.issue(x509.DNSName("localhost"))
    for name, content in (("node.key", key), ("node.pem", chain), ("clients.pem", authority.pem)):
        (tmp_path / name).write_bytes(content)
    return tmp_path, authority


def settings(folder: Path, roles: str = f'{{ "{AUDITOR}" = "auditor" }}', extra: str = "") -> Path:
    path = folder / "pointcall.toml"
    path.write_text(
        f'{extra}\n[mtls]\naddress = "localhost:0"\ncertificate = "{folder}/node.pem"\nkey = "{folder}/node.key"\n'
        f'client_roots = "{folder}/clients.pem"\nroles = {roles}\n'
    )
    return path


def test_the_listener_of_the_settings_serves_who_is_in_its_table(files: tuple[Path, Authority]) -> None:
    folder, authority = files
    mtls = mtls_of(load(settings(folder), {}))
    run_dir = Path(tempfile.mkdtemp(prefix="pc-"))
    backend = FakeBackend(folder)
    backend.time = datetime.now(UTC)  # certificates are made now
    server = serve(backend, run_dir / "run", mtls=mtls)
    try:
        found = {}
        for name in (AUDITOR, RELYING):
            key, chain = authority.issue(x509.UniformResourceIdentifier(name))
            credentials = grpc.ssl_channel_credentials(authority.pem, key, chain)
            with grpc.secure_channel(f"localhost:{server.port}", credentials) as channel:
                found[name] = _status(channel, "pointcall.v1.Events/ListEvents").name
                assert _status(channel, "pointcall.v1.Control/Disarm").name == "PERMISSION_DENIED"
    finally:
        server.stop(0)
        run_dir.joinpath("run").rmdir()
        run_dir.rmdir()
    assert found == {AUDITOR: "OK", RELYING: "PERMISSION_DENIED"}


def test_without_the_setting_there_is_no_listener() -> None:
    assert mtls_of(Config()) is None


def test_a_file_that_is_not_there_is_no_reason_to_go_without(files: tuple[Path, Authority]) -> None:
    folder, _ = files
    config = load(settings(folder), {})
    (folder / "node.key").unlink()
    with pytest.raises(ConfigError) as refusal:
        mtls_of(config)
    assert refusal.value.id == "config.mtls"


def test_only_spiffe_ids_may_be_callers(files: tuple[Path, Authority]) -> None:
    folder, _ = files
    with pytest.raises(CallerError):
        mtls_of(load(settings(folder, roles='{ "alice" = "auditor" }'), {}))


@pytest.mark.parametrize("roles", ['{ "spiffe://a/b" = "operator" }', '{ "spiffe://a/b" = "agent" }', "{}"])
def test_no_one_changes_a_node_over_the_network(files: tuple[Path, Authority], roles: str) -> None:
    folder, _ = files
    with pytest.raises(ConfigError) as refusal:
        load(settings(folder, roles=roles), {})
    assert "mtls.roles" in refusal.value.message


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('pin = true\nuser = "pointcall"', "combination"),
        ('user = "Root; rm"', "user"),
        ('capabilities = ["CAP_SYS_PTRACE"]', "capabilities"),
        ('otlp = "ftp://collector"', "otlp"),
        ('otlp = "http://user:pass@collector"', "otlp"),
        ("memory_mb = 1", "memory_mb"),
        ('privileges = "some"', "privileges"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "pointcall.toml"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError) as refusal:
        load(path, {})
    assert word in refusal.value.message


def test_what_can_change_while_running_is_a_short_list() -> None:
    log = {"retention_days", "clear_text_days", "witnesses", "mirror", "lag_seconds"}
    assert set(Config.model_fields) - set(RESTART) == {"checkpoint_seconds", "epoch_minutes"} | log


@pytest.mark.parametrize(
    ("error", "goes_on"),
    [
        (PlatformError("the quote service is away"), True),
        (ArmingError("runs in flight do not end", id="arm.busy"), True),
        (OSError(24, "Too many open files"), True),
        (ConfigError("a setting needs a restart", id="config.restart"), False),
    ],
)
def test_what_lies_in_the_folder_is_looked_at_also_where_new_trust_must_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, goes_on: bool
) -> None:
    def reload(_config: object) -> None:
        raise error

    looked: list[object] = []
    made = serving.Serving.__new__(serving.Serving)
    made._config_path = tmp_path / "none.toml"
    monkeypatch.setattr(serving, "load", lambda _path: Config())
    monkeypatch.setattr(serving.Serving, "_arm", lambda _self, executor: looked.append(executor))
    executor: Any = SimpleNamespace(reload=reload)
    made._read_again(executor)
    assert looked == [executor] * goes_on


def test_a_stop_that_takes_long_asks_the_service_manager_for_more_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = threading.Event()

    class Slow:
        """An executor whose end takes until somebody has asked for more time."""

        failure = admitted = None
        disarmed_by_hand = "a person said so"
        beats = 0
        journal = recorder = None

        def __init__(self, *_: object) -> None:
            """Nothing is armed."""

        def close(self, reason: str) -> None:
            assert reason == "SIGTERM"
            assert asked.wait(10)

    idle = SimpleNamespace(start=lambda: None, stop=lambda: None, gauges=None)
    for name in ("Station", "Shipping", "ExecutorBackend"):
        monkeypatch.setattr(serving, name, lambda *_: idle)
    monkeypatch.setattr(serving, "Executor", Slow)
    monkeypatch.setattr(service_manager, "EXTEND_SECONDS", 0.03)
    monkeypatch.setattr(serving.signal, "signal", lambda *_: None)
    told: list[str] = []

    class Manager(service_manager.ServiceManager):
        def _send(self, *lines: str) -> None:
            told.append(lines[0])
            if lines[0] == "READY=1":
                made._on_signal(signal.SIGTERM, None)
            if "STOPPING=1" in told and lines[0].startswith("EXTEND_TIMEOUT_USEC="):
                asked.set()

    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(path))
        manager = Manager(str(path), 0)
        begun: Any = SimpleNamespace(manager=manager, config=Config(api=False), platform=None, node=None)
        made = serving.Serving(begun, tmp_path, None, tmp_path)
        assert made.run() == Exit.OK
        manager.close()
    assert told.index("READY=1") < told.index("STOPPING=1") < len(told) - 1
    assert told[-1] == "EXTEND_TIMEOUT_USEC=30000"


def test_what_passes_by_itself_is_tried_again_later_and_later_until_it_is_armed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A service manager that is not there yet while the machine starts."""
    monkeypatch.setattr(serving, "FLUSH_SECONDS", 0.01)
    monkeypatch.setattr(serving.Bundle, "read", lambda _folder: SimpleNamespace(signatures=(b"",)))
    tried: list[float] = []
    executor: Any = SimpleNamespace(failure=None, admitted=None, disarmed_by_hand="")

    def arm(_bundle: Any, *, by_itself: bool) -> Any:
        assert by_itself
        tried.append(time.monotonic())
        if len(tried) < 4:
            raise ServiceError("the service manager does not answer", id="service.manager")
        executor.admitted = SimpleNamespace(
            manifest=SimpleNamespace(name="lab", sequence=1), verdict=SimpleNamespace(tier="emulated")
        )
        executor.state = SimpleNamespace(guard=SimpleNamespace(paused=""))
        return executor.admitted

    executor.arm = arm
    begun: Any = SimpleNamespace(manager=service_manager.ServiceManager("", 0), config=Config())
    made = serving.Serving(begun, tmp_path, None, tmp_path)
    made._retry_s = 0.05
    made._arm(executor)
    stop = threading.Timer(2, lambda: made._on_signal(signal.SIGTERM, None))
    stop.start()
    made._wait(executor)
    stop.join()
    assert len(tried) == 4
    pauses = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert pauses[0] >= 0.05
    assert pauses[1] >= 0.1
    assert pauses[2] >= 0.2


def test_what_a_person_has_armed_meanwhile_is_not_armed_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(serving, "FLUSH_SECONDS", 0.01)
    monkeypatch.setattr(serving.Bundle, "read", lambda _folder: SimpleNamespace(signatures=(b"",)))
    tried: list[Any] = []
    executor: Any = SimpleNamespace(failure=None, admitted=None, disarmed_by_hand="")

    def arm(bundle: Any, *, by_itself: bool) -> Any:
        tried.append(bundle)
        raise ServiceError("the service manager does not answer", id="service.manager")

    executor.arm = arm
    begun: Any = SimpleNamespace(manager=service_manager.ServiceManager("", 0), config=Config())
    made = serving.Serving(begun, tmp_path, None, tmp_path)
    made._retry_s = 0.05
    made._arm(executor)
    executor.admitted = SimpleNamespace(
        manifest=SimpleNamespace(name="lab", sequence=2), verdict=SimpleNamespace(tier="emulated")
    )
    executor.state = SimpleNamespace(guard=SimpleNamespace(paused=""))
    stop = threading.Timer(0.5, lambda: made._on_signal(signal.SIGTERM, None))
    stop.start()
    made._wait(executor)
    stop.join()
    assert len(tried) == 1


def test_what_does_not_pass_for_long_is_tried_again_every_ten_minutes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def arm(*_: Any, **__: Any) -> Any:
        raise ServiceError("the service manager does not answer", id="service.manager")

    monkeypatch.setattr(serving.Bundle, "read", lambda _folder: SimpleNamespace(signatures=(b"",)))
    begun: Any = SimpleNamespace(manager=service_manager.ServiceManager("", 0), config=Config())
    made = serving.Serving(begun, tmp_path, None, tmp_path)
    pauses = []
    for _ in range(8):
        begin = time.monotonic()
        made._arm(SimpleNamespace(arm=arm, failure=None, admitted=None, disarmed_by_hand=""))  # type: ignore[arg-type]
        assert made._retry_at is not None
        pauses.append(round(made._retry_at - begin))
    assert pauses == [15, 30, 60, 120, 240, 480, 600, 600]


def test_what_does_not_pass_by_itself_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def arm(*_: Any, **__: Any) -> Any:
        raise ServiceError("a file changed", id="service.digest")

    monkeypatch.setattr(serving.Bundle, "read", lambda _folder: SimpleNamespace(signatures=(b"",)))
    begun: Any = SimpleNamespace(manager=service_manager.ServiceManager("", 0), config=Config())
    made = serving.Serving(begun, tmp_path, None, tmp_path)
    made._arm(SimpleNamespace(arm=arm, failure=None, admitted=None, disarmed_by_hand=""))  # type: ignore[arg-type]
    assert made._retry_at is None
