"""Errors as RFC 9457 problem details: no paths of the server, no traces."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from crcjax.encryption.frames import DecryptionError
from crcjax.errors import OutputError
from crcjax.monitor.logs import log
from crcjax.serve.accounts import AccountError, BlockedError, SignInError
from crcjax.serve.oidc import NoRoleError, ProviderUnavailableError
from crcjax.serve.prediction_records import KeyReusedError, RequestRefusedError
from crcjax.serve.queue import QueueFullError, QueueUnavailableError
from crcjax.serve.rate_limits import TooManyRequestsError
from crcjax.serve.signatures import SignatureConflictError, SignatureRefusedError
from crcjax.serve.slide_records import SlideRefusedError
from crcjax.serve.slide_tiles import NoSuchTileError, SlideUnreadableError
from crcjax.serve.uploads import NoRoomError, OffsetError

CONTENT_TYPE = "application/problem+json"
# Seconds after which a client may try again when the service cannot write.
_RETRY_S = 10
_STATUS: Mapping[type[Exception], int] = {
    SignInError: 401,
    BlockedError: 429,
    NoRoleError: 403,
    ProviderUnavailableError: 503,
    AccountError: 422,
    SlideRefusedError: 422,
    SlideUnreadableError: 422,
    NoSuchTileError: 404,
    RequestRefusedError: 422,
    KeyReusedError: 422,
    SignatureRefusedError: 422,
    SignatureConflictError: 409,
    OffsetError: 409,
    DecryptionError: 503,
    NoRoomError: 507,
    QueueFullError: 429,
    TooManyRequestsError: 429,
}


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None, **extensions: Any) -> JSONResponse:
    """A response that describes an error."""
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return JSONResponse(content | extensions, status, dict(headers or {}), media_type=CONTENT_TYPE)


def add_handlers(app: FastAPI) -> None:
    """Has the application answer every error with a problem."""
    for error_type in _STATUS:
        app.add_exception_handler(error_type, _known)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(OutputError, _cannot_write)
    app.add_exception_handler(sqlite3.OperationalError, _cannot_write)
    app.add_exception_handler(QueueUnavailableError, _cannot_write)
    app.add_exception_handler(Exception, _unexpected)


def _known(request: Request, error: Exception) -> JSONResponse:
    headers = {}
    if isinstance(error, SignInError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, QueueFullError | BlockedError | TooManyRequestsError):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, ProviderUnavailableError):
        headers["Retry-After"] = str(_RETRY_S)
    if isinstance(error, OffsetError):
        headers["Upload-Offset"] = str(error.offset)
    return problem(_STATUS[type(error)], str(error), headers)


def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, error.detail, error.headers)


def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    # The values are left out: they may be passwords.
    errors = [{"field": ".".join(map(str, item["loc"])), "message": item["msg"]} for item in error.errors()]
    detail = "; ".join(f"{item['field']}: {item['message']}" for item in errors)
    return problem(422, detail, errors=errors)


def _cannot_write(request: Request, error: Exception) -> JSONResponse:
    log.error(f"{request.method} {request.url.path}: {error}")
    return problem(503, "the service cannot write now; nothing was accepted; try again", {"Retry-After": str(_RETRY_S)})


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error(f"{request.method} {request.url.path}: {type(error).__name__}", exc_info=error)
    return problem(500, "an error of the service; its administrator finds it in the service's output")
