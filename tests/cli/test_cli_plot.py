"""`moeplace plot`, --plot and --plot-file: charts as files, as images in terminals, and in characters."""

from __future__ import annotations

import base64
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import CLUSTER, JUDGED, run, toy_model, toy_trace_folder

from moeplace.charts import terminal
from moeplace.charts.svg import number_axis
from moeplace.cli.report import distribution_figure


@pytest.fixture(autouse=True)
def _own_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEPLACE_DB", str(tmp_path / "store.db"))


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_trace_folder(tmp_path_factory.mktemp("toy") / "trace", toy_model())


@pytest.fixture(scope="module")
def plans(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with contiguous.json and eplb.json."""
    folder = tmp_path_factory.mktemp("plans")
    cluster = (*CLUSTER, "--slots", 12, "--solvers", "contiguous,eplb", *JUDGED)
    store = ("--db", folder / "store.db")
    done = run("compare", trace, *cluster, *store, "-o", folder, "--plot-file", folder / "compared.svg")
    assert done.code == 0, done.err
    return folder


def test_plans_and_a_record_are_drawn_in_characters(trace: Path, plans: Path) -> None:
    done = run("plot", plans / "eplb.json", trace, *JUDGED)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    rows = [line for line in lines if line.startswith("node ")]
    assert len(rows) == 2 * 4
    # Device by device the largest load over layers, as the characters before it show.
    assert all(set(row.split()[4]) <= set("▁▂▃▄▅▆▇█") and float(row.split()[5]) > 0 for row in rows)
    curves = [line for line in lines if "|" in line and line.startswith(("contiguous", "eplb"))]
    assert len(curves) == 2
    assert max(map(len, rows + curves)) <= 80
    assert run("evaluate", plans / "eplb.json", trace, *JUDGED, "--no-store", "--plot").out.endswith(done.out)


def test_charts_are_files_in_the_form_that_their_ending_says(trace: Path, plans: Path, tmp_path: Path) -> None:
    compared = (plans / "compared.svg").read_text(encoding="utf-8")
    for title in ("Step time, decode 8", "Balance of layers", "Load by layer and device"):
        assert title in compared
    # Whoever opens it alone has the colours, and no script.
    assert "var(--" not in compared
    assert "<script" not in compared
    assert "data-chart" not in compared
    page = tmp_path / "record.html"
    assert run("plot", trace, "-o", page).code == 0
    assert "Load of experts" in page.read_text(encoding="utf-8")
    odd = run("plot", trace, "-o", tmp_path / "record.gif")
    assert "must end in .svg, .png or .html" in odd.err
    assert (odd.code, odd.out) == (1, "")


def test_pictures_are_png_files(plans: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    image = pytest.importorskip("PIL.Image")
    done = run("plot", plans / "eplb.json", "-o", tmp_path / "replicas.png")
    assert done.code == 0, done.err
    picture = image.open(tmp_path / "replicas.png").convert("RGB")
    colours = picture.getcolors(1 << 24)
    # Shades of the map, and black on white.
    assert {(255, 255, 255), (15, 58, 112)} <= {colour for _, colour in colours}


def test_without_what_makes_pictures_its_extra_is_named_before_the_work(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    done = run("plot", trace, "-o", tmp_path / "record.png")
    assert (done.code, "pip install 'moeplace[plot]'" in done.err) == (1, True)


def test_a_front_is_drawn_from_what_the_command_printed(trace: Path, tmp_path: Path) -> None:
    front = ("pareto", trace, *CLUSTER, *JUDGED, "-s", "eplb", "--redundant", "0,8", "--tolerate", "nothing", "--json")
    printed = run(*front)
    (tmp_path / "front.json").write_text(printed.out, encoding="utf-8")
    drawn = run("plot", tmp_path / "front.json").out
    assert "redundant slots a layer" in drawn
    by_slots = drawn.split("Step time over memory")[0]
    assert sum(line.count("*") + line.count("o") for line in by_slots.splitlines() if "│" in line) == 2


def test_what_was_printed_of_a_comparison_is_drawn_as_bars(trace: Path, plans: Path, tmp_path: Path) -> None:
    judged = run("evaluate", plans / "eplb.json", trace, *JUDGED, "--no-store", "--json")
    (tmp_path / "judged.json").write_text(judged.out, encoding="utf-8")
    bars = [line for line in run("plot", tmp_path / "judged.json").out.splitlines() if line.startswith(("eplb", "con"))]
    assert len(bars) == 2
    assert all("█" in bar or "░" in bar for bar in bars)


def test_what_cannot_be_drawn_says_why(trace: Path, plans: Path, tmp_path: Path) -> None:
    (tmp_path / "stats.json").write_text(run("stats", trace, "--json").out, encoding="utf-8")
    assert "`moeplace stats --json` has nothing to draw" in run("plot", tmp_path / "stats.json").err
    assert "both records" in run("plot", trace, trace).err
    assert run("solve", trace, *CLUSTER, "-s", "eplb", "--no-store", "-o", tmp_path / "once.json").code == 0
    assert "name its record too" in run("plot", tmp_path / "once.json").err
    assert "not a stored plan" in run("plot", "no-such-plan", trace).err


class Judged:
    def __init__(self, *milliseconds: float) -> None:
        self.step_seconds = np.array(milliseconds) / 1e3


def drawn(**evaluations: Judged) -> list[list[float]]:
    """Ticks of the horizontal axis of each chart."""
    figure = distribution_figure({"decode 8": evaluations}, "a", "b")  # type: ignore[dict-item]
    [choice] = figure.choices
    return [
        [float(text) for text in re.findall(r'y="371.0" text-anchor="middle">([\d.]+)</text>', panel.chart)]
        for panel in choice.panels
    ]


def test_an_axis_of_step_times_is_fitted_to_the_data_down_to_hundredths_of_a_microsecond() -> None:
    fitted, whole = drawn(a=Judged(78.64, 78.640004), b=Judged(78.640006, 78.64001))
    assert 3 <= len(set(fitted)) == len(fitted)
    assert 78.64 <= fitted[0] < fitted[-1] <= 78.640011
    # Beside it, how little that is of a step.
    assert max(whole) - min(whole) > 0.9


def test_an_axis_of_steps_that_differ_is_one() -> None:
    [ticks] = drawn(a=Judged(1.0, 2.0), b=Judged(1.5, 3.0))
    assert (ticks[0], ticks[-1]) == (1.0, 3.0)
    [same] = drawn(a=Judged(5.0, 5.0), b=Judged(5.0))
    assert len(set(same)) == len(same) >= 2


@pytest.mark.parametrize("low", [0.0, 1e-6, 78.64, 1e6])
@pytest.mark.parametrize("span", [1e-5, 1e-3, 1.0, 1e4])
def test_ticks_differ_in_what_is_written(low: float, span: float) -> None:
    texts = [text for _, text in number_axis(low, low + span).ticks]
    assert len(set(texts)) == len(texts) >= 3


def test_axes_of_what_is_counted_have_whole_ticks() -> None:
    assert [text for _, text in number_axis(0.0, 2.0, whole=True, enclosing=False).ticks] == ["0", "1", "2"]
    failures = number_axis(0.0, 2.16, whole=True)
    assert [text for _, text in failures.ticks] == ["0", "1", "2"]
    assert (failures.low, failures.high) == (0.0, 2.16)


def test_charts_side_by_side_are_drawn_in_the_size_they_are_shown_in() -> None:
    """Drawn in full width they were shown in half, with letters of half the size."""

    def widths(**evaluations: Judged) -> list[float]:
        figure = distribution_figure({"decode 8": evaluations}, "a", "b")  # type: ignore[dict-item]
        return [float(re.findall(r'viewBox="0 0 ([\d.]+)', panel.chart)[0]) for panel in figure.choices[0].panels]

    [whole] = widths(a=Judged(1.0, 2.0), b=Judged(1.5, 3.0))
    fitted, beside = widths(a=Judged(1.0, 1.001), b=Judged(1.0005, 1.001))
    assert fitted == beside == whole // 2


ASKS = "import sys; from moeplace.charts.terminal import protocol; print('is', protocol(sys.stdout))"


def asked(answer: bytes, **environment: str) -> tuple[str, bytes]:
    """What a program takes a terminal for, and what it sent to it, that gives this answer to questions."""
    import pty

    child, terminal_end = pty.fork()
    if child == 0:
        os.environ.update({"TERM": "xterm-256color"} | environment)
        for name in {"TMUX", "KITTY_WINDOW_ID", "TERM_PROGRAM", "LC_TERMINAL"} - environment.keys():
            os.environ.pop(name, None)
        os.execv(sys.executable, [sys.executable, "-c", ASKS])
    sent, answered = b"", False
    while not re.search(rb"is \w+\s", sent):
        try:
            sent += os.read(terminal_end, 1024)
        except OSError:
            break
        if terminal.QUESTION in sent and not answered:
            answered = os.write(terminal_end, answer) >= 0
    os.waitpid(child, 0)
    os.close(terminal_end)
    found = re.search(rb"is (\w+)\s", sent)
    assert found is not None, sent
    return found[1].decode(), sent


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals of Unix")
@pytest.mark.parametrize(
    ("answer", "environment", "shows"),
    [
        (b"\x1b[?62;4;22c", {}, "sixel"),
        (b"\x1b_Gi=31;OK\x1b\\\x1b[?62;22c", {}, "kitty"),
        (b"\x1b[?64;1;2;22c", {}, "None"),
        (b"", {}, "None"),
        (b"", {"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        (b"", {"TERM": "xterm-kitty"}, "kitty"),
        (b"\x1b[?62;4c", {"TMUX": "/tmp/tmux"}, "None"),
        (b"\x1b[?62;4c", {"TERM": "dumb"}, "None"),
    ],
)
def test_terminals_are_told_by_their_environment_and_their_answer(
    answer: bytes, environment: dict[str, str], shows: str
) -> None:
    told, sent = asked(answer, **environment)
    assert told == shows
    # Nothing is asked of those that are known, and of those that would print the question.
    assert (terminal.QUESTION in sent) == (not environment)


def test_nothing_is_asked_of_pipes_and_files(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        assert terminal.protocol(file, {"TERM": "xterm-kitty"}) is None


PICTURE = [[(255, 0, 0), (0, 0, 255), (0, 0, 255)], *([[(255, 255, 255)] * 3] * 6), [(0, 128, 0)] * 3]


def picture() -> bytes:
    """PICTURE as a PNG."""
    import io

    image = pytest.importorskip("PIL.Image")
    made = image.fromarray(np.array(PICTURE, dtype=np.uint8))
    file = io.BytesIO()
    made.save(file, "PNG")
    return file.getvalue()


def test_images_reach_terminals_whole() -> None:
    image = os.urandom(3 * terminal.CHUNK)
    kitty = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", terminal.encoded(image, "kitty"))
    assert base64.b64decode("".join(text for _, text in kitty)) == image
    assert [int(head[-1]) for head, _ in kitty] == [1] * (len(kitty) - 1) + [0]
    assert all(len(text) <= terminal.CHUNK for _, text in kitty)
    iterm2 = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+);[^:]*:(.*)\x07\n", terminal.encoded(image, "iterm2"))
    assert iterm2 is not None
    assert (int(iterm2[1]), base64.b64decode(iterm2[2])) == (len(image), image)


def test_sixel_has_every_pixel_in_its_colour() -> None:
    text = terminal.encoded(picture(), "sixel")
    head = re.match(r'\x1bP0;1q"1;1;(\d+);(\d+)', text)
    assert head is not None
    wide, tall = int(head[1]), int(head[2])
    palette = {n: rgb for n, *rgb in re.findall(r"#(\d+);2;(\d+);(\d+);(\d+)", text)}
    shown: list[list[Any]] = [[None] * wide for _ in range(tall)]
    body = re.sub(r"#\d+;2;\d+;\d+;\d+", "", text[head.end() : text.index("\x1b\\")])
    top, across, colour = 0, 0, ""
    for hue, times, sign, move in re.findall(r"#(\d+)|(?:!(\d+))?([?-~])|([$-])", body):
        colour = hue or colour
        if move:
            top, across = top + 6 * (move == "-"), 0
        for _ in range(int(times or 1) if sign else 0):
            for row in range(6):
                if ord(sign) - 63 >> row & 1:
                    shown[top + row][across] = tuple(round(int(part) * 2.55) for part in palette[colour])
            across += 1
    assert shown == [[pytest.approx(colour, abs=2) for colour in row] for row in PICTURE]
