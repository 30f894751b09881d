"""Arguments of the wrong type are refused by name, and not by an AttributeError from deep inside."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ._lazy import names_extra
from .placement.errors import ArgumentTypeError

F = TypeVar("F", bound=Callable[..., Any])

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


def wrong_type(function: str, argument: str, value: Any, *expected: type) -> ArgumentTypeError:
    """The error that says which argument of which function is wrong, what it was, and how to get one that is right."""
    names = [kind.__name__ for kind in expected]
    sources = [SOURCES[name] for name in names if name in SOURCES]
    return _wrong(function, argument, value, " or ".join(names), sources)


def _wrong(function: str, argument: str, value: Any, expected: str, sources: Sequence[str]) -> ArgumentTypeError:
    text = " ".join(repr(value).split())
    shown = "missing" if value is None else f"{text if len(text) <= 60 else text[:60] + '...'} ({type(value).__name__})"
    hint = f"; get one by {', or '.join(sources)}" if sources else ""
    return ArgumentTypeError(f"{function}: {argument} is {shown}, expected {expected}{hint}")


def check_types(function: F) -> F:
    """Checks those arguments whose annotations name classes of this library, or sequences of them.

    Other annotations are left to the function, which knows what it can make of a number or a path.
    """
    signature = inspect.signature(function)
    name, call = function.__name__, names_extra(function)

    @functools.cache
    def checks() -> dict[str, tuple[Any, ...]]:
        kinds = {argument: _kinds(function, argument) for argument in signature.parameters}
        return {argument: known for argument, known in kinds.items() if _checkable(known)}

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs).arguments
        except TypeError:
            # Python's own words for a missing or unknown argument are good.
            bound = {}
        for argument, kinds in checks().items():
            if argument in bound and not any(_is_of(bound[argument], kind) for kind in kinds):
                raise _wrong(name, argument, bound[argument], *_expected(kinds))
        return call(*args, **kwargs)

    return cast(F, checked)


def _kinds(function: Callable[..., Any], argument: str) -> tuple[Any, ...]:
    """The types that an argument may have; none where it has no annotation, or one that only type checkers can read."""
    annotation = function.__annotations__.get(argument)
    try:
        hint = get_type_hints(SimpleNamespace(__annotations__={argument: annotation}), function.__globals__)[argument]
    except NameError:
        return ()
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _item(kind: Any) -> Any:
    """X of `Sequence[X]`, else None."""
    return get_args(kind)[0] if get_origin(kind) is Sequence else None


def _ours(kind: Any) -> bool:
    return isinstance(kind, type) and kind.__module__.split(".")[0] == __name__.split(".")[0]


def _checkable(kinds: tuple[Any, ...]) -> bool:
    plain = all(isinstance(kind, type) or _ours(_item(kind)) for kind in kinds)
    # What only has to have some methods says better itself which it lacks.
    plain = plain and not any(getattr(kind, "_is_protocol", False) for kind in kinds)
    return plain and any(_ours(kind) or _ours(_item(kind)) for kind in kinds)


def _is_of(value: Any, kind: Any) -> bool:
    if (item := _item(kind)) is not None:
        return isinstance(value, Sequence) and all(isinstance(entry, item) for entry in value)
    return isinstance(value, kind)


def _expected(kinds: tuple[Any, ...]) -> tuple[str, list[str]]:
    words, sources = [], []
    for kind in kinds:
        if kind is not NoneType:
            name = (_item(kind) or kind).__name__
            words.append(name if _item(kind) is None else f"a sequence of {name}")
            sources += [SOURCES[name]] if name in SOURCES else []
    return " or ".join(words), sources
