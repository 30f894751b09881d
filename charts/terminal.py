"""Images in terminals that show them: kitty's protocol, iTerm2's and Sixel, told by the environment and by the
terminal's own answer."""

from __future__ import annotations

import base64
import os
import re
import struct
import sys
import time
from collections.abc import Mapping
from typing import Literal, TextIO

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
