"""Runs the service in the embedded mode: this process answers HTTP, and its child processes predict."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace

import uvicorn

from crcjax import __version__
from crcjax.errors import InputError
from crcjax.monitor.logs import log
from crcjax.serve.app import create_app
from crcjax.serve.at_rest import keys_at_rest
from crcjax.serve.config import ServeConfig
from crcjax.serve.open_queue import REDIS_VARIABLE
from crcjax.serve.queue import Queue
from crcjax.serve.service import open_service
from crcjax.serve.tls import certificate_files
from crcjax.serve.worker import WorkerSettings

_POLL_S = 0.2
# The delay before a worker that died is started again; it doubles while it dies within a minute of its start.
_FIRST_DELAY_S, _LONGEST_DELAY_S, _HEALTHY_S = 0.5, 60.0, 60.0
# Seconds that open requests, such as streams of events, get when the service stops.
_SHUTDOWN_S = 5
# The status of a worker that cannot use the bundle: starting it again would not help.
_UNUSABLE = 2


def run_service(config: ServeConfig, on_line: Callable[[str], None]) -> int:
    """Serves until SIGTERM or SIGINT, and returns the exit status. `on_line` receives what a person has to know.

    Raises:
      InputError: an option or the bundle is not usable.
      OutputError: the state folder cannot be written.
    """
    keys, notice = keys_at_rest(config.state, config.host, config.keys, config.encrypted_volume)
    service = open_service(
        *(config.state, config.bundle, config.slides, config.limits, config.redis, config.audit, keys, config.rates),
        config.oidc,
    )
    if config.certificate and config.key:
        certificate, key = config.certificate, config.key
    else:
        certificate, key = certificate_files(config.state / "tls", config.host)
    listener = _listen(config.host, config.port)
    administrator = service.first_administrator()
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service),
            ssl_certfile=str(certificate),
            ssl_keyfile=str(key),
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )
    )
    on_line(f"serving on https://{config.host}:{listener.getsockname()[1]} (certificate: {certificate})")
    if administrator:
        on_line("first administrator: name {}, one-time sign-in secret {}".format(*administrator))
    if notice:
        on_line(notice)
    # The server stops on these signals, and sends them to this process again when it has stopped.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    workers = Workers(service.queue, config, server)
    service.log.append("service_started", bundle_id=service.bundle.id, crcjax=__version__, workers=config.workers)
    with service.log.timed_checkpoints(), workers:
        server.run([listener])
    service.log.append("service_stopped")
    service.log.checkpoint()
    if workers.failed:
        return 2
    return 0 if server.started else 1


def _listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections. Raises InputError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: cannot be listened on ({error.strerror}); choose another --port"
        ) from error


def worker_settings(config: ServeConfig) -> WorkerSettings:
    """What the workers are started with; their names are still to be set."""
    return WorkerSettings(
        name="",
        state=str(config.state.resolve()),
        bundle=str(config.bundle.resolve()),
        trust=tuple(str(key.resolve()) for key in config.trust),
        encoder_weights=str(config.encoder_weights.resolve()) if config.encoder_weights else None,
        threads=config.threads,
        drain_s=config.drain_s,
        lease_s=config.limits.lease_s,
        max_tries=config.limits.max_tries,
        keys=config.keys,
    )


class Workers:
    """Worker processes that are started again when they die; a context manager, which stops them at the end.

    Attributes:
      failed: whether a worker could not use the bundle; the server is stopped then.
    """

    def __init__(self, queue: Queue, config: ServeConfig, server: uvicorn.Server):
        self._queue, self._settings, self._server = queue, worker_settings(config), server
        self._redis = config.redis
        self._slots = [_Slot(f"worker-{number}") for number in range(1, config.workers + 1)]
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="workers", daemon=True)
        self.failed = False

    def __enter__(self) -> Workers:
        # The state folder's earlier workers are dead: they end with their service.
        for worker in self._queue.workers():
            self._queue.worker_died(worker.name)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        self._thread.join()
        for slot in self._slots:
            slot.terminate()
        for slot in self._slots:
            slot.wait(self._settings.drain_s + 10)
            self._queue.worker_died(slot.name)

    def _watch(self) -> None:
        while not self._stopping.wait(_POLL_S):
            for slot in self._slots:
                try:
                    self._look_after(slot)
                except Exception as error:
                    # Such as a full disk; the next look may succeed.
                    log.error(f"{slot.name}: {error}")

    def _look_after(self, slot: _Slot) -> None:
        if slot.process is None:
            if time.monotonic() >= slot.start_at:
                slot.start(self._settings, self._redis)
            return
        status = slot.process.poll()
        if status is None:
            return
        self._queue.worker_died(slot.name)
        slot.ended()
        if status == _UNUSABLE:
            self.failed = self._server.should_exit = True
            self._stopping.set()
            return
        log.error(f"{slot.name} ended with status {status}; it is started again in {slot.delay_s:g} s")


class _Slot:
    """The place of one worker process."""

    def __init__(self, name: str):
        self._place, self.name = name, name
        self.process: subprocess.Popen | None = None
        self.start_at, self.delay_s, self._started = 0.0, _FIRST_DELAY_S, 0.0

    def start(self, settings: WorkerSettings, redis: str | None) -> None:
        """Starts the process; its standard input stays open as long as this process lives."""
        # A name of its own: the one before may not have ended yet.
        self.name = f"{self._place}-{secrets.token_hex(3)}"
        values = json.dumps(asdict(replace(settings, name=self.name)))
        environment = os.environ | ({} if redis is None else {REDIS_VARIABLE: redis})
        # A session of its own: Ctrl-C on the terminal is for the service, which then drains the workers.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "crcjax.serve.worker", values],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env=environment,
        )
        self._started = time.monotonic()

    def ended(self) -> None:
        """Plans the next start."""
        if time.monotonic() - self._started > _HEALTHY_S:
            self.delay_s = _FIRST_DELAY_S
        else:
            self.delay_s = min(_LONGEST_DELAY_S, self.delay_s * 2)
        self._close()
        self.start_at = time.monotonic() + self.delay_s

    def terminate(self) -> None:
        """Asks the process to end."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> None:
        """Waits for the end, and kills the process if it takes longer."""
        if self.process is None:
            return
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._close()

    def _close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
        self.process = None
