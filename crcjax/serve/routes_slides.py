"""Endpoints of slides: resumable uploads, and slides by reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response
from pydantic import BaseModel, Field

from crcjax.serve.access import Caller, Requires, not_found, service_of
from crcjax.serve.permissions import Action
from crcjax.serve.slide_records import NewSlide, SlideRecord
from crcjax.serve.uploads import Upload

router = APIRouter(prefix="/v1", tags=["slides"])

CaseId = Annotated[str, Field(min_length=1, max_length=128, examples=["A-017"])]
Mpp = Annotated[float | None, Field(gt=0, le=20, description="µm per level-0 px, in place of the file's value")]


class NewUpload(BaseModel):
    """An upload to be begun."""

    name: Annotated[str, Field(min_length=1, max_length=255, examples=["A-017-1.svs"])]
    case_id: CaseId
    bytes: Annotated[int, Field(gt=0, examples=[1_500_000_000])]
    sha256: Annotated[
        str, Field(pattern="^([0-9a-fA-F]{64})?$", description="the file's SHA-256; checked at the end")
    ] = ""
    mpp: Mpp = None


class SlideReference(BaseModel):
    """A slide that lies in a folder of the site."""

    path: Annotated[str, Field(min_length=1, max_length=4096, examples=["/slides/A-017-1.svs"])]
    case_id: CaseId
    mpp: Mpp = None


class UploadView(BaseModel):
    """An upload that is not finished: the next chunk begins at `offset`."""

    id: str
    offset: int
    bytes: int


class SlideView(BaseModel):
    """A slide."""

    id: str
    case_id: str
    name: str
    bytes: int
    content: Annotated[str, Field(description="hash of the content")]
    mpp: float | None
    added_s: float


class UploadResult(BaseModel):
    """What a chunk led to: an upload that goes on, or a slide."""

    upload: UploadView | None = None
    slide: SlideView | None = None


def _upload_view(upload: Upload) -> UploadView:
    return UploadView(id=upload.id, offset=upload.offset, bytes=upload.bytes)


def _slide_view(slide: SlideRecord) -> SlideView:
    return SlideView(**{name: getattr(slide, name) for name in SlideView.model_fields})


@router.post("/uploads", status_code=201)
def begin_upload(
    body: NewUpload,
    request: Request,
    response: Response,
    caller: Annotated[Caller, Depends(Requires(Action.SLIDE_ADD))],
) -> UploadView:
    """Begins an upload; its chunks follow by PATCH."""
    new = NewSlide(caller.site, caller.account.name, body.case_id, Path(body.name).name, body.mpp)
    upload = service_of(request).uploads.begin(new, body.bytes, body.sha256)
    response.headers["Location"] = f"/v1/uploads/{upload.id}"
    return _upload_view(upload)


@router.get("/uploads/{upload_id}")
def upload(
    upload_id: str, request: Request, caller: Annotated[Caller, Depends(Requires(Action.SLIDE_ADD))]
) -> UploadResult:
    """Where an upload stands; once it is finished, its slide."""
    current = service_of(request).uploads.upload(upload_id)
    if current is not None:
        caller.check(current.new.site, current.new.owner)
        return UploadResult(upload=_upload_view(current))
    # An upload's slide has the upload's id.
    slide = service_of(request).slides.slide(upload_id)
    if slide is None:
        raise not_found()
    caller.check(slide.site, slide.owner)
    return UploadResult(slide=_slide_view(slide))


@router.patch(
    "/uploads/{upload_id}",
    openapi_extra={"requestBody": {"required": True, "content": {"application/octet-stream": {}}}},
)
async def append(
    upload_id: str,
    request: Request,
    response: Response,
    caller: Annotated[Caller, Depends(Requires(Action.SLIDE_ADD))],
    upload_offset: Annotated[int, Header(ge=0, description="where this chunk begins")],
) -> UploadResult:
    """Appends a chunk; with the last one, the file's SHA-256 is checked and the slide is added."""
    current = service_of(request).uploads.upload(upload_id)
    if current is None:
        raise not_found()
    caller.check(current.new.site, current.new.owner)
    after = await service_of(request).uploads.append(current, upload_offset, request.stream())
    if isinstance(after, SlideRecord):
        return UploadResult(slide=_slide_view(after))
    response.headers["Upload-Offset"] = str(after.offset)
    return UploadResult(upload=_upload_view(after))


@router.delete("/uploads/{upload_id}", status_code=204)
def discard(upload_id: str, request: Request, caller: Annotated[Caller, Depends(Requires(Action.SLIDE_ADD))]) -> None:
    """Ends an upload without a slide."""
    current = service_of(request).uploads.upload(upload_id)
    if current is None:
        raise not_found()
    caller.check(current.new.site, current.new.owner)
    service_of(request).uploads.discard(upload_id)


@router.post("/slides", status_code=201)
def add_reference(
    body: SlideReference, request: Request, caller: Annotated[Caller, Depends(Requires(Action.SLIDE_ADD))]
) -> SlideView:
    """Adds a slide that lies in a folder which the service offers to the caller's site; it is not copied."""
    new = NewSlide(caller.site, caller.account.name, body.case_id, Path(body.path).name, body.mpp)
    return _slide_view(service_of(request).slides.add_reference(new, body.path))


@router.get("/slides/{slide_id}")
def slide(
    slide_id: str, request: Request, caller: Annotated[Caller, Depends(Requires(Action.SLIDE_READ))]
) -> SlideView:
    """A slide."""
    known = service_of(request).slides.slide(slide_id)
    if known is None:
        raise not_found()
    caller.check(known.site, known.owner)
    return _slide_view(known)
