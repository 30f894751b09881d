"""Charts as files of their own: SVG with its style inside, and PNG made of it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path

from .svg import CHARACTER, STATIC

MARGIN, HEAD, LINE = 16, 26, 18
FONTS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts")


def stacked(charts: Sequence[tuple[str, str, str]]) -> str:
    """One SVG of charts below each other, each (title, caption, SVG), in the light palette."""
    sized = [(title, caption, chart, *_size(chart)) for title, caption, chart in charts]
    width = max((wide for *_, wide, _ in sized), default=0.0) + 2 * MARGIN
    y, parts = float(MARGIN), []
    for title, caption, chart, _, tall in sized:
        parts.append(f'<text class="title" x="{MARGIN}" y="{y + 16:.0f}">{escape(title)}</text>')
        y += HEAD
        for row in textwrap.wrap(caption, int((width - 2 * MARGIN) / CHARACTER)):
            parts.append(f'<text class="caption" x="{MARGIN}" y="{y + 12:.0f}">{escape(row)}</text>')
            y += LINE
        # What only a page's script reads is left out.
        inner = re.sub(r' data-chart="[^"]*"', "", chart, count=1)
        parts.append(inner.replace("<svg ", f'<svg x="{MARGIN}" y="{y + 6:.0f}" ', 1))
        y += tall + 6 + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" width="{width:.0f}" height="{y:.0f}" '
        f'viewBox="0 0 {width:.0f} {y:.0f}"><style>{_style()}</style>'
        f'<rect class="paper" width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    )


def png(svg: str, zoom: float = 1.0) -> bytes:
    """A picture of an SVG that `stacked` made, `zoom` pixels for one of its units.

    Raises:
        ImportError: the extra `plot` is not installed. RuntimeError: this machine has no fonts to write with.
    """
    import resvg_py

    folders = [folder for folder in (Path(name).expanduser() for name in FONTS) if folder.is_dir()]
    family = next((name for name, file in FAMILIES if any(_fonts(folder, file) for folder in folders)), None)
    if not any(_fonts(folder, "*.[to]tf") for folder in folders) and not Path("/System").is_dir():
        raise RuntimeError(
            f"there are no fonts on this machine (none in {', '.join(FONTS)}): install some (fonts-dejavu-core), or "
            "write .svg or .html"
        )
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=zoom, sans_serif_family=family, font_family=family))


FAMILIES = (("DejaVu Sans", "DejaVuSans.ttf"), ("Liberation Sans", "LiberationSans-Regular.ttf"))
"""What Linux machines have for sans-serif, with a file of it."""


@cache
def _fonts(folder: Path, pattern: str) -> bool:
    return next(folder.rglob(pattern), None) is not None


def _size(chart: str) -> tuple[float, float]:
    found = re.search(r'width="([\d.]+)" height="([\d.]+)"', chart)
    assert found is not None
    return float(found[1]), float(found[2])


def _style() -> str:
    """The charts' style sheet with its light colours written in: not every viewer knows variables."""
    text = (STATIC / "charts.css").read_text(encoding="utf-8")
    head, _, rest = text.partition("}")
    colours = dict(re.findall(r"(--[\w-]+): ([^;]+);", head))
    # The first block names the light colours, the second those for the dark; what is shown over a page follows.
    rest = rest[rest.index("\n}\n") + 3 :]
    rules = [line for line in rest.splitlines() if not line.startswith(("#tip", ".chart[data-chart"))]
    style = re.sub(r"var\((--[\w-]+)\)", lambda found: colours[found[1]], "\n".join(rules))
    return (
        style.replace("system-ui, -apple-system, ", "")
        + f".paper {{ fill: {colours['--paper']}; }} .caption {{ fill: {colours['--muted']}; }} "
        + f".title {{ fill: {colours['--text']}; font-size: 15px; font-weight: bold; }}"
    )
