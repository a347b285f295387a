"""The HTTP application: routes, headers, metrics, and the log entry that precedes each reply."""

from __future__ import annotations

import os
import re
import time
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, HTTPException
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crcjax import __version__
from crcjax.errors import OutputError
from crcjax.monitor.logs import log
from crcjax.serve import (
    problems,
    routes_accounts,
    routes_operation,
    routes_predictions,
    routes_signatures,
    routes_slides,
    routes_viewer,
)
from crcjax.serve.model_metrics import ModelMetrics
from crcjax.serve.service import Service
from crcjax.serve.viewer_library import STYLE_SHA256

_HEADERS = {
    "strict-transport-security": "max-age=31536000",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": (
        f"default-src 'self'; img-src 'self' blob:; style-src 'self' '{STYLE_SHA256}'; object-src 'none'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    ),
}
ROUTERS = (
    # Tiles are asked for most: their route is compared first.
    routes_viewer.router,
    routes_accounts.public,
    routes_accounts.router,
    routes_slides.router,
    routes_predictions.router,
    routes_signatures.router,
    # Its last route answers for every other path of the API.
    routes_operation.router,
    routes_operation.public,
)
_MAX_BODY_BYTES = 1 << 20
# prometheus_client looks for this variable when it is imported, and then counts in files of that folder.
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
# The ids that this service gives out.
_IDENTIFIER = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Answers to these are logged only if they are errors, or the endpoint says so: pages and clients ask for them every second.
_POLLED = (
    "/v1/predictions",
    "/v1/predictions/{prediction_id}",
    "/v1/predictions/{prediction_id}/events",
    "/v1/me",
    "/v1/models",
    "/v1/uploads/{upload_id}",
    "/v1/slides/{slide_id}/image_files/{level}/{column}_{row}.jpeg",
)


class Metrics:
    """The metrics of this process; `text` adds those of the other replicas."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "endpoint")
        self.requests = Counter("crcjax_requests", "Requests", (*labels, "status"), registry=self.registry)
        self.seconds = Histogram("crcjax_request_seconds", "Time to the first byte", labels, registry=self.registry)
        # Each process sets these for all, just before they are read.
        newest: Any = {"registry": self.registry, "multiprocess_mode": "mostrecent"}
        self.jobs = Gauge("crcjax_jobs", "Jobs in the queue", ("status",), **newest)
        self.oldest_queued_s = Gauge("crcjax_oldest_queued_seconds", "Age of the oldest queued job", **newest)
        self.workers = Gauge("crcjax_workers", "Workers that are alive", **newest)

        self.model = ModelMetrics(self.registry)

    def text(self) -> bytes:
        """The metrics in Prometheus' format."""
        if METRICS_VARIABLE not in os.environ:
            return generate_latest(self.registry)
        shared = CollectorRegistry()
        MultiProcessCollector(shared)
        return generate_latest(shared)


def create_app(service: Service, viewer_script: bytes | None = None) -> FastAPI:
    """The application over an open state folder; the page's zooming viewer is a script that is installed apart."""
    app = FastAPI(
        title="crcjax",
        version=__version__,
        summary="Molecular subtype of colorectal cancer from whole-slide images. Research use only.",
        # The interactive pages would load scripts from another site.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service, app.state.metrics = service, Metrics()
    app.state.viewer, app.state.viewer_script = routes_viewer.ViewerState(service), viewer_script
    for router in ROUTERS:
        app.include_router(router)
    problems.add_handlers(app)
    app.add_middleware(_Recorded, service=service, metrics=app.state.metrics)
    return app


class _Recorded:
    """Adds headers, counts, and writes the log before the reply begins; a reply that cannot be logged is not sent."""

    def __init__(self, app: ASGIApp, service: Service, metrics: Metrics):
        self._app, self._service, self._metrics = app, service, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, refused = time.monotonic(), False
        scope.setdefault("state", {})

        async def recorded_send(message: Message) -> None:
            nonlocal refused
            if refused:
                return
            if message["type"] == "http.response.start":
                self._count(scope, message["status"], time.monotonic() - begun)
                try:
                    await self._log(scope, message["status"])
                except OutputError as error:
                    refused = True
                    log.error(str(error))
                    response = problems.problem(
                        503, "the log cannot be written, so that nothing is answered; try again"
                    )
                    await response(scope, receive, send)
                    return
                present = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in present),
                ]
            await send(message)

        is_upload = scope["method"] == "PATCH" and scope["path"].startswith("/v1/uploads/")
        await self._app(scope, receive if is_upload else _limited(receive), recorded_send)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        endpoint = _endpoint(scope)
        self._metrics.requests.labels(scope["method"], endpoint, status).inc()
        self._metrics.seconds.labels(scope["method"], endpoint).observe(seconds)

    async def _log(self, scope: Scope, status: int) -> None:
        endpoint = _endpoint(scope)
        is_polled = scope["method"] in ("GET", "HEAD") and endpoint in _POLLED and status < 400
        is_logged = scope["state"].get("is_logged", not is_polled)
        if not scope["path"].startswith("/v1/") or not is_logged:
            return
        account = scope["state"].get("account")
        facts: dict[str, Any] = {
            "method": scope["method"],
            "endpoint": endpoint,
            "objects": {name: _identifier(value) for name, value in scope.get("path_params", {}).items()},
            "status": status,
            "account": account.name if account else "",
            "role": account.role if account else "",
            "site": account.site if account else "",
            **scope["state"].get("details", {}),
        }
        await anyio.to_thread.run_sync(lambda: self._service.log.append("request", **facts))


def _limited(receive: Receive) -> Receive:
    """Ends a request whose body is larger than any that is not an upload."""
    received = 0

    async def limited_receive() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > _MAX_BODY_BYTES:
            raise HTTPException(413, f"the body must have at most {_MAX_BODY_BYTES} bytes; slides are sent as uploads")
        return message

    return limited_receive


def _identifier(value: str) -> str:
    """A value of a path as the log may hold it: anybody can send a path that names a patient."""
    return value if _IDENTIFIER.fullmatch(value) else "?"


def _endpoint(scope: Scope) -> str:
    """The path as the API declares it, which names no object."""
    route = scope.get("route")
    return getattr(route, "path", "unknown")
