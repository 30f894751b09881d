"""Errors as problem details (RFC 9457), naming the field where there is one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ..placement.errors import ConflictError, InputError, MoeplaceError, NotFoundError, StoreError

log = logging.getLogger("moeplace.service")

CONTENT_TYPE = "application/problem+json"
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
    503: "not available now",
}
STATUS: tuple[tuple[type[MoeplaceError], int], ...] = (
    (NotFoundError, 404),
    (ConflictError, 409),
    (StoreError, 503),
    (InputError, 422),
    (MoeplaceError, 422),
)
"""The first that fits."""


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
    return JSONResponse(body, status, headers=dict(headers or {}), media_type=CONTENT_TYPE)


def refused(error: ValidationError | RequestValidationError, within: str = "") -> JSONResponse:
    """What pydantic found, a field each: `windows.0.load: message`."""
    found = []
    for entry in error.errors():
        parts = [str(part) for part in entry["loc"]]
        if parts[:1] == ["body"] and len(parts) > 1:
            parts = parts[1:]
        field = ".".join([*([within] if within else []), *parts]) or "body"
        message = str(entry["msg"]).removeprefix("Value error, ").encode(errors="backslashreplace").decode()
        found.append({"field": field, "message": message})
    return problem(422, "; ".join(f"{entry['field']}: {entry['message']}" for entry in found)[:4000], errors=found)


def install(app: FastAPI) -> None:
    """Makes every error of the application one of these."""

    @app.exception_handler(MoeplaceError)
    async def of_library(request: Request, error: MoeplaceError) -> JSONResponse:
        status = next(status for kind, status in STATUS if isinstance(error, kind))
        if status == 503:
            log.warning("store", extra={"path": request.url.path, "error": str(error)})
            return problem(status, str(error), headers={"Retry-After": "2"})
        return problem(status, str(error))

    @app.exception_handler(RequestValidationError)
    async def of_request(request: Request, error: RequestValidationError) -> JSONResponse:
        return refused(error)

    @app.exception_handler(ValidationError)
    async def of_body(request: Request, error: ValidationError) -> JSONResponse:
        return refused(error)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def of_us(request: Request, error: Exception) -> JSONResponse:
        log.error("unexpected error", exc_info=error, extra={"path": request.url.path})
        return problem(500, "the server failed; its log says how")
