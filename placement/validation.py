"""What users give, checked: pydantic's findings as one-line errors that name the field and the value; ranges, shapes
of arrays, and seeds."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

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

    @property
    def left_out(self) -> set[str]:
        """Fields that are not written: younger than the files they stand in, and as releases that lack them have it."""
        return set()

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        left_out = self.left_out
        return {name: value for name, value in handler(self).items() if name not in left_out}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        # As without `_written`: the fields are what they are.
        return handler({name: value for name, value in schema.items() if name != "serialization"})

    def replace(self: T, **changes: Any) -> T:
        """A changed copy, validated again."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)


def describe(owner: str, error: ValidationError) -> str:
    """One line a finding: `Owner.field: message (given: value)`."""
    lines = []
    for finding in error.errors():
        path = ".".join(str(part) for part in finding["loc"])
        message = finding["msg"].removeprefix("Value error, ")
        value = "" if finding["type"] in ("missing", "value_error") else f" (given: {finding['input']!r})"
        lines.append(f"{owner}{'.' + path if path else ''}: {message}{value}")
    return "; ".join(lines)


def check_seed(seed: Any) -> int:
    """The seed, a whole number from 0 on.

    Raises:
        InputError: it is not.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise InputError(f"seed ({seed!r}) must be a whole number, 0 or more")
    return int(seed)


def check_range(name: str, value: float, least: float, most: float = math.inf) -> None:
    """Refuses numbers outside [least, most].

    Raises:
        InputError: it is outside.
    """
    if not least <= value <= most:
        expected = f"at least {least:,}" if most == math.inf else f"from {least:,} to {most:,}"
        raise InputError(f"{name} ({value}) must be {expected}")


def check_shape(name: str, array: npt.ArrayLike, expected: tuple[int | str, ...]) -> npt.NDArray[Any]:
    """The array, which has as many axes as are expected, of these lengths where they are numbers.

    Args:
        name: for the message. array: or nested sequences. expected: a length, or a letter where any will do.

    Raises:
        InputError: another shape, or entries that are not finite numbers.
    """
    try:
        result = np.asarray(array)
    except ValueError:
        raise InputError(f"{name}: rows differ in length") from None
    if result.dtype.kind not in "biuf" and result.size:
        raise InputError(f"{name} holds {result.dtype}, expected numbers")
    lengths = zip(result.shape, expected, strict=False)
    if result.ndim != len(expected) or any(length != size for length, size in lengths if isinstance(size, int)):
        shape = ", ".join(map(str, expected))
        raise InputError(f"{name} has shape {list(result.shape)}, expected [{shape}]")
    if result.dtype.kind == "f" and not np.isfinite(result).all():
        raise InputError(f"{name} holds numbers that are not finite")
    return result


def check_choice(name: str, choice: npt.ArrayLike, count: int) -> npt.NDArray[Any]:
    """The choice as an array that indexes `count` things: a mask [count], or indices in any order.

    Raises:
        InputError: neither, or an index that is not there.
    """
    result = np.asarray(choice)
    mask = result.dtype == bool and result.shape == (count,)
    indices = (result.dtype.kind in "iu" and result.ndim == 1) or result.shape == (0,)
    if not (mask or indices):
        text = " ".join(repr(choice).split())
        raise InputError(f"{name} is {text:.60}; expected a mask of {count:,} or indices")
    if not len(result):
        return np.zeros(0, np.int64)
    if indices and not -count <= result.min() <= result.max() < count:
        raise InputError(f"{name} holds {result.min()} to {result.max()}; there are {count:,}, from 0")
    return result


def generator(seed: int) -> np.random.Generator:
    """Draws of a seed: the same seed, the same draws.

    Raises:
        InputError: as `check_seed` does.
    """
    return np.random.default_rng(check_seed(seed))
