"""Endpoints of the viewer: slides as Deep Zoom tiles, thumbnails and squares; a result's maps to be laid over them."""

# No postponed annotations: FastAPI reads those of `QuickRequires.__call__`.

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import asdict
from typing import Annotated, Any, Generic, TypeVar

import anyio.to_thread
from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response
from pydantic import BaseModel, Field

from crcjax.serve.access import COOKIE, Caller, Requires, not_found, service_of
from crcjax.serve.etags import answer_with_etag, has_etag
from crcjax.serve.overlays import OverlayMap, Overlays, overlays
from crcjax.serve.permissions import Action
from crcjax.serve.routes_predictions import done, slide_of
from crcjax.serve.service import Service
from crcjax.serve.slide_records import SlideRecord
from crcjax.serve.slide_tiles import ENCODING, SlideTiles

router = APIRouter(prefix="/v1", tags=["viewer"])

# A session that was ended, or a slide that was removed, is looked up again after this time.
_REMEMBERED_S = 1.0
_REMEMBERED = 10_000
_JPEG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/jpeg": {}}}}
_PNG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}}}
_XML = "application/xml"
_LARGEST = 1 << 31
Value = TypeVar("Value")


class ImageView(BaseModel):
    """A slide for a viewer: size in level-0 px, Deep Zoom tiles, µm per level-0 px."""

    width: int
    height: int
    tile_px: int
    max_level: Annotated[int, Field(description="the Deep Zoom level that is the slide's level 0")]
    mpp: float
    objective_power: float | None
    synthetic: bool


class MapView(BaseModel):
    """A map: its picture lies over `box` (left, top, width and height in level-0 px)."""

    id: str
    label: str
    kind: str
    scale: Annotated[float | None, Field(description="evidence in nats at the ends of the colours")]
    box: tuple[float, float, float, float]


class TileView(BaseModel):
    """A tile of a map: corner and side in level-0 px."""

    x: float
    y: float
    side: float
    value: float


class _Remembered(Generic[Value]):
    """Answers that hold for some seconds, and no longer than there is room for them."""

    def __init__(self, seconds: float = _REMEMBERED_S):
        self._seconds = seconds
        self._values: OrderedDict[Hashable, tuple[float, Value]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Value | None:
        """The answer, unless it is too old."""
        at, value = self._values.get(key, (-math.inf, None))
        return value if time.monotonic() - at < self._seconds else None

    def put(self, key: Hashable, value: Value) -> Value:
        """Remembers an answer, and returns it."""
        with self._lock:
            self._values.pop(key, None)
            self._values[key] = time.monotonic(), value
            while len(self._values) > _REMEMBERED:
                self._values.popitem(last=False)
        return value


class ViewerState:
    """What the viewer's endpoints share in one application."""

    def __init__(self, service: Service) -> None:
        self.tiles = SlideTiles(service.vault)
        self.callers: _Remembered[Caller] = _Remembered()
        self.records: _Remembered[SlideRecord] = _Remembered()
        # The slides that each session has looked at: the first look is logged.
        self.viewed: _Remembered[bool] = _Remembered(math.inf)


def _state(request: Request) -> ViewerState:
    return request.app.state.viewer


class QuickRequires(Requires):
    """`Requires` for tiles: who was permitted within the last second is permitted without another look-up."""

    async def __call__(self, request: Request) -> Caller:  # type: ignore[override]
        """Answers 401 without a valid token, 403 without the permission."""
        callers = _state(request).callers
        key = self.action, request.headers.get("authorization"), request.cookies.get(COOKIE)
        caller = callers.get(key) or callers.put(key, await anyio.to_thread.run_sync(super().__call__, request))
        request.state.account = caller.account
        return caller


def _record(request: Request, caller: Caller, slide_id: str) -> SlideRecord:
    record = service_of(request).slides.slide(slide_id)
    if record is None:
        raise not_found()
    caller.check(record.site, record.owner)
    return record


@router.get("/slides/{slide_id}/image_files/{level}/{column}_{row}.jpeg", response_class=Response, responses=_JPEG)
async def tile(
    slide_id: str,
    level: Annotated[int, Path(ge=0, le=63)],
    column: Annotated[int, Path(ge=0, le=_LARGEST)],
    row: Annotated[int, Path(ge=0, le=_LARGEST)],
    request: Request,
    caller: Annotated[Caller, Depends(QuickRequires(Action.SLIDE_READ))],
) -> Response:
    """A Deep Zoom tile: the slide's native JPEG tile where it fits. A session's first tile of a slide is logged."""
    state = _state(request)
    record = state.records.get(slide_id)
    if record is None:
        record = await anyio.to_thread.run_sync(_record, request, caller, slide_id)
        state.records.put(slide_id, record)
    caller.check(record.site, record.owner)
    if state.viewed.get((caller.token, slide_id)) is None:
        request.state.is_logged = state.viewed.put((caller.token, slide_id), True)
    # The content decides the tile, so that it need not be read for its ETag.
    etag = f'"{record.content[:32]}-{ENCODING}-{level}-{column}-{row}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if has_etag(request, etag):
        return Response(status_code=304, headers=headers)
    encoded = state.tiles.cached_tile(record, level, column, row)
    if encoded is None:
        encoded = await anyio.to_thread.run_sync(state.tiles.tile, record, level, column, row)
    return Response(encoded, headers=headers, media_type="image/jpeg")


@router.get("/slides/{slide_id}/image")
def image(
    slide_id: str, request: Request, caller: Annotated[Caller, Depends(Requires(Action.SLIDE_READ))]
) -> ImageView:
    """The size, tiles and resolution of a slide."""
    return ImageView(**asdict(_state(request).tiles.image(_record(request, caller, slide_id))))


@router.get("/slides/{slide_id}/image.dzi", response_class=Response, responses={200: {"content": {_XML: {}}}})
def deep_zoom(
    slide_id: str, request: Request, caller: Annotated[Caller, Depends(Requires(Action.SLIDE_READ))]
) -> Response:
    """The Deep Zoom description of a slide, for other viewers; its tiles lie under `image_files`."""
    shown = _state(request).tiles.image(_record(request, caller, slide_id))
    xml = (
        f'<?xml version="1.0" encoding="UTF-8"?><Image xmlns="http://schemas.microsoft.com/deepzoom/2008" Format="jpeg" '
        f'Overlap="0" TileSize="{shown.tile_px}"><Size Width="{shown.width}" Height="{shown.height}"/></Image>'
    )
    return answer_with_etag(request, xml.encode(), _XML)


@router.get("/slides/{slide_id}/thumbnail.jpeg", response_class=Response, responses=_JPEG)
def thumbnail(
    slide_id: str,
    request: Request,
    caller: Annotated[Caller, Depends(Requires(Action.SLIDE_READ))],
    max_px: Annotated[int, Query(ge=16, le=2048)] = 512,
) -> Response:
    """The whole slide, small. The label and macro pictures of the file are never served."""
    record = _record(request, caller, slide_id)
    return answer_with_etag(request, _state(request).tiles.thumbnail(record, max_px), "image/jpeg")


@router.get("/slides/{slide_id}/square.jpeg", response_class=Response, responses=_JPEG)
def square(
    slide_id: str,
    request: Request,
    caller: Annotated[Caller, Depends(Requires(Action.SLIDE_READ))],
    x: Annotated[int, Query(ge=-_LARGEST, le=_LARGEST, description="left, in level-0 px")],
    y: Annotated[int, Query(ge=-_LARGEST, le=_LARGEST, description="top, in level-0 px")],
    side: Annotated[int, Query(ge=1, le=_LARGEST, description="side in level-0 px")],
    px: Annotated[int, Query(ge=16, le=1024, description="side of the picture in px")] = 224,
) -> Response:
    """A square of the slide, such as a tile of `top-tiles`."""
    encoded = _state(request).tiles.square(_record(request, caller, slide_id), x, y, side, px)
    return answer_with_etag(request, encoded, "image/jpeg")


def _overlays(request: Request, caller: Caller, prediction_id: str, slide_id: str) -> Overlays:
    record, committed = done(request, caller, prediction_id)
    slide = slide_of(request, record, slide_id)
    service, token = service_of(request), committed["token"]
    maps = overlays(service.vault, service.results, record.job_id, token, slide.content, committed["classes"])
    if maps is None:
        raise HTTPException(404, "the slide has no prediction, so it has no maps; the result says why")
    return maps


def _map(maps: Overlays, map_id: str) -> OverlayMap:
    overlay = maps.map(map_id)
    if overlay is None:
        raise HTTPException(404, f"map must be one of {', '.join(known.id for known in maps.maps)}, got {map_id!r}")
    return overlay


@router.get("/predictions/{prediction_id}/slides/{slide_id}/maps")
def maps(
    prediction_id: str,
    slide_id: str,
    request: Request,
    caller: Annotated[Caller, Depends(Requires(Action.RESULT_READ))],
) -> list[MapView]:
    """The maps of a slide: attention and evidence by class, and the tiles that were not used."""
    return [MapView(**asdict(overlay)) for overlay in _overlays(request, caller, prediction_id, slide_id).maps]


@router.get("/predictions/{prediction_id}/slides/{slide_id}/maps/{map_id}.png", response_class=Response, responses=_PNG)
def map_png(
    prediction_id: str,
    slide_id: str,
    map_id: str,
    request: Request,
    caller: Annotated[Caller, Depends(Requires(Action.RESULT_READ))],
) -> Response:
    """The picture of a map, to be stretched over the map's box; transparent where it has no tile."""
    maps = _overlays(request, caller, prediction_id, slide_id)
    return answer_with_etag(request, maps.png(_map(maps, map_id)), "image/png")


@router.get("/predictions/{prediction_id}/slides/{slide_id}/maps/{map_id}/top-tiles")
def top_tiles(
    prediction_id: str,
    slide_id: str,
    map_id: str,
    request: Request,
    caller: Annotated[Caller, Depends(Requires(Action.RESULT_READ))],
    count: Annotated[int, Query(ge=1, le=100)] = 12,
) -> list[TileView]:
    """The tiles with the largest values of a map, in order."""
    maps = _overlays(request, caller, prediction_id, slide_id)
    return [TileView(**asdict(tile)) for tile in maps.top_tiles(_map(maps, map_id), count)]
