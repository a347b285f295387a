"""Runs the service: this process answers HTTP, or starts replicas that do, and starts the workers that predict."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

from crcjax import __version__
from crcjax.errors import InputError
from crcjax.serve.app import METRICS_VARIABLE
from crcjax.serve.at_rest import keys_at_rest
from crcjax.serve.config import ServeConfig
from crcjax.serve.open_queue import REDIS_VARIABLE
from crcjax.serve.processes import UNUSABLE, Processes, Slot
from crcjax.serve.queue import QueueUnavailableError
from crcjax.serve.release_watch import ReleaseWatch
from crcjax.serve.replica import CONFIG_VARIABLE, certificate_of, http_server, open_configured
from crcjax.serve.service import Service, forget_results_of_other_bundles
from crcjax.serve.viewer_library import INSTALL, read_script
from crcjax.serve.worker import WorkerSettings


def run_service(config: ServeConfig, on_line: Callable[[str], None]) -> int:
    """Serves until SIGTERM or SIGINT, and returns the exit status. `on_line` receives what a person has to know.

    Raises:
      InputError: an option or the bundle is not usable.
      OutputError: the state folder cannot be written.
    """
    keys, notice = keys_at_rest(config.state, config.host, config.keys, config.encrypted_volume)
    has_viewer = read_script(config.viewer) is not None
    try:
        service = open_configured(config, keys)
    except QueueUnavailableError as error:
        raise InputError(str(error)) from error
    forget_results_of_other_bundles(service)
    certificate, _ = certificate_of(config)
    listener = _listen(config.host, config.port)
    administrator = service.first_administrator()
    on_line(f"serving on https://{config.host}:{listener.getsockname()[1]} (certificate: {certificate})")
    if administrator:
        on_line("first administrator: name {}, one-time sign-in secret {}".format(*administrator))
    if notice:
        on_line(notice)
    if not has_viewer:
        on_line(f"the zooming viewer is not installed, so that the page shows heatmaps only; install it: {INSTALL}")
    serve = _serve_here if config.replicas == 1 else _serve_by_replicas
    bundles = {alias: facts.id for alias, facts in service.bundles().items()}
    service.log.append("service_started", bundles=bundles, crcjax=__version__, workers=config.workers)
    with service.log.timed_checkpoints(), ReleaseWatch(service):
        status = serve(config, service, listener)
    service.log.append("service_stopped")
    service.log.checkpoint()
    return status


def _serve_here(config: ServeConfig, service: Service, listener: socket.socket) -> int:
    """Answers HTTP in this process."""
    server = http_server(config, service)
    # The server stops on these signals, and sends them to this process again when it has stopped.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    with Processes(
        service.queue, _worker_slots(config), config.drain_s, partial(setattr, server, "should_exit", True)
    ) as processes:
        server.run([listener])
    return UNUSABLE if processes.failed else 0 if server.started else 1


def _serve_by_replicas(config: ServeConfig, service: Service, listener: socket.socket) -> int:
    """Answers HTTP in child processes, which share the listening socket."""
    metrics = config.state / "metrics"
    shutil.rmtree(metrics, ignore_errors=True)
    metrics.mkdir()
    environment = {CONFIG_VARIABLE: config.model_dump_json(), METRICS_VARIABLE: str(metrics)}
    command = partial(_replica_command, str(listener.fileno()))
    replicas = [
        Slot(f"replica-{number}", command, environment, (listener.fileno(),))
        for number in range(1, config.replicas + 1)
    ]
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopping.set())
    with Processes(service.queue, [*replicas, *_worker_slots(config)], config.drain_s, stopping.set) as processes:
        stopping.wait()
    return UNUSABLE if processes.failed else 0


def _replica_command(listener: str, name: str) -> list[str]:
    return [sys.executable, "-m", "crcjax.serve.replica", listener]


def _worker_slots(config: ServeConfig) -> list[Slot]:
    environment = {} if config.redis is None else {REDIS_VARIABLE: config.redis}
    command = partial(_worker_command, worker_settings(config))
    return [Slot(f"worker-{number}", command, environment) for number in range(1, config.workers + 1)]


def _worker_command(settings: WorkerSettings, name: str) -> list[str]:
    return [sys.executable, "-m", "crcjax.serve.worker", json.dumps(asdict(replace(settings, name=name)))]


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
        bundle=str(config.bundle.resolve()) if config.bundle else None,
        models=str(config.models.resolve()) if config.models else None,
        trust=tuple(str(key.resolve()) for key in config.trust),
        encoder_weights=str(config.encoder_weights.resolve()) if config.encoder_weights else None,
        threads=config.threads,
        drain_s=config.drain_s,
        lease_s=config.limits.lease_s,
        max_tries=config.limits.max_tries,
        keys=config.keys,
    )
