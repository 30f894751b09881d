"""The fenced blocks of a Markdown page, for tests that run what pages say."""

from __future__ import annotations

import re
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of a page's fenced blocks, in order."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def code(page: Path, *languages: str) -> list[str]:
    """The text of the blocks in one of the languages, in order."""
    return [text for language, text in blocks(page) if language in languages]
