"""Solvers, readers and exporters: those of this library, one line each, and those that installed packages bring.

A package offers one by an entry point, in its pyproject.toml:

    [project.entry-points."moeplace.solvers"]
    mine = "their_package:TheirSolver"

The value is an object, or a class or function without arguments that gives one. A plug-in that does not load is named
in a warning and left out, so that everything else goes on working; asking for it by name says what is wrong with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from .placement.errors import ArgumentTypeError, InputError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """What is known of one kind, built in and plugged in. Entry points are read once, and only when the built-in ones
    do not answer.

    kind: the word for an entry in messages. group: of the entry points. attributes: what each entry must have; `name`
    is what it is asked for by. builtin: in the order they are listed.
    """

    def __init__(self, kind: str, group: str, attributes: Sequence[str], *builtin: T) -> None:
        self.kind, self.group, self.attributes, self.builtin = kind, group, tuple(attributes), builtin

    def __iter__(self) -> Iterator[T]:
        yield from self.builtin
        yield from self._plugged_in[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Of all entries, built-in ones first."""
        return tuple(_name(entry) for entry in self)

    def named(self, name: str) -> T:
        """The entry of that name.

        Raises:
            InputError: unknown name (the nearest is told), or a plug-in that does not load.
        """
        for entry in self:
            if _name(entry) == name:
                return entry
        if name in (broken := self._plugged_in[1]):
            raise InputError(f"{self.kind} {name!r}: {broken[name]}")
        raise InputError(f"{self.kind} {name!r} is unknown; {nearest(name, self.names)}")

    def check(self, entry: Any) -> T:
        """An entry, or a class of one, that somebody hands over: checked and, if need be, made.

        Raises:
            InputError: it lacks what every entry must have.
        """
        made = entry() if isinstance(entry, type) or _is_function(entry) else entry
        missing = [name for name in self.attributes if not hasattr(made, name)]
        if missing:
            raise ArgumentTypeError(
                f"a {self.kind} is a name, as {_name(self.builtin[0])!r}, or an object that has "
                f"{', '.join(self.attributes)}; {type(made).__name__} lacks {', '.join(missing)}"
            )
        return made  # type: ignore[no-any-return]

    @cached_property
    def _plugged_in(self) -> tuple[tuple[T, ...], dict[str, str]]:
        """Those that load, and what is wrong with each of the others, by the entry point's name."""
        plugged_in: list[T] = []
        broken: dict[str, str] = {}
        taken = {_name(entry) for entry in self.builtin}
        for point in entry_points(group=self.group):
            try:
                entry = self.check(point.load())
                if _name(entry) in taken:
                    raise InputError(f"the name {_name(entry)!r} is taken")
            except Exception as error:  # noqa: BLE001 - code of strangers may fail in any way
                broken[point.name] = f"{_origin(point)} does not load: {type(error).__name__}: {error}"
                warnings.warn(f"{self.kind} {point.name!r}: {broken[point.name]}", RuntimeWarning, stacklevel=2)
                continue
            taken.add(_name(entry))
            plugged_in.append(entry)
        return tuple(plugged_in), broken


def _name(entry: Any) -> str:
    return str(entry.name)


def _is_function(entry: Any) -> bool:
    return callable(entry) and not hasattr(entry, "name")


def _origin(point: EntryPoint) -> str:
    package = point.dist.name if point.dist is not None else "an installed package"
    return f"the plug-in {point.value!r} of {package}"
