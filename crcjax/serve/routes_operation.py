"""Endpoints of operation: models, the log, health and metrics, and the page."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from crcjax import __version__
from crcjax.monitor.event_log import events_from
from crcjax.serve.access import Caller, Requires, not_found, service_of
from crcjax.serve.etags import answer_with_etag
from crcjax.serve.permissions import EVERY_SITE, Action
from crcjax.serve.queue import Status
from crcjax.serve.service import LOG
from crcjax.serve.viewer_library import INSTALL

router = APIRouter(prefix="/v1", tags=["operation"])
public = APIRouter(tags=["operation"])

# A request reads at most so much of the log: the entries of a small site may lie far apart.
_LOG_BYTES = 8 << 20
_PAGE_FILES = {
    "": "text/html",
    "page.css": "text/css",
    **dict.fromkeys(
        ("page.js", "server.js", "worklist.js", "result.js", "sign.js", "viewer.js", "accounts.js"), "text/javascript"
    ),
}
_VIEWER_SCRIPT = "openseadragon.js"


class ModelView(BaseModel):
    """A bundle that predicts, and its alias: production, canary or shadow."""

    alias: str
    bundle_id: str
    target: str
    classes: list[str]
    card: str
    crcjax: str


class LogPage(BaseModel):
    """Entries of the log, oldest first; `next` is the `after` of the following page, which may be empty before the end."""

    items: list[dict[str, Any]]
    next: int | None


@router.get("/models")
def models(request: Request, caller: Annotated[Caller, Depends(Requires(Action.MODEL_READ))]) -> list[ModelView]:
    """The models that predict, with their cards."""
    return [
        ModelView(
            alias=alias,
            bundle_id=bundle.id,
            target=bundle.target,
            classes=list(bundle.classes),
            card=bundle.card,
            crcjax=__version__,
        )
        for alias, bundle in service_of(request).bundles().items()
    ]


@router.get("/log")
def log(
    request: Request,
    caller: Annotated[Caller, Depends(Requires(Action.LOG_READ))],
    after: Annotated[int, Query(ge=0, le=2**62, description="`next` of the page before")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
) -> LogPage:
    """The hash-chained log of the caller's site: who asked for what, and how it was answered."""
    items: list[dict[str, Any]] = []
    end = after
    for event, end in events_from(service_of(request).folder / LOG, after):
        if caller.site in (event.facts.get("site"), EVERY_SITE):
            items.append(vars(event))
        if len(items) == limit or end - after > _LOG_BYTES:
            return LogPage(items=items, next=end)
    return LogPage(items=items, next=None)


@router.api_route("/{rest:path}", methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
def unknown(rest: str, caller: Annotated[Caller, Depends(Requires(Action.OWN_ACCOUNT))]) -> None:
    """Without a token, also a path that does not exist answers 401."""
    raise not_found()


@public.get("/livez")
def livez() -> dict[str, str]:
    """The process answers."""
    return {"status": "alive"}


@public.get("/readyz")
def readyz(request: Request) -> JSONResponse:
    """503 until a worker has loaded the bundle, and when none is alive."""
    workers = service_of(request).live_workers()
    return JSONResponse({"status": "ready" if workers else "no worker", "workers": workers}, 200 if workers else 503)


@public.get("/metrics", response_class=Response)
def metrics(request: Request) -> Response:
    """Metrics for Prometheus; they name no person and no case."""
    service, gauges = service_of(request), request.app.state.metrics
    stats = service.stats()
    for status in Status:
        gauges.jobs.labels(status).set(stats.counts.get(status, 0))
    gauges.oldest_queued_s.set(stats.oldest_queued_s)
    gauges.workers.set(service.live_workers())
    gauges.model.update(service)
    return Response(gauges.text(), media_type=CONTENT_TYPE_LATEST)


@public.get("/", include_in_schema=False)
@public.get("/{name}", include_in_schema=False)
def page(request: Request, name: str = "") -> Response:
    """The page and its files."""
    if name == _VIEWER_SCRIPT:
        script = request.app.state.viewer_script
        if script is None:
            raise HTTPException(404, f"the zooming viewer is not installed; install it: {INSTALL}")
        return answer_with_etag(request, script, "text/javascript")
    if name not in _PAGE_FILES:
        raise not_found()
    content = (files("crcjax.serve") / "page" / (name or "page.html")).read_bytes()
    return Response(content, media_type=_PAGE_FILES[name])
