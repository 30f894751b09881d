"""The line of a command, looked at before typer reads it: former names of options work and say what they are called
now; a refusal repeats the value, and says what is expected and what to do, whichever release of typer is installed."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import typer
from typer.core import TyperCommand

from ..placement.errors import FileFormatError, InputError, UnsupportedError, nearest
from .output import RUNNING, note

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


def check_values(command: Any, ctx: Any, words: list[str]) -> None:
    """Refuses numbers out of range, words that are none of an option's, and empty paths and names.

    Raises:
        typer.BadParameter: the first that is wrong, in the order of the command line.
    """
    typed, _, order = command.make_parser(ctx).parse_args(args=list(words))
    params = command.get_params(ctx)
    if any(param.is_eager and param.name in typed for param in params):
        return
    signature = inspect.signature(command.callback).parameters
    for param in dict.fromkeys([*order, *params]):
        value = typed.get(param.name)
        if value is None:
            value = param.value_from_envvar(ctx)
        if value is None or param.name not in signature:
            continue
        if param.param_type_name == "argument" and not ctx.allow_interspersed_args:
            # A script's name, and what is the script's.
            continue
        kind, declared = _declared(signature[param.name].annotation)
        for each in value if isinstance(value, list | tuple) else [value]:
            # Flags are True.
            if isinstance(each, str):
                reason = _refusal(each, kind, declared, _instead(param))
                if reason is not None:
                    raise typer.BadParameter(reason, ctx=ctx, param=param)


def _declared(annotation: Any) -> tuple[Any, Any]:
    """The type of each value (X of `list[X] | None`), and what was declared of it."""
    kind, declared = get_args(annotation)[:2]
    while inner := [each for each in get_args(kind) if each is not NoneType]:
        kind = inner[0]
    return kind, declared


def _instead(param: Any) -> str:
    """What to do in place of the value given."""
    if param.param_type_name == "argument" or param.required:
        return "give one"
    default = getattr(param.default, "value", param.default)
    usual = f" for {default:g}" if isinstance(default, float) else f" for {default}"
    if default is None or isinstance(default, list | tuple) or callable(default):
        usual = ""
    return f"give one, or leave {param.opts[0]} out{usual}"


def _refusal(text: str, kind: Any, declared: Any, instead: str) -> str | None:
    """Why the text is no value; None where it is one, as far as its type goes."""
    if kind is int or kind is float:
        if _in_range(text, kind, declared.min, declared.max):
            return None
        return f"{_shown(text)} is not {_range(kind, declared.min, declared.max)}; {instead}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        names = [str(each.value) for each in kind]
        return None if text in names else f"{_shown(text)} is not one of its values; {nearest(text, names)}; {instead}"
    if not text:
        return f"'' is empty, {'a path' if kind is Path else 'a value'} is expected; {instead}"
    return None


GIVEN: dict[str, str] = {}
"""Options that the line of the running command names, by their parameters; what variables hold is for many commands."""


def note_given(command: Any, ctx: Any) -> None:
    """Holds what `refuse_idle` asks for, before the command runs."""
    GIVEN.clear()
    for param in command.params:
        source = ctx.get_parameter_source(param.name)
        if param.param_type_name == "option" and source is not None and source.name == "COMMANDLINE":
            turned_off = ctx.params.get(param.name) is False and param.secondary_opts
            GIVEN[param.name] = (param.secondary_opts if turned_off else param.opts)[0]


def refuse_idle(why: str, *names: str) -> None:
    """Refuses options that were given and would be passed over.

    why: ends the sentence that begins with their names. names: their parameters.

    Raises:
        typer.BadParameter: some of them were given.
    """
    idle = [option for name, option in GIVEN.items() if name in names]
    if idle:
        verb, them = ("does", "it") if len(idle) == 1 else ("do", "them")
        names_told = " and ".join([", ".join(idle[:-1]), idle[-1]] if len(idle) > 1 else idle)
        raise typer.BadParameter(f"{names_told} {verb} nothing {why}; leave {them} out")


def in_options(command: Any, ctx: Any, text: str) -> str:
    """A refusal that names arguments as Python has them, with the options that were given in their place."""
    for param in command.params:
        if param.param_type_name == "option" and ctx.params.get(param.name) not in (param.default, None):
            text = re.sub(rf"(?<![\w.'-]){param.name}='([^']*)'", rf"{param.opts[0]} \1", text)
            if "_" in param.name:
                text = re.sub(rf"(?<![\w.'-]){param.name}\b", param.opts[0], text)
            else:
                # Words of the language are arguments only where the value follows, or where a refusal begins with them.
                value = re.escape(str(getattr(ctx.params[param.name], "value", ctx.params[param.name])))
                text = re.sub(rf"(?<![\w.'-]){param.name}(?= \('?{value}'?\))", param.opts[0], text)
                text = re.sub(rf"(^|: ){param.name}(?= \(| '| says nothing)", rf"\1{param.opts[0]}", text)
            text = text.replace(f"no option '{param.name}'", f"no option {param.opts[0]}")
    return text


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}..."


def _in_range(text: str, kind: type[int] | type[float], low: float | None, high: float | None) -> bool:
    try:
        number = kind(text)
    except (ValueError, OverflowError):
        return False
    return math.isfinite(number) and (low is None or number >= low) and (high is None or number <= high)


def _range(kind: type[int] | type[float], low: float | None, high: float | None) -> str:
    noun = "a whole number" if kind is int else "a number"
    least, most = ("" if bound is None else f"{bound:,}".removesuffix(".0") for bound in (low, high))
    if least and most:
        return f"{noun} from {least} to {most}"
    return f"{noun} of at least {least}" if least else f"{noun} of at most {most}" if most else noun
