"""Options under the names of the release before: they work, and say what they are called now."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from typer.core import TyperCommand

from .output import RUNNING, note

FORMER = {"--out": "--output", "--save": "--output", "--engine": "--for", "--model": "--model-name"}
"""Names of the release before, which go with the next, and what they are called now in commands that have that."""


class Command(TyperCommand):
    """A command that understands the former names of its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self._renamed(args)))

    def invoke(self, ctx: Any) -> Any:
        names, group = [], ctx
        while group.parent is not None:
            names.append(group.info_name)
            group = group.parent
        RUNNING[-1] = "-".join(reversed(names))
        return super().invoke(ctx)

    def _renamed(self, args: list[str]) -> Iterator[str]:
        known = {name for param in self.params for name in param.opts}
        takes_value = {name for param in self.params if not getattr(param, "is_flag", False) for name in param.opts}
        interspersed = self.context_settings.get("allow_interspersed_args", True)
        former = {old: new for old, new in FORMER.items() if new in known and old not in known}
        words = iter(args)
        for word in words:
            option, equals, value = word.partition("=")
            if word == "--" or not (word.startswith("-") or interspersed):
                # What follows belongs to a script.
                yield word
                yield from words
                return
            if option in former:
                note(f"note: {option} is called {former[option]} now; the former name goes with the next release")
                option = former[option]
            yield option + equals + value
            if option in takes_value and not equals:
                yield from itertools.islice(words, 1)
