"""Endpoints of signatures: a pathologist signs a result, and everyone who may read it sees who did."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Request
from pydantic import BaseModel, Field

from crcjax.serve.access import Caller, Requires, service_of
from crcjax.serve.accounts import SignInError
from crcjax.serve.permissions import Action
from crcjax.serve.routes_predictions import done
from crcjax.serve.signatures import Meaning, Signature, are_intact, result_hash

router = APIRouter(prefix="/v1", tags=["signatures"])

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class NewSignature(BaseModel):
    """A signature to be made; the password and a one-time code prove once more who signs."""

    result_sha256: Annotated[Digest, Field(description="`sha256` of the result that the signer saw")]
    after_version: Annotated[int, Field(ge=0, le=10_000, description="the newest version that the signer saw")] = 0
    call: Annotated[
        str | None,
        Field(max_length=256, description="another class, or `not evaluable`; without it, the signer agrees"),
    ] = None
    reason: Annotated[str, Field(max_length=4000, description="of another call, and of every correction")] = ""
    password: Annotated[str, Field(max_length=1024)]
    code: Annotated[str, Field(max_length=16, description="the one-time code")]


class SignatureView(BaseModel):
    """One version of the signature of a prediction."""

    prediction: str
    version: int
    meaning: Meaning
    statement: str
    calls: list[str]
    reason: str
    signer: str
    signed_s: float
    result_sha256: str
    previous_sha256: str
    sha256: str


class SignatureHistory(BaseModel):
    """All versions, oldest first, and whether they are unchanged and of the result as it is now."""

    versions: list[SignatureView]
    is_intact: bool


def _view(signature: Signature) -> SignatureView:
    return SignatureView(**{**vars(signature), "calls": list(signature.calls), "statement": signature.meaning.text})


@router.post("/predictions/{prediction_id}/signatures", status_code=201)
def sign(
    prediction_id: str,
    body: NewSignature,
    request: Request,
    caller: Annotated[Caller, Depends(Requires(Action.RESULT_SIGN))],
) -> SignatureView:
    """Signs a result, records another call, or corrects an earlier signature by a new version."""
    service = service_of(request)
    record, committed = done(request, caller, prediction_id)
    if not caller.account.has_totp:
        raise HTTPException(403, "signing needs a second factor; set one up: POST /v1/me/totp")
    try:
        service.accounts.prove(caller.account.name, body.password, body.code)
    except SignInError as error:
        # 403, not 401: the session is still good.
        raise HTTPException(403, "password or one-time code is wrong; each code works once") from error
    signature = service.signatures.sign(
        record.id,
        committed,
        site=record.site,
        signer=caller.account.name,
        result_sha256=body.result_sha256,
        after_version=body.after_version,
        call=body.call,
        reason=body.reason,
    )
    return _view(signature)


@router.get("/predictions/{prediction_id}/signatures")
def signatures(
    prediction_id: str, request: Request, caller: Annotated[Caller, Depends(Requires(Action.RESULT_READ))]
) -> SignatureHistory:
    """Who signed a result, when, with which meaning: all versions."""
    record, committed = done(request, caller, prediction_id)
    versions = service_of(request).signatures.versions(record.id)
    return SignatureHistory(
        versions=[_view(version) for version in versions],
        is_intact=are_intact(versions, result_hash(record.id, committed)),
    )
