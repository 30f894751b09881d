"""Arguments of the wrong type are refused by name, and not by an AttributeError from deep inside.

`check_types` reads annotations, so what an argument may be is said once. It checks what Python's types say:
classes, numbers, texts, paths, choices, sequences, mappings, arrays. Ranges and shapes are the function's to check.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import MappingProxyType, NoneType, SimpleNamespace, UnionType
from typing import Any, BinaryIO, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from ._lazy import names_extra
from .placement.errors import ArgumentTypeError, nearest

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)

SOURCES = {
    "ModelSpec": "ModelSpec(...) or ModelSpec.from_config(path)",
    "Topology": "Topology.preset(name) or Topology.load(path)",
    "RoutingTrace": "read_trace(path)",
    "RoutingStatistics": "RoutingStatistics.from_trace(trace)",
    "Steps": "trace.decode_steps() or trace.prefill_steps()",
    "Problem": "Problem(trace, topology)",
    "Plan": "solve(problem) or Plan.load(path)",
    "Evaluation": "evaluate(plan, steps, problem)",
}
"""Where a user gets an object of each class."""
HINTS = {("Problem", "slots"): 'to have them chosen, solve(problem, slots="auto")'}
"""What a user of an argument may have meant."""

PLURAL = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts", "a path": "paths"}
NUMBERS = {"b": "bool", "i": "whole numbers", "f": "numbers"}
READABLE = {"b": "b", "i": "iu", "f": "iuf"}
"""Kinds of numpy types that an array of each kind is made of without loss."""


def wrong_type(function: str, argument: str, value: Any, *expected: type) -> ArgumentTypeError:
    """The error that says which argument of which function is wrong, what it was, and how to get one that is right."""
    return _wrong(function, argument, value, [_class_kind(kind) for kind in expected])


def check_types(function: F) -> F:
    """Checks arguments against their annotations.

    An annotation that only type checkers can read, or that says more than types do (protocols, type variables), leaves
    its argument unchecked.
    """
    return _checked(function, function.__qualname__)


def check_fields(cls: C) -> C:
    """A class whose constructor checks its arguments against their annotations."""
    setattr(cls, "__init__", _checked(inspect.getattr_static(cls, "__init__"), cls.__name__))  # noqa: B010
    return cls


def check_methods(cls: C) -> C:
    """A class whose public methods check their arguments against their annotations."""
    for name, member in list(vars(cls).items()):
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if not name.startswith("_") and inspect.isfunction(function):
            checked = check_types(function)
            setattr(cls, name, checked if function is member else type(member)(checked))
    return cls


def _checked(function: F, name: str) -> F:
    signature = inspect.signature(function)
    call = names_extra(function)

    @functools.cache
    def checks() -> dict[str, tuple[_Kind, ...]]:
        kinds = {argument: _kinds(function, argument, taken.kind) for argument, taken in signature.parameters.items()}
        return {argument: known for argument, known in kinds.items() if known}

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs).arguments
        except TypeError:
            # Python's own words for a missing or unknown argument are good.
            bound = {}
        for argument, kinds in checks().items():
            if argument in bound and not any(kind.holds(bound[argument]) for kind in kinds):
                raise _wrong(name, argument, bound[argument], kinds)
        return call(*args, **kwargs)

    vars(checked)["checks_types"] = True
    return cast(F, checked)


@dataclass(frozen=True)
class _Kind:
    """A type that an argument may have: whether a value is of it, and its name in a message."""

    holds: Callable[[Any], bool]
    name: str
    choices: tuple[Any, ...] = ()


def _wrong(function: str, argument: str, value: Any, kinds: Sequence[_Kind]) -> ArgumentTypeError:
    text = " ".join(repr(value).split())
    shown = "missing" if value is None else f"{text if len(text) <= 60 else text[:60] + '...'} ({type(value).__name__})"
    choices = [str(choice) for kind in kinds for choice in kind.choices]
    if isinstance(value, str) and choices:
        return ArgumentTypeError(f"{function}: {argument} {value!r} is unknown; {nearest(value, choices)}")
    expected = " or ".join(kind.name for kind in kinds if kind.name)
    sources = [source for kind in kinds for name, source in SOURCES.items() if kind.name.split()[-1:] == [name]]
    hint = f"; get one by {', or '.join(sources)}" if sources else ""
    hint += f"; {HINTS[function, argument]}" if (function, argument) in HINTS else ""
    return ArgumentTypeError(f"{function}: {argument} is {shown}, expected {expected}{hint}")


def _kinds(function: Callable[..., Any], argument: str, taken: Any) -> tuple[_Kind, ...]:
    """The types that an argument may have; none where its annotation cannot be checked."""
    annotation = function.__annotations__.get(argument)
    if annotation is None or taken in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        return ()
    try:
        hint = get_type_hints(
            SimpleNamespace(__annotations__={argument: annotation}), inspect.unwrap(function).__globals__
        )[argument]
    except (NameError, AttributeError):
        return ()
    return _kinds_of(hint) or ()


def _kinds_of(hint: Any) -> tuple[_Kind, ...] | None:
    """What a value of the annotation may be, or None where that cannot be checked."""
    if get_origin(hint) in (Union, UnionType):
        members = [_kinds_of(member) for member in get_args(hint)]
        if None in members:
            return None
        kinds = tuple(kind for member in members for kind in member or ())
        # Text that may be a path instead is one: "" would be the current folder.
        paths = PLAIN[os.PathLike] in kinds
        return tuple(FILE_NAME if paths and kind is PLAIN[str] else kind for kind in kinds)
    kind = _kind_of(hint)
    return None if kind is None else (kind,)


def _kind_of(hint: Any) -> _Kind | None:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        known = tuple(choice for choice in inner if choice is not None)
        words = ", ".join(repr(choice) for choice in known)
        return _Kind(lambda value: value.__hash__ is not None and value in inner, f"one of {words}", known)
    if origin is np.ndarray:
        dtype = get_args(inner[1])[0]
        return _array_kind("" if dtype is Any else np.dtype(dtype).kind)
    if origin in (Sequence, tuple, list):
        return _sequence_kind(inner)
    if origin is Mapping or origin is dict:
        keys, values = (_kinds_of(item) for item in inner)
        return _Kind(
            lambda value: isinstance(value, Mapping) and _all(value.keys(), keys) and _all(value.values(), values),
            "a mapping" + (f" of {_names(keys)} to {_names(values)}" if keys and values else ""),
        )
    if origin is Callable:
        return _Kind(callable, "a function")
    if origin is Iterable:
        return _iterable_kind(inner)
    if any(isinstance(kind, type) and issubclass(kind, os.PathLike) for kind in (hint, origin)):
        return PLAIN[os.PathLike]
    if hint in PLAIN:
        return PLAIN[hint]
    # What only has to have some methods says better itself which it lacks.
    if isinstance(hint, type) and hint not in (object, Any) and not getattr(hint, "_is_protocol", False):
        return _class_kind(hint)
    return None


def _class_kind(kind: type) -> _Kind:
    return _Kind(lambda value: isinstance(value, kind), kind.__name__)


def _sequence_kind(inner: tuple[Any, ...]) -> _Kind:
    """Of `Sequence[X]`, `tuple[X, ...]` or `tuple[X, Y]`: any sequence or row of an array that has such entries."""
    if len(inner) == 2 and inner[1] is Ellipsis:
        inner = inner[:1]
    elif len(inner) > 1:
        each = [_kinds_of(item) for item in inner]
        return _Kind(
            lambda value: (
                _is_row(value, each[0])
                and len(value) == len(each)
                and all(_all([entry], kinds) for entry, kinds in zip(value, each, strict=True))
            ),
            f"{len(inner)} values ({', '.join(_names(kinds) or 'any' for kinds in each)})",
        )
    kinds = _kinds_of(inner[0])
    return _Kind(
        lambda value: _is_row(value, kinds) and _all(value, kinds),
        f"a sequence of {_names(kinds, PLURAL)}" if kinds else "a sequence",
    )


def _iterable_kind(inner: tuple[Any, ...]) -> _Kind:
    """Of `Iterable[X]`; entries are looked at where that takes nothing from them."""
    kinds = _kinds_of(inner[0])
    return _Kind(
        lambda value: (
            (isinstance(value, Iterable) and not isinstance(value, str | bytes | np.ndarray | Mapping | Sequence))
            or (_is_row(value, kinds) and _all(value, kinds))
        ),
        f"several {_names(kinds, PLURAL)}" if kinds else "several values",
    )


def _is_row(value: Any, kinds: tuple[_Kind, ...] | None) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and any(kind in (PLAIN[int], PLAIN[float]) for kind in kinds or ())
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _all(values: Iterable[Any], kinds: tuple[_Kind, ...] | None) -> bool:
    return kinds is None or all(any(kind.holds(value) for kind in kinds) for value in values)


def _names(kinds: tuple[_Kind, ...] | None, words: Mapping[str, str] = MappingProxyType({})) -> str:
    return " or ".join(words.get(kind.name, kind.name) for kind in kinds or () if kind.name)


def _array_kind(kind: str) -> _Kind:
    def holds(value: Any) -> bool:
        if not isinstance(value, np.ndarray):
            if not isinstance(value, Sequence) or isinstance(value, str | bytes):
                return False
            try:
                value = np.asarray(value)
            except ValueError:
                return False
        # An empty list has no type yet.
        return not kind or value.dtype.kind in READABLE.get(kind, kind) or value.size == 0

    return _Kind(holds, f"an array of {NUMBERS[kind]}" if kind in NUMBERS else "an array")


FILE_NAME = _Kind(lambda value: isinstance(value, str) and value != "", "text that names a file")
PLAIN: dict[Any, _Kind] = {
    NoneType: _Kind(lambda value: value is None, ""),
    bool: _Kind(lambda value: isinstance(value, bool | np.bool_), "True or False"),
    int: _Kind(lambda value: isinstance(value, Integral) and not isinstance(value, bool), "a whole number"),
    float: _Kind(
        lambda value: not isinstance(value, bool) and isinstance(value, Real) and value == value,
        "a number",
    ),
    str: _Kind(lambda value: isinstance(value, str), "text"),
    os.PathLike: _Kind(lambda value: isinstance(value, os.PathLike), "a path"),
    BinaryIO: _Kind(lambda value: hasattr(value, "read") or hasattr(value, "write"), "a binary file"),
}
