"""The tutorial's and how-to pages' commands run as written, one after the other, against engines' own formats.

Sizes alone are smaller, and addresses are those of servers here that answer as the engines do.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from cli_runs import run
from pages import code

if importlib.util.find_spec("torch") is None:
    pytest.skip("engines' dumps are torch files", allow_module_level=True)

from how_to_settings import PAGES, SETTINGS, Setting, commands

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_commands_run_in_the_order_they_stand_in(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEPLACE_DB", str(tmp_path / "store.db"))
    setting = Setting(tmp_path)
    lines = commands(page)
    assert lines
    with SETTINGS[page.stem](setting):
        for line in lines:
            for prefix in [prefix for prefix in setting.before if line.startswith(prefix)]:
                setting.before.pop(prefix)()
            text = re.sub(r"--seconds (5|10)\b", "--seconds 0.5", line)
            for words, others in setting.replaced.items():
                text = text.replace(words, others)
            command, *arguments = shlex.split(text)
            assert command == "moeplace", f"{page.name}: {line}: what is not moeplace's own stands in a bash block"
            done = run(*arguments)
            assert done.code == 0, f"{page.name}: {line}\n{done.out}\n{done.err}"


def test_engines_own_command_lines_are_kept_apart() -> None:
    """In `bash` blocks: they are the engines', and what moeplace prints in their place is tested where it is made."""
    for page in PAGES:
        lines = [line for block in code(page, "bash") for line in block.splitlines()]
        assert not [line for line in lines if line.startswith("moeplace ") and not line.startswith("moeplace serve")]
