"""The page: one HTML file with everything in it, which opens without a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...placement.files import write_text
from .build import Report
from .figures import Figure

TEMPLATES = Path(__file__).parent / "templates"


def write_page(report: Report, path: str | Path) -> None:
    """Renders the report and writes it whole or not at all."""
    write_text(path, render_page(report))


def render_page(report: Report) -> str:
    """The report as HTML."""
    return render("page.html.j2", report.figures, report=report)


def render(template: str, figures: Sequence[Figure], **context: Any) -> str:
    """A template with the style, the script and the plots' data inside."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    plots = {figure.key: {"data": figure.data, "layouts": figure.layouts} for figure in figures}
    return environment.get_template(template).render(
        **context,
        figures=figures,
        style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
        plots=Markup(_inside_script(plots)),
    )


def _inside_script(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "\\u2028")
