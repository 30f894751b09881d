"""Values that are refused, each named by its field; without anything of the web, since reading processes tell them
too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..placement.errors import InputError

MOST_FIELDS, MOST_FIELD = 100, 300
"""Of one answer: fields that are named, and characters of a name."""


class Refusal(Protocol):
    """What pydantic and FastAPI raise."""

    def errors(self) -> Sequence[Any]: ...


class FieldsError(InputError):
    """Values that are refused: a field and a message each."""

    def __init__(self, fields: Sequence[Mapping[str, str]]) -> None:
        super().__init__("; ".join(f"{entry['field']}: {entry['message']}" for entry in fields)[:4000])
        self.fields = fields


def fields_of(error: Refusal) -> list[dict[str, str]]:
    """What pydantic refuses, a field each: `windows.0.load`, and why."""
    fields = []
    for entry in error.errors()[:MOST_FIELDS]:
        parts = [str(part) for part in entry["loc"]]
        if parts[:1] == ["body"] and len(parts) > 1:
            parts = parts[1:]
        field = ".".join(parts)[:MOST_FIELD] or "body"
        message = str(entry["msg"]).removeprefix("Value error, ").encode(errors="backslashreplace").decode()
        fields.append({"field": field, "message": message})
    return fields
