"""Turns pydantic's findings into one-line errors that name the field and the value given."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import InputError

T = TypeVar("T", bound="Record")


class Record(BaseModel):
    """Frozen, strictly checked settings object; unknown fields are refused.

    Raises:
        InputError: on construction, naming each offending field, what was given and what is expected.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise InputError(describe(type(self).__name__, error)) from None

    def replace(self: T, **changes: Any) -> T:
        """A changed copy, validated again."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)


def describe(owner: str, error: ValidationError) -> str:
    """One line a finding: `Owner.field: message (given: value)`."""
    lines = []
    for finding in error.errors():
        path = ".".join(str(part) for part in finding["loc"])
        message = finding["msg"].removeprefix("Value error, ")
        given = "" if finding["type"] in ("missing", "value_error") else f" (given: {finding['input']!r})"
        lines.append(f"{owner}{'.' + path if path else ''}: {message}{given}")
    return "; ".join(lines)
