"""Charts in terminals: as images where they are shown (kitty's protocol, iTerm2's and Sixel, told by the environment
and by the terminal's own answer), in characters in logs, pipes and other terminals."""

from __future__ import annotations

import base64
import math
import os
import re
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Literal, TextIO

import numpy as np

from .._types import FloatArray
from .svg import axis_form

Protocol = Literal["kitty", "iterm2", "sixel"]
WAIT = 0.5
"""Seconds that a terminal has to answer; over a slow line it may take longer, and shows characters."""
QUESTION = b"\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\\x1b[c"
"""Whether it knows kitty's images, and what it is, which every terminal answers: silence on the first is a no."""
CHUNK = 4096
COLOURS = 256


def protocol(out: TextIO, environment: Mapping[str, str] = os.environ) -> Protocol | None:
    """What shows images where `out` goes; None in pipes and files, in multiplexers, and where nothing answers."""
    if not out.isatty() or environment.get("TERM", "dumb") == "dumb":
        return None
    if environment.get("TMUX") or environment.get("TERM", "").startswith(("screen", "tmux")):
        # They keep the answers of the terminal behind them, which may be several.
        return None
    if environment.get("KITTY_WINDOW_ID") or environment.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if environment.get("TERM_PROGRAM") == "iTerm.app" or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return _answered()


def _answered() -> Protocol | None:
    """What the terminal itself says. It is asked where both ends of it are ours to use."""
    try:
        import termios
        import tty
    except ImportError:
        return None
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return None
    try:
        if os.getpgrp() != os.tcgetpgrp(terminal):
            # In the background a question would stop this process.
            return None
        before = termios.tcgetattr(terminal)
        try:
            tty.setcbreak(terminal, termios.TCSANOW)
            os.write(terminal, QUESTION)
            answer = _read_answer(terminal)
        finally:
            termios.tcsetattr(terminal, termios.TCSANOW, before)
    except (OSError, termios.error):
        return None
    finally:
        os.close(terminal)
    if b"_Gi=31;OK" in answer:
        return "kitty"
    attributes = re.search(rb"\x1b\[\?([\d;]*)c", answer)
    return "sixel" if attributes is not None and b"4" in attributes[1].split(b";")[1:] else None


def _read_answer(terminal: int) -> bytes:
    import select

    answer, until = b"", time.monotonic() + WAIT
    while not re.search(rb"\x1b\[\?[\d;]*c", answer):
        ready, _, _ = select.select([terminal], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            break
        answer += os.read(terminal, 1024)
    return answer


def pixels_across(out: TextIO) -> int:
    """Pixels of a line of the terminal; by 10 a character where it does not say."""
    columns, pixels = 80, 0
    try:
        import fcntl
        import termios

        _, columns, pixels, _ = struct.unpack("HHHH", fcntl.ioctl(out.fileno(), termios.TIOCGWINSZ, b"\0" * 8))
    except (ImportError, OSError):
        pass
    return pixels or 10 * (columns or 80)


def encoded(image: bytes, how: Protocol) -> str:
    """A PNG as the terminal takes it.

    Raises:
        ImportError: Sixel needs the extra `plot`.
    """
    if how == "sixel":
        return _sixel(image)
    text = base64.b64encode(image).decode()
    if how == "iterm2":
        return f"\x1b]1337;File=inline=1;size={len(image)};preserveAspectRatio=1:{text}\x07\n"
    pieces = [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]
    last = len(pieces) - 1
    # Quiet (q=2): an answer would stand on the shell's command line.
    heads = [f"{'a=T,f=100,q=2,' if number == 0 else ''}m={int(number < last)}" for number in range(len(pieces))]
    return "".join(f"\x1b_G{head};{piece}\x1b\\" for head, piece in zip(heads, pieces, strict=True)) + "\n"


def _sixel(image: bytes) -> str:
    """Bands of six rows; in each, a line a colour."""
    import io

    import numpy as np
    from PIL import Image

    picture = Image.open(io.BytesIO(image)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    palette = np.array(picture.getpalette(), dtype=np.int64).reshape(-1, 3)
    pixels = np.asarray(picture)
    tall, wide = pixels.shape
    percent = (palette * 100 + 127) // 255
    colours = "".join(f"#{i};2;{r};{g};{b}" for i, (r, g, b) in enumerate(percent.tolist()))
    parts = [f'\x1bP0;1q"1;1;{wide};{tall}', colours]
    for top in range(0, tall, 6):
        band = pixels[top : top + 6]
        bits = (1 << np.arange(len(band)))[:, None]
        lines = []
        for colour in np.unique(band).tolist():
            codes = ((band == colour) * bits).sum(axis=0) + 63
            lines.append(f"#{colour}{_run_lengths(codes)}")
        parts.append("$".join(lines) + "-")
    return "".join(parts) + "\x1b\\\n"


def _run_lengths(codes: object) -> str:
    import numpy as np

    values = np.asarray(codes)
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    lengths = np.diff(np.concatenate([starts, [len(values)]]))
    return "".join(
        f"!{length}{chr(code)}" if length > 3 else chr(code) * length
        for code, length in zip(values[starts].tolist(), lengths.tolist(), strict=True)
    )


def show(image: bytes, how: Protocol, out: TextIO = sys.stdout) -> None:
    """Writes the image where the cursor is."""
    out.write(encoded(image, how))
    out.flush()


LEVELS = "▁▂▃▄▅▆▇█"
WIDTH = 48
"""Characters of a picture beside its labels."""
MOST_ROWS = 64
ROWS = 10
LONGEST_NAME = 40


def text_map(names: Sequence[str], values: FloatArray, low: float, high: float) -> list[str]:
    """A row a name, a character a column of [rows, columns] (or some, drawn by the greatest of them), from low to high;
    at the right the row's greatest. Of more than `MOST_ROWS` rows the first."""
    # Neighbours are drawn by the worse of them: a mean would hide what is looked for.
    columns = [part.max(axis=1) for part in np.array_split(values, min(values.shape[1], WIDTH), axis=1)]
    wide = max(map(len, names))
    lines = []
    for row, name in enumerate(names[:MOST_ROWS]):
        cells = "".join(_level((column[row] - low) / (high - low)) for column in columns)
        lines.append(f"{name:<{wide}}  {cells}  {values[row].max():.2f}")
    return [*lines, *([f"... and {len(names) - MOST_ROWS} more"] if len(names) > MOST_ROWS else [])]


def text_histograms(samples: Mapping[str, FloatArray], low: float, high: float) -> list[str]:
    """A line a name: where its values lie between low and high, the median as |."""
    shown, span = {_short(name): values for name, values in samples.items()}, (high - low) or 1.0
    wide = max(map(len, shown))
    lines = []
    for name, values in shown.items():
        counts, _ = np.histogram(values, bins=WIDTH - 8, range=(low, low + span))
        top = max(1, int(counts.max()))
        cells = [" " if not count else LEVELS[int((len(LEVELS) - 1) * count / top)] for count in counts]
        cells[min(len(cells) - 1, int((np.median(values) - low) / span * len(cells)))] = "|"
        lines.append(f"{name:<{wide}}  {''.join(cells)}".rstrip())
    return lines


def text_lines(rows: Mapping[str, FloatArray], low: float, high: float) -> list[str]:
    """A line a name, a character a value (or some, drawn by the greatest), from low to high; at the right the
    greatest."""
    drawn = {_short(name): values for name, values in rows.items()}
    return text_map(list(drawn), np.stack(list(drawn.values())), low, high)


def text_points(points: Sequence[tuple[float, float, bool]], x_title: str, y_form: str) -> list[str]:
    """(x, y, best): the best as *, others as o."""
    if not points:
        return []
    left, right = min(x for x, _, _ in points), max(x for x, _, _ in points)
    low, high = min(y for _, y, _ in points), max(y for _, y, _ in points)
    left = 0.0 if 0.0 <= left < right - left else left
    grid = [[" "] * WIDTH for _ in range(ROWS)]
    # The best are drawn over others at their place.
    for x, y, best in sorted(points, key=lambda point: point[2]):
        row = 0 if high == low else round((high - y) / (high - low) * (ROWS - 1))
        grid[row][0 if right == left else round((x - left) / (right - left) * (WIDTH - 1))] = "*" if best else "o"
    write = axis_form([low, high], high - low)
    labels = [y_form.format(write(high)), *[""] * (ROWS - 2), y_form.format(write(low))]
    wide = max(10, *map(len, labels))
    lines = [f"{label:>{wide}} │{''.join(cells)}".rstrip() for label, cells in zip(labels, grid, strict=True)]
    first, last = f"{left:.6g}", "" if right == left else f"{right:.6g}"
    return [
        *lines,
        f"{'':>{wide}} └{'─' * WIDTH}",
        f"{'':>{wide + 2}}{first}{last:>{WIDTH - len(first)}}".rstrip(),
        f"{'':>{wide + 2}}{x_title}",
    ]


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def _level(share: float) -> str:
    return " " if math.isnan(share) else LEVELS[int(min(max(share, 0.0) * len(LEVELS), len(LEVELS) - 1.0))]
