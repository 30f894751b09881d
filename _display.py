"""How objects show themselves: a line where they stand among others, a screen when printed, a table in notebooks."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping

MOST_ROWS, WIDTH = 25, 110


class Displayed:
    """Gives `repr`, `str` and notebooks' form to a class that says its title and its rows in `_summary`."""

    def _summary(self) -> tuple[str, Mapping[str, str]]:
        """A title of some words, without the class's name, and what there is to know, by labels of a word or two."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._summary()[0]}>"

    def __str__(self) -> str:
        title, rows = self._summary()
        shown = list(rows.items())[:MOST_ROWS]
        width = max((len(label) for label, _ in shown), default=0)
        lines = [f"{type(self).__name__}: {title}"]
        for label, text in shown:
            text = textwrap.shorten(text, 2 * WIDTH, placeholder=" ...")
            lines += textwrap.wrap(
                text, WIDTH, initial_indent=f"  {label:<{width}}  ", subsequent_indent=" " * (width + 4)
            )
        return "\n".join([*lines[:29], *(["  ..."] if len(rows) > len(shown) or len(lines) > 29 else [])])

    def _repr_html_(self) -> str:
        title, rows = self._summary()
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(label)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for label, text in list(rows.items())[:MOST_ROWS]
        )
        return f"<b>{html.escape(type(self).__name__)}</b>: {html.escape(title)}<table>{cells}</table>"


def plural(count: int, word: str) -> str:
    """`1 node`, `1,024 nodes`."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def span(values: tuple[int, ...]) -> str:
    """`3-60` for a run of numbers, `1, 3, 5` for a few, their ends and number otherwise."""
    if len(values) > 1 and values == tuple(range(values[0], values[-1] + 1)):
        return f"{values[0]}-{values[-1]}"
    if len(values) <= 8:
        return ", ".join(map(str, values))
    return f"{values[0]}, {values[1]}, ..., {values[-1]} ({len(values)})"


def names(values: tuple[str, ...]) -> str:
    """Up to eight names, and how many more there are."""
    named = [value or "(untagged)" for value in values[:8]]
    return ", ".join(named) + (f" and {len(values) - 8} more" if len(values) > 8 else "")


def data_size(count: float) -> str:
    """`147 kB`, `5.9 MB`, `1,200 GB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:,.3g} {name}" if count < 1e12 else f"{count / unit:,.0f} {name}"
    return f"{count:,.0f} bytes"
