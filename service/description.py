"""The OpenAPI description, with the schemas that routes refer to by name because they read or write bytes themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from .counts import WindowsIn
from .routes.common import Problem


def describe(app: FastAPI) -> None:
    """Completes what FastAPI finds out by itself."""
    found = app.openapi

    def complete() -> dict[str, Any]:
        document = found()
        _, named = models_json_schema(
            [(WindowsIn, "validation"), (Problem, "serialization")], ref_template="#/components/schemas/{model}"
        )
        document["components"]["schemas"] |= named["$defs"]
        return document

    app.openapi = complete  # type: ignore[method-assign]
