"""The page: one HTML file with everything in it, which opens without a network."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from ...charts.svg import STATIC
from ...placement.files import write_text
from .build import Report

TEMPLATES = Path(__file__).parent / "templates"


def write_page(report: Report, path: str | Path) -> None:
    """Renders the report and writes it whole or not at all."""
    write_text(path, render_page(report))


def render_page(report: Report) -> str:
    """The report as HTML."""
    return render("page.html.j2", figures=report.figures, report=report)


def render(template: str, **context: Any) -> str:
    """A template with the style and the script inside, which are all that the page runs: their hashes say so."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    style = "\n" + "".join(path.read_text(encoding="utf-8") for path in (STATIC / "charts.css", TEMPLATES / "page.css"))
    script = "\n" + (STATIC / "charts.js").read_text(encoding="utf-8")
    return environment.get_template(template).render(
        **context,
        style=Markup(style),
        script=Markup(script),
        hashes={"style": _hash(style), "script": _hash(script)},
    )


def _hash(text: str) -> str:
    """As a Content-Security-Policy names what an element holds."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
