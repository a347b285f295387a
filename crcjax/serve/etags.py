"""Answers with an ETag: a client that has the content gets 304, after the permission was checked."""

from __future__ import annotations

import hashlib

from fastapi import Request, Response


def has_etag(request: Request, etag: str) -> bool:
    """Whether the client says that it has the content of an ETag."""
    return etag in [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]


def answer_with_etag(request: Request, content: bytes, media_type: str) -> Response:
    """The content with its ETag, or 304 if the client has it."""
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if has_etag(request, etag):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)
