"""Old names and forms, kept for one release: they work, and say what to write instead."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def warn_deprecated(old: str, new: str, *, stacklevel: int = 3) -> None:
    """A DeprecationWarning that names the old form and the new one, at the caller's caller unless told otherwise."""
    warnings.warn(
        f"{old} is deprecated and goes with the next release; use {new}", DeprecationWarning, stacklevel=stacklevel
    )


def renamed(module: str, names: Mapping[str, str], otherwise: Callable[[str], Any]) -> Callable[[str], Any]:
    """A module's `__getattr__` under which old names still give what their new names give.

    names: new name of each old one. otherwise: the `__getattr__` for all other names.
    """

    def get(name: str) -> Any:
        if name not in names:
            return otherwise(name)
        warn_deprecated(f"{module}.{name}", f"{module}.{names[name]}")
        return otherwise(names[name])

    return get


def renamed_argument(old: str, new: str) -> Callable[[F], F]:
    """A decorator for functions whose keyword argument has another name now."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            if old in keywords and new not in keywords:
                warn_deprecated(f"{function.__name__}({old}=...)", f"{new}=...")
                keywords[new] = keywords.pop(old)
            return function(*arguments, **keywords)

        return cast(F, call)

    return decorate


def old_listener(
    listener: Callable[..., None] | None, fields: tuple[str, ...], function: str
) -> Callable[[Any], None] | None:
    """A listener to progress, where an old form of it takes some of the news as plain arguments.

    fields: those arguments, as attributes of the news. An old form is told by its number of arguments, or, where it has
    one, by the annotation `int`.
    """
    if listener is None or not _takes(listener, len(fields)):
        return listener
    old = listener
    warn_deprecated(
        f"progress({', '.join(fields)}) of {function}", "progress(news), a Progress with these attributes", stacklevel=4
    )
    return lambda news: old(*(getattr(news, field) for field in fields))


def _takes(listener: Callable[..., None], count: int) -> bool:
    import inspect

    try:
        parameters = inspect.signature(listener).parameters.values()
    except (TypeError, ValueError):
        return False
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    return len(plain) == count and (count > 1 or plain[0].annotation in (int, "int"))
