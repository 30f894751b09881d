"""The commands' reference is what the commands say of themselves, and they say enough."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from moeplace.cli.app import app
from moeplace.cli.document import commands, document, examples

DOCS = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
COMMANDS = dict(commands())


def test_the_committed_reference_is_current() -> None:
    assert DOCS.read_text(encoding="utf-8") == document(), "run: python -m moeplace.cli.document > docs/cli.md"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_an_example_that_parses(name: str) -> None:
    command = COMMANDS[name]
    assert len((command.help or "").partition("Example:")[0].strip()) > 20
    lines = examples(command)
    assert lines
    for line in lines:
        words = shlex.split(line)
        prefix = name.split()
        assert words[: len(prefix)] == prefix
        # Parsing alone: unknown options and missing ones raise.
        command.make_context(name, words[len(prefix) :])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_and_argument_has_help(name: str) -> None:
    silent = [param.name for param in COMMANDS[name].params if not getattr(param, "help", None)]
    assert not silent


def test_every_command_that_prints_results_has_json() -> None:
    writing_only = {
        "moeplace profile",
        "moeplace plot",
        "moeplace topology write",
        "moeplace plans rename",
        "moeplace plans delete",
        "moeplace schema",
        "moeplace serve",
        "moeplace tokens revoke",
    }
    without = {name for name, command in COMMANDS.items() if not any("--json" in p.opts for p in command.params)}
    assert without == writing_only


def test_the_program_lists_the_commands_users_are_told_of() -> None:
    wanted = {
        "profile",
        "advise",
        "calibrate",
        "check",
        "import",
        "stats",
        "topology",
        "solve",
        "evaluate",
        "compare",
        "decide",
        "doctor",
        "pareto",
        "whatif",
        "export",
        "permute",
        "schema",
        "record",
        "plans",
        "plot",
        "report",
        "serve",
        "tokens",
        *("models", "topologies", "deployments", "windows", "decisions", "webhooks", "engines", "jobs"),
        *("deploy", "approve", "reject", "rollback"),
    }
    assert wanted == {name.split()[1] for name in COMMANDS}
    assert app.info.name == "moeplace"
