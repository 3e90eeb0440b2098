"""All telemetry of one executor, started and ended together: observer, HTTP listener, OTLP. Where nobody reads the
metrics, by the settings, nothing is counted and nothing of it is imported."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from pointcall_executor.backend import ExecutorBackend, both
from pointcall_executor.config import Config, ConfigError
from pointcall_executor.daemon import Executor
from pointcall_executor.loopback import loopback
from pointcall_executor.pulse import Pulse

if TYPE_CHECKING:
    from pointcall_executor.telemetry.http import Listener
    from pointcall_executor.telemetry.metrics import Metrics
    from pointcall_executor.telemetry.otlp import Otlp


class Station:
    """Hears an executor from the moment it is made until `stop`. ListenError, or ConfigError `config.otlp`."""

    def __init__(self, executor: Executor, backend: ExecutorBackend, config: Config) -> None:
        self.metrics: Metrics | None = None
        self.listener: Listener | None = None
        self._ending = contextlib.ExitStack()
        if config.http or config.otlp:
            self._start(executor, backend, config)

    def _start(self, executor: Executor, backend: ExecutorBackend, config: Config) -> None:
        from pointcall_executor.telemetry.latencies import Latencies
        from pointcall_executor.telemetry.metrics import Metrics
        from pointcall_executor.telemetry.observer import Observer

        latencies = Latencies(lambda: executor.session)
        self.metrics = metrics = Metrics(backend.status, latencies=latencies)
        with contextlib.ExitStack() as undo:
            undo.callback(self.stop)
            otlp = _otlp(config, metrics) if config.otlp else None
            if otlp is not None:
                self._ending.callback(otlp.stop)
            observer = Observer(metrics, executor.journal, otlp.traces.run if otlp else None)
            executor.on_receipt = both(executor.on_receipt, observer.receipt)
            executor.on_record = both(executor.on_record, observer.record)
            observer.start()
            self._ending.callback(observer.stop)
            if config.http:
                from pointcall_executor.telemetry.http import Listener

                pulse = Pulse(lambda: executor.beats, lambda: executor.failure is not None)
                self.listener = Listener(loopback(config.http), metrics, pulse, backend.unready)
                self._ending.callback(self.listener.stop)
            undo.pop_all()

    def stop(self) -> None:
        """End what listens and sends. May be called twice."""
        self._ending.close()


def _otlp(config: Config, metrics: Metrics) -> Otlp:
    try:
        from pointcall_executor.telemetry.otlp import Otlp
    except ImportError as missing:
        raise ConfigError(
            "OpenTelemetry is not installed", id="config.otlp", want="setting otlp empty", got=str(missing),
            hint="pip install 'pointcall[telemetry]'",
        ) from None  # fmt: skip
    return Otlp(config.otlp, config.node, metrics)
