"""Endpoints of predictions: requests, status, events, cancelling, and results."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from crcjax.errors import CrcjaxError
from crcjax.serve.access import Caller, Requires, not_found, service_of
from crcjax.serve.etags import answer_with_etag
from crcjax.serve.permissions import Action, reach
from crcjax.serve.prediction_records import PredictionRecord
from crcjax.serve.queue import Job, Priority, Status
from crcjax.serve.results import heatmap, regions_geojson
from crcjax.serve.service import Service
from crcjax.serve.signatures import Meaning, Signature, result_hash
from crcjax.serve.slide_records import SlideRecord

router = APIRouter(prefix="/v1", tags=["predictions"])

_EVENT_POLL_S = 0.5
# A comment line at least this often, so that proxies do not close a quiet connection.
_EVENT_QUIET_S = 15.0


class NewPrediction(BaseModel):
    """A case to be predicted."""

    slides: Annotated[list[str], Field(min_length=1, max_length=64, description="ids of slides of one case")]
    urgent: Annotated[bool, Field(description="before all routine cases")] = False


class SignedView(BaseModel):
    """The newest signature of a result: who made which call."""

    version: int
    meaning: Meaning
    calls: list[str]
    signer: str
    signed_s: float


class PredictionView(BaseModel):
    """Where a prediction stands."""

    id: str
    case_id: str
    slides: list[str]
    urgent: bool
    status: Status
    position: Annotated[int | None, Field(description="jobs ahead of it, while it is queued")]
    expected_s: Annotated[float | None, Field(description="estimated seconds until it starts, while it is queued")]
    progress: Annotated[float, Field(ge=0, le=1)]
    stage: str
    tries: int
    bundle_id: Annotated[str, Field(description="the bundle that was chosen; the result names the one that predicted")]
    reason: Annotated[str, Field(description="why it failed, was quarantined, or is tried again")]
    requested_s: float
    started_s: float | None
    ended_s: float | None
    calls: Annotated[list[str], Field(description="the predicted class of each slide once it is done")]
    qc: Annotated[list[str], Field(description="the quality-control result of each slide")]
    entropies: Annotated[list[float | None], Field(description="the entropy of each slide's probabilities, in nats")]
    signed: Annotated[SignedView | None, Field(description="the newest signature of the result")]


class PredictionPage(BaseModel):
    """Predictions, newest first; `next` is the `before` of the following page."""

    items: list[PredictionView]
    next: int | None


def _view(
    service: Service, record: PredictionRecord, signatures: Mapping[str, Signature] | None = None
) -> PredictionView:
    if signatures is None:
        signatures = service.signatures.newest([record.id])
    job = service.queue.job(record.job_id)
    if job is None:
        raise HTTPException(410, "the queue has lost this prediction; ask for it again")
    # Others may still wait for the job of a request that was cancelled.
    is_cancelled = record.is_cancelled and job.status != Status.DONE
    rows = job.result["slides"] if job.result else []
    return PredictionView(
        id=record.id,
        case_id=record.case_id,
        slides=list(record.slides),
        urgent=job.priority == Priority.URGENT,
        status=Status.CANCELLED if is_cancelled else job.status,
        position=None if is_cancelled else job.position,
        expected_s=None if is_cancelled else _expected_s(service, job),
        progress=job.progress,
        stage=job.stage,
        tries=job.tries,
        bundle_id=record.bundle_id,
        reason=job.reason,
        requested_s=record.requested_s,
        started_s=job.started_s,
        ended_s=job.ended_s,
        calls=[row["call"] for row in rows],
        qc=[row.get("qc_verdict", "") for row in rows],
        entropies=[row.get("entropy") for row in rows],
        signed=_signed_view(signatures.get(record.id)),
    )


def _signed_view(signature: Signature | None) -> SignedView | None:
    if signature is None:
        return None
    facts = {name: getattr(signature, name) for name in ("version", "meaning", "signer", "signed_s")}
    return SignedView(**facts, calls=list(signature.calls))


def _expected_s(service: Service, job: Job) -> float | None:
    mean_job_s = service.stats().mean_job_s
    if job.position is None or mean_job_s is None:
        return None
    return (job.position + 1) * mean_job_s / max(1, service.live_workers())


@router.post("/predictions", status_code=202)
def request_prediction(
    body: NewPrediction,
    request: Request,
    response: Response,
    caller: Annotated[Caller, Depends(Requires(Action.PREDICTION_REQUEST))],
    idempotency_key: Annotated[str | None, Header(max_length=128)] = None,
) -> PredictionView:
    """Queues the prediction of a case; it is durable when the reply arrives. With a full queue the answer is 429."""
    service = service_of(request)
    slides: list[SlideRecord] = []
    for slide_id in body.slides:
        slide = service.slides.slide(slide_id)
        if slide is None:
            raise not_found()
        caller.check(slide.site, slide.owner)
        slides.append(slide)
    if body.urgent and reach(caller.account.role, Action.PREDICTION_URGENT) is None:
        raise HTTPException(403, f"the role {caller.account.role} may not ask for urgent predictions")
    priority = Priority.URGENT if body.urgent else Priority.ROUTINE
    record = service.predictions.request(caller.account.name, slides, priority, idempotency_key)
    response.headers["Location"] = f"/v1/predictions/{record.id}"
    return _view(service, record)


@router.get("/predictions")
def worklist(
    request: Request,
    caller: Annotated[Caller, Depends(Requires(Action.PREDICTION_READ))],
    before: Annotated[int | None, Query(description="`next` of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> PredictionPage:
    """The predictions of the caller's site, or the caller's own, newest first."""
    service = service_of(request)
    owner = caller.account.name if caller.reaches_own_only else None
    records = service.predictions.worklist(caller.site, owner, before, limit)
    signatures = service.signatures.newest([record.id for record in records])
    items = [_view(service, record, signatures) for record in records]
    return PredictionPage(items=items, next=records[-1].sequence if len(records) == limit else None)


def _record(request: Request, caller: Caller, prediction_id: str) -> PredictionRecord:
    record = service_of(request).predictions.prediction(prediction_id)
    if record is None:
        raise not_found()
    caller.check(record.site, record.owner)
    return record


@router.get("/predictions/{prediction_id}")
def prediction(
    prediction_id: str, request: Request, caller: Annotated[Caller, Depends(Requires(Action.PREDICTION_READ))]
) -> PredictionView:
    """Where a prediction stands, with its position in the queue."""
    return _view(service_of(request), _record(request, caller, prediction_id))


@router.post("/predictions/{prediction_id}/cancel")
def cancel(
    prediction_id: str, request: Request, caller: Annotated[Caller, Depends(Requires(Action.PREDICTION_CANCEL))]
) -> PredictionView:
    """Cancels a prediction that is not finished. Another request for the same result still gets it."""
    service, record = service_of(request), _record(request, caller, prediction_id)
    service.predictions.cancel(record)
    return _view(service, _record(request, caller, prediction_id))


@router.get(
    "/predictions/{prediction_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
)
def events(
    prediction_id: str, request: Request, caller: Annotated[Caller, Depends(Requires(Action.PREDICTION_READ))]
) -> StreamingResponse:
    """Server-sent events: the status at once, after each change, and at the end, which closes the stream."""
    record = _record(request, caller, prediction_id)
    return StreamingResponse(_events(service_of(request), record, caller.token), media_type="text/event-stream")


async def _events(service: Service, record: PredictionRecord, token: str) -> AsyncIterator[str]:
    last, sent = "", time.monotonic()

    def current() -> PredictionView | None:
        try:
            service.session(token)
        except CrcjaxError:
            return None
        return _view(service, service.predictions.prediction(record.id) or record)

    while (view := await anyio.to_thread.run_sync(current)) is not None:
        # The estimate changes without an event.
        text = view.model_dump_json(exclude={"expected_s"})
        if text != last:
            last, sent = text, time.monotonic()
            yield f"event: status\ndata: {view.model_dump_json()}\n\n"
        elif time.monotonic() - sent > _EVENT_QUIET_S:
            sent = time.monotonic()
            yield ": nothing new\n\n"
        if view.status.is_final:
            return
        await asyncio.sleep(_EVENT_POLL_S)


def done(request: Request, caller: Caller, prediction_id: str) -> tuple[PredictionRecord, dict[str, Any]]:
    """A prediction and its result; answers 409 without one."""
    record = _record(request, caller, prediction_id)
    job = service_of(request).queue.job(record.job_id)
    if job is None or job.result is None:
        status = job.status if job else "lost"
        raise HTTPException(409, f"the prediction is {status} and has no result")
    return record, dict(job.result)


def slide_of(request: Request, record: PredictionRecord, slide_id: str) -> SlideRecord:
    """A slide of a prediction."""
    slide = service_of(request).slides.slide(slide_id) if slide_id in record.slides else None
    if slide is None:
        raise not_found()
    return slide


@router.get("/predictions/{prediction_id}/result")
def result(
    prediction_id: str, request: Request, caller: Annotated[Caller, Depends(Requires(Action.RESULT_READ))]
) -> Response:
    """The result: for each slide the predicted class, probabilities, uncertainties and quality control."""
    record, committed = done(request, caller, prediction_id)
    rows = [
        {"id": slide_id, **{name: value for name, value in row.items() if name not in ("slide_id", "case_id")}}
        for slide_id, row in zip(record.slides, committed["slides"], strict=True)
    ]
    shown = {name: committed[name] for name in ("target", "classes", "bundle_id")}
    content = {"prediction": record.id, "case_id": record.case_id, **shown, "slides": rows, "use": "research use only"}
    # What a signature refers to.
    content["sha256"] = result_hash(record.id, committed)
    return answer_with_etag(request, json.dumps(content).encode(), "application/json")


@router.get("/predictions/{prediction_id}/slides/{slide_id}/heatmap.png")
def heatmap_png(
    prediction_id: str,
    slide_id: str,
    request: Request,
    caller: Annotated[Caller, Depends(Requires(Action.RESULT_READ))],
) -> Response:
    """The slide beside its copy coloured by attention."""
    record, committed = done(request, caller, prediction_id)
    slide = slide_of(request, record, slide_id)
    service = service_of(request)
    png = heatmap(service.vault, service.results, record.job_id, committed["token"], slide.content)
    if png is None:
        raise HTTPException(404, "the slide has no prediction, so there is no heatmap; the result says why")
    return answer_with_etag(request, png, "image/png")


@router.get("/predictions/{prediction_id}/slides/{slide_id}/regions.geojson")
def regions(
    prediction_id: str,
    slide_id: str,
    request: Request,
    caller: Annotated[Caller, Depends(Requires(Action.RESULT_READ))],
) -> Response:
    """The slide's regions with attention and attribution, in level-0 px, for QuPath and others."""
    record, committed = done(request, caller, prediction_id)
    slide = slide_of(request, record, slide_id)
    service = service_of(request)
    collection = regions_geojson(service.vault, service.results, record.job_id, committed["token"], slide.content)
    if collection is None:
        raise HTTPException(404, "the slide has no prediction, so it has no regions; the result says why")
    return answer_with_etag(request, json.dumps(collection).encode(), "application/geo+json")
