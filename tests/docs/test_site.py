"""The documentation as a site: builds without a warning, needs no network, and its reference has every public name."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="every public name is looked at")

from pages import code

import moeplace as mp

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "python.md"
PUBLIC = [name for name in mp.__all__ if name != "__version__" and not inspect.ismodule(getattr(mp, name))]


def test_every_public_name_stands_once_in_the_reference() -> None:
    names = [
        name
        for marker in re.findall(r"<!-- api: (.*?) -->", PAGE.read_text(encoding="utf-8"))
        for name in marker.split()
    ]
    assert sorted(names) == sorted(PUBLIC)


def test_every_function_of_the_reference_has_an_example() -> None:
    examples = "\n".join(code(PAGE, "python", "py"))
    functions = [name for name in PUBLIC if name[0].islower()]
    assert functions
    assert [name for name in functions if f"mp.{name}(" not in examples] == []


class Addresses(HTMLParser):
    """What a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe") and values.get("src"):
            self.loaded.append(str(values["src"]))
        if tag == "link" and "stylesheet" in (values.get("rel") or "") and values.get("href"):
            self.loaded.append(str(values["href"]))


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="building the site needs the docs extra")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        addresses = Addresses()
        addresses.feed(page.read_text(encoding="utf-8"))
        assert not [address for address in addresses.loaded if "//" in address], page.name
    formulas = (tmp_path / "site" / "cost-model.html").read_text(encoding="utf-8")
    assert "<math" in formulas
    assert "arithmatex" not in formulas
    reference = (tmp_path / "site" / "python.html").read_text(encoding="utf-8")
    assert 'id="solve"' in reference
    assert 'id="Plan.save"' in reference
