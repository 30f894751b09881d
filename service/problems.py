"""Errors as problem details (RFC 9457), naming the field where there is one; browsers get them as pages."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ..db.database import ForbiddenError, RefusedDataError
from ..db.jobs import QuotaError
from ..placement.errors import ConflictError, InputError, MoeplaceError, NotFoundError, StoreError
from .pages.templating import error_page, wants_page
from .schemas import FieldsError, fields_of

SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
}
"""What browsers are told of every answer."""

log = logging.getLogger("moeplace.service")

CONTENT_TYPE = "application/problem+json"
GONE = 499
"""Noted for who left before all of a request came."""
TITLES = {
    400: "malformed request",
    401: "no valid token",
    403: "not allowed",
    404: "not found",
    405: "method not allowed",
    409: "conflict",
    412: "changed meanwhile",
    413: "too large",
    415: "unsupported content type",
    422: "invalid input",
    429: "too many requests",
    500: "internal error",
    501: "not supported",
    503: "not available now",
}
STATUS: tuple[tuple[type[MoeplaceError], int], ...] = (
    (NotFoundError, 404),
    (ConflictError, 409),
    (ForbiddenError, 403),
    (QuotaError, 429),
    (RefusedDataError, 422),
    (StoreError, 503),
    (InputError, 422),
    (MoeplaceError, 422),
)
"""The first that fits."""


class Problem(JSONResponse):
    """Says what is wrong, to programs and to browsers each in their way."""

    def __init__(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        # Set here and not only by `Observe`: what answers an unexpected error runs outside of it.
        self._body, self._extra = body, {**SAFE_HEADERS, **headers, "Vary": "Accept"}
        super().__init__(body, body["status"], headers=self._extra, media_type=CONTENT_TYPE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.status_code < 400 or not wants_page(scope):
            await super().__call__(scope, receive, send)
            return
        title, detail = self._body["title"], self._body["detail"]
        await error_page(scope, self.status_code, title, detail, self._extra)(scope, receive, send)


def problem(
    status: int, detail: str, *, errors: Sequence[Mapping[str, str]] = (), headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """A response that says what is wrong. errors: a field and a message each."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": TITLES.get(status, "error"),
        "status": status,
        # What cannot be encoded came from the request; it is shown, not passed on.
        "detail": detail.encode(errors="backslashreplace").decode(),
    }
    if errors:
        body["errors"] = [dict(entry) for entry in errors]
    return Problem(body, headers or {})


def refused(fields: Sequence[Mapping[str, str]]) -> JSONResponse:
    """The answer that names them."""
    return problem(422, str(FieldsError(fields)), errors=fields)


def install(app: FastAPI) -> None:
    """Makes every error of the application one of these."""

    @app.exception_handler(MoeplaceError)
    async def of_library(request: Request, error: MoeplaceError) -> JSONResponse:
        if isinstance(error, FieldsError):
            return refused(error.fields)
        status = next(status for kind, status in STATUS if isinstance(error, kind))
        if status == 503:
            log.warning("store", extra={"path": request.url.path, "error": str(error)})
            return problem(status, str(error), headers={"Retry-After": "2"})
        return problem(status, str(error), headers={"Retry-After": "60"} if status == 429 else None)

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def of_values(request: Request, error: ValidationError | RequestValidationError) -> JSONResponse:
        return refused(fields_of(error))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(ClientDisconnect)
    async def of_nobody(request: Request, error: ClientDisconnect) -> Response:
        # No failure of this server's, and nobody is left to read why.
        return Response(status_code=GONE)

    @app.exception_handler(Exception)
    async def of_us(request: Request, error: Exception) -> JSONResponse:
        log.error("unexpected error", exc_info=error, extra={"path": request.url.path})
        return problem(500, "the server failed; its log says how")
