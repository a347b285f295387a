"""The API process: answers HTTPS for the service. `crcjax serve` is one itself, or starts several with `--replicas`.

`python -m crcjax.serve.replica FD` accepts connections on the listening socket that it inherits; all replicas share it, so that a
connection that one of them did not accept before it died goes to another. It ends when its standard input is closed.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

import uvicorn

from crcjax.encryption.keys import Keys, open_keys
from crcjax.errors import CrcjaxError, InputError, OutputError
from crcjax.serve.config import ServeConfig
from crcjax.serve.processes import UNUSABLE
from crcjax.serve.service import Service, open_service
from crcjax.serve.tls import certificate_files
from crcjax.serve.viewer_library import read_script

# The environment variable by which a replica receives the configuration, which may hold a password.
CONFIG_VARIABLE = "CRCJAX_SERVE"
# Seconds that open requests, such as streams of events, get when the service stops.
_SHUTDOWN_S = 5


def open_configured(config: ServeConfig, keys: Keys | None) -> Service:
    """The service of a configuration. Raises InputError, OutputError."""
    return open_service(
        *(config.state, config.bundle, config.slides, config.limits, config.redis, config.audit, keys, config.rates),
        config.oidc,
        config.models,
    )


def certificate_of(config: ServeConfig) -> tuple[Path, Path]:
    """The certificate and its key: those that are configured, or self-signed ones."""
    if config.certificate and config.key:
        return config.certificate, config.key
    return certificate_files(config.state / "tls", config.host)


def http_server(config: ServeConfig, service: Service) -> uvicorn.Server:
    """The HTTPS server of one process."""
    from crcjax.serve.app import create_app

    certificate, key = certificate_of(config)
    return uvicorn.Server(
        uvicorn.Config(
            create_app(service, read_script(config.viewer)),
            ssl_certfile=str(certificate),
            ssl_keyfile=str(key),
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )
    )


def _stop_with_the_service(server: uvicorn.Server) -> None:
    """Stops the server once the standard input is closed."""

    def wait() -> None:
        with suppress(OSError):
            while os.read(0, 1):
                pass
        server.should_exit = True

    threading.Thread(target=wait, name="parent", daemon=True).start()


def main(arguments: list[str]) -> int:
    """Answers until SIGTERM; returns 2 if the configuration is not usable."""
    try:
        config = ServeConfig.model_validate_json(os.environ.pop(CONFIG_VARIABLE))
        service = open_configured(config, open_keys(config.keys) if config.keys else None)
        server = http_server(config, service)
    except CrcjaxError as error:
        print(f"crcjax serve: {error}", file=sys.stderr)
        # It is started again unless that would not help.
        return UNUSABLE if isinstance(error, InputError | OutputError) else 1
    _stop_with_the_service(server)
    with socket.socket(fileno=int(arguments[0])) as listener, service.log.timed_checkpoints():
        server.run([listener])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
