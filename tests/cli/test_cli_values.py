"""Whatever an option is given that it cannot take, the refusal repeats it, says what is expected, and what to do."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from cli_runs import run

from moeplace.cli.command_line import Command
from moeplace.cli.document import commands

COMMANDS = dict(commands())
WHOLE, NUMBER, PATH, TEXT = int, float, Path, str


def kinds(*wanted: type) -> Iterator[tuple[str, Any, Any]]:
    """(command, parameter, what was declared of it) of every parameter whose values are of these types."""
    for path, command in COMMANDS.items():
        hints = get_type_hints(command.callback, include_extras=True)
        for param in command.params:
            if param.name in hints:
                kind, declared = get_args(hints[param.name])[:2]
                found = {kind, *get_args(kind)}
                found |= {each for inner in found for each in get_args(inner)}
                if any(isinstance(each, type) and issubclass(each, wanted) for each in found - {bool}):
                    yield path, param, declared


def refused(path: str, param: Any, value: str) -> str:
    """What is said of this value, of an argument or an option, given to a command with nothing else."""
    words = [param.opts[0], value]
    if param.param_type_name == "argument":
        arguments = [each for each in COMMANDS[path].params if each.param_type_name == "argument"]
        words = ["--", *("1" for _ in arguments[: arguments.index(param)]), value]
    with pytest.raises(typer.BadParameter) as error:
        COMMANDS[path].make_context(path, words)
    assert error.value.param is param, f"{path} {param.opts}"
    return str(error.value.message)


def test_every_command_looks_at_its_values() -> None:
    assert not [path for path, command in COMMANDS.items() if not isinstance(command, Command)]
    assert not [path for path, command in COMMANDS.items() if not inspect.signature(command.callback).parameters]


def test_numbers_that_are_none_or_out_of_range_are_told_with_what_is_expected() -> None:
    tried = set()
    for path, param, declared in kinds(WHOLE, NUMBER):
        wrong = ["x", "", "nan", "inf"]
        if declared.min is not None:
            wrong.append(str(declared.min - 1))
        if declared.max is not None:
            wrong.append(str(declared.max + 1))
        for value in wrong:
            text = refused(path, param, value)
            assert re.match(rf"{re.escape(repr(value))} is not a (whole )?number", text), f"{path} {param.opts} {text}"
            for bound in (declared.min, declared.max):
                assert bound is None or f"{bound:,}".removesuffix(".0") in text, f"{path} {param.opts} {text}"
            assert "give one" in text
        tried.add((path, param.name))
    assert len(tried) > 100


def test_words_that_are_none_of_an_options_are_told_with_those_that_are() -> None:
    tried = set()
    for path, param, _ in kinds(Enum):
        hint = get_args(get_type_hints(COMMANDS[path].callback, include_extras=True)[param.name])[0]
        text = refused(path, param, "banana")
        assert "'banana' is not one of its values; " in text, f"{path} {param.opts}"
        found = [each for each in (hint, *get_args(hint)) if isinstance(each, type) and issubclass(each, Enum)]
        for kind in found:
            assert all(each.value in text for each in kind)
        tried.add((path, param.name))
    assert len(tried) > 30


def test_empty_paths_names_and_addresses_are_told_as_empty() -> None:
    tried = set()
    for path, param, _ in kinds(PATH, TEXT):
        if path == "moeplace profile" and param.name == "command":
            # The script's own.
            continue
        text = refused(path, param, "")
        assert "'' is empty, a " in text or "'' is not one of its values" in text, f"{path} {param.opts} {text}"
        assert "give one" in text
        tried.add((path, param.name))
    assert len(tried) > 150


def test_a_scripts_own_words_may_be_empty(tmp_path: Path) -> None:
    done = run("profile", "-o", tmp_path / "trace", "--", "python", tmp_path / "none.py", "")
    assert "is empty" not in done.err


@pytest.mark.parametrize("line", ["solve --seed -1 --help", "serve --port 99999 -h"])
def test_help_comes_before_what_is_wrong(line: str) -> None:
    done = run(*shlex.split(line))
    assert done.code == 0
    assert "Usage: " in done.out


def test_what_a_variable_holds_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPLACE_SERVER", "")
    # As a variable that is not set.
    assert "is empty" not in run("decisions", "list").err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("solve record", "Missing option '--topology' / '-t'. A preset"),
        ("topology show h100-sxm --nodes -1", "'--nodes': '-1' is not a whole number of at least 1; give one, or"),
        ("solve record -t h100-sxm -o ''", "'--output' / '-o': '' is empty, a path is expected; give one, or leave"),
    ],
)
def test_a_wrong_call_ends_in_usage_and_the_reason(line: str, told: str) -> None:
    done = run(*shlex.split(line))
    assert (done.code, done.out) == (2, "")
    assert told in " ".join(done.err.replace("│", " ").split())
