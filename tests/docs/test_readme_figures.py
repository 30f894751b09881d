"""Figures that the README gives are those of the pages and kernels it takes them from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moeplace.placement.kernels import kernel_fit

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "docs" / "results"


def rows(page: str, table: str) -> list[dict[str, str]]:
    """The rows of a table between its markers, by column."""
    found = re.search(rf"<!-- table: {re.escape(table)} -->\n(.*?)<!-- end of table -->", page, re.DOTALL)
    assert found is not None, f"no table {table!r}"
    head, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines() if line.startswith("|")
    ]
    return [dict(zip(head, line, strict=True)) for line in lines]


HEADLINE = rows(TEXT, "headline")


def test_the_first_table_names_kernels_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from deepseek_shape import MODEL
    from headline import COLUMNS, ENGINE
    from recordings import GPT_OSS

    assert list(HEADLINE[0]) == list(COLUMNS)
    models = {GPT_OSS.name: (GPT_OSS, 8), MODEL.name: (MODEL, 32)}
    assert GPT_OSS.name in {row["model"] for row in HEADLINE}
    for row in HEADLINE:
        model, devices = models[row["model"]]
        assert kernel_fit("h100-sxm", ENGINE, model, devices) is not None
        # An installed table may be of a newer release than the coefficients that are shipped.
        named = rf"{ENGINE} \d[\d.]*, h100-sxm, {model.expert_dtype}"
        assert re.fullmatch(named, row["expert times measured"])


def test_search_is_below_eplb_in_every_row_of_the_first_table() -> None:
    for row in HEADLINE:
        ratio = float(row["both, to EPLB"])
        assert (ratio < 1) == (row["plan"] == "search")
        assert (ratio == 1) == (row["plan"] == "eplb")


def test_one_plan_is_below_every_peer_at_every_size_as_its_page_says() -> None:
    assert "below every peer at every size" in " ".join(TEXT.split())
    page = (RESULTS / "default_plan.md").read_text(encoding="utf-8")
    sizes = ["decode 16", "decode 64", "decode 256", "prefill 512", "prefill 4096", "prefill 16384"]
    for table in ("32 slots, kernels", "40 slots, kernels"):
        [change] = [line for line in rows(page, table) if line["plan"] == "search to the best peer"]
        assert all(float(change[size].strip("+%")) < 0 for size in sizes), table


def test_times_of_the_emulated_cluster_are_its_pages() -> None:
    said = re.search(
        r"(\d+) ms for a step .*?\n?(\d+) ms under EPLB's .*?, ([\d,]+) ms in index order", TEXT, re.DOTALL
    )
    assert said is not None
    page = (RESULTS / "cluster.md").read_text(encoding="utf-8")
    for figure in said.groups():
        assert re.search(rf"\b{figure.replace(',', '')}(\.\d+)?\b", page), figure
