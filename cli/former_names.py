"""Commands: former names of options work and say what they are called now, and wrong values are told."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperCommand

from ..placement.errors import FileFormatError, InputError, UnsupportedError
from .output import RUNNING, note
from .values import GIVEN, check_values, in_options, note_given, refuse_idle

FORMER = {"--out": "--output", "--save": "--output", "--engine": "--for", "--model": "--model-name"}
"""Names of the release before, which go with the next, and what they are called now in commands that have that."""


class Command(TyperCommand):
    """A command that understands the former names of its options, and says of a wrong value what is expected."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = list(self._renamed(args))
        if words and not ctx.resilient_parsing:
            check_values(self, ctx, words)
        try:
            return super().parse_args(ctx, words)
        except typer.BadParameter as error:
            # Of what is missing typer tells the name alone.
            error.message = error.message or getattr(error.param, "help", None) or ""
            raise

    def invoke(self, ctx: Any) -> Any:
        names, group = [], ctx
        while group.parent is not None:
            names.append(group.info_name)
            group = group.parent
        RUNNING[-1] = "-".join(reversed(names))
        note_given(self, ctx)
        if "as_json" in GIVEN:
            refuse_idle("with --json, as it draws in the terminal: --plot-file draws into a file", "plot")
        try:
            return super().invoke(ctx)
        except FileFormatError:
            # What it names is a file's.
            raise
        except (InputError, UnsupportedError) as error:
            error.args = (in_options(self, ctx, str(error)),)
            raise

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
