"""The committed table of families has a row for each that the installed Transformers has."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]


def test_every_family_has_a_row_and_none_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import families

    page = (ROOT / "docs" / "results" / "families.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z]\w+) \| .* \| .* \| .* \| .* \|$", page, re.MULTILINE)
    assert set(families.families()) <= set(rows)
    assert "WRONG" not in page


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v4", "openai_privacy_filter", "jamba"])
def test_a_family_is_exact_throughout(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import families

    assert families.one_family(family) == (family, *[families.EXACT] * 4)
