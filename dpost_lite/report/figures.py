"""Matplotlib figures of a run: each function takes values read from files and returns a `Figure`.

Figures are narrow, to stay readable on a phone. Each is saved twice: as SVG for the page, with text and axes in the
page's colour (light or dark), and as PNG on white. Draw and save them inside `with style():`.
"""

import io
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpost_lite.problems.records import Score
from dpost_lite.report.examples import RewardExample
from dpost_lite.report.health import Round
from dpost_lite.report.terminal import printable
from dpost_lite.runs.journal import Span

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # text and axes; replaced by the page's own colour
BLUE, ORANGE, GREEN, RED, GREY = "#3b82c4", "#d9822b", "#4a9d5b", "#c94f4f", "#8a8f98"
CYCLE = (BLUE, ORANGE, GREEN, RED, "#8b6fc0", GREY)
RAISED, LOWERED = "#6aaee8", "#f2994a"  # ends of the scale of rewards; the page's style has the same
WIDTH_IN, HEIGHT_IN = 4.6, 3.0
COLUMNS, CHAR_EM = 72, 0.602  # of text in a figure; the width of DejaVu Sans Mono's characters
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "dpost-lite", "text.parse_math": False, "font.family": "sans-serif",
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "grid.linewidth": 0.6, "legend.frameon": False, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "legend.labelcolor": INK, "lines.linewidth": 1.5, "figure.dpi": 100,
}  # fmt: skip


Piece = tuple[str, float | None]
"""Text and its shade, -1 to 1; None has no colour."""


def accuracy(runs: Mapping[str, Sequence[Score]], dev: Sequence[Score]) -> "Figure":
    """Strict accuracy by round, in percent with 95 % intervals; one line per run, the reported run first."""
    figure, axes = _new("accuracy on the test problems, %")
    names = list(dict.fromkeys(score.name for scores in runs.values() for score in scores))
    for place, (label, scores) in enumerate(runs.items()):
        at = [names.index(score.name) + 0.08 * place for score in scores]
        _with_intervals(axes, at, scores, label=label, color=CYCLE[place % len(CYCLE)])
    if dev:
        at = [names.index(score.name) - 0.08 for score in dev]
        _with_intervals(axes, at, dev, label="dev problems", color=GREY, linestyle="--")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")
    return figure


def curves(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], *, has_zero: bool = False) -> "Figure":
    """Curves of (optimiser step, value) by label; `has_zero` adds a line at 0.

    The curve labelled "chosen" is green, "rejected" red.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _new(title)
    colors = {**dict(zip(lines, itertools.cycle(CYCLE), strict=False)), "chosen": GREEN, "rejected": RED}
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=label, color=colors[label], marker="." if len(points) == 1 else "")
    if has_zero:
        axes.axhline(0, color=INK, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="best")
    return figure


def yields(rounds: Sequence[Round]) -> "Figure":
    """Share of problems whose sampled rationales are all right, mixed or all wrong, by sampling stage."""
    parts = [
        (f"round {one.number}, for {end}", getattr(one, f"for_{end}")) for one in rounds for end in ("pairs", "labels")
    ]
    names, stats = zip(*((name, stage) for name, stage in parts if stage), strict=True)
    figure, axes = _new("share of training problems, %", rows=len(stats))
    before = [0.0] * len(stats)
    for name, color in (("all_right", GREEN), ("mixed", ORANGE), ("all_wrong", RED)):
        shares = [100 * getattr(stage, name) for stage in stats]
        axes.barh(range(len(stats)), shares, left=before, color=color, label=name.replace("_", " "), height=0.6)
        before = [b + s for b, s in zip(before, shares, strict=True)]
    _rows(axes, names)
    axes.set_xlim(0, 100)
    _legend_below(axes, 3)
    return figure


def against_plan(title: str, planned: Mapping[str, float], measured: Mapping[str, float]) -> "Figure":
    """One bar per measured stage, with a mark at the planned value."""
    stages = list(measured)
    figure, axes = _new(title, rows=len(stages))
    axes.barh(range(len(stages)), list(measured.values()), color=BLUE, height=0.6, label="measured")
    marks = [(row, planned[stage]) for row, stage in enumerate(stages) if stage in planned]
    if marks:
        at = [value for _, value in marks]
        axes.plot(at, [row for row, _ in marks], "|", color=ORANGE, markersize=12, markeredgewidth=2, label="planned")
    _rows(axes, stages)
    axes.set_xlim(left=0)
    _legend_below(axes, 2)
    return figure


def timeline(spans: Sequence[Span]) -> "Figure":
    """When each stage was worked on, in minutes or hours of work; interrupted work is hatched.

    Time between two commands is not shown.
    """
    worked = sum(span.end - span.start for span in spans)
    unit, length = ("hours", 3600) if worked > 2 * 3600 else ("minutes", 60)
    stages = list(dict.fromkeys(span.stage for span in spans))
    figure, axes = _new(f"{unit} of work", rows=len(stages))
    before = 0.0
    for span in spans:
        axes.barh(
            stages.index(span.stage), (span.end - span.start) / length, left=before / length, height=0.6,
            color=BLUE if span.finished else "none", edgecolor=BLUE, hatch=None if span.finished else "////",
        )  # fmt: skip
        before += span.end - span.start
    _rows(axes, stages)
    axes.set_xlim(left=0)
    return figure


def rewards(title: str, shown: Sequence[RewardExample], scale: float) -> "Figure":
    """Rationales as text, each token on the colour of its reward; `scale` is the reward at the ends of the scale."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows: list[list[Piece]] = [[(title, None)], [], []]  # the scale is drawn in the third
    for example in shown:
        tokens = [(printable(token.text), token.shade) for token in example.tokens]
        rows += [[], *_wrapped(_plain(f"{example.question} (right: {example.answer})"), COLUMNS), []]
        rows += _wrapped([*_plain(example.kept), *tokens], COLUMNS)
    size = 72 * WIDTH_IN / ((COLUMNS + 2) * CHAR_EM)  # points
    figure = Figure(figsize=(WIDTH_IN, (len(rows) + 2) * 1.8 * size / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-1, COLUMNS + 1), ylim=(len(rows) + 0.5, -1.5))
    axes.set_axis_off()

    def write(column: float, row: int, text: str, shade: float | None, **how: Any) -> None:
        if shade is not None:
            color = RAISED if shade > 0 else LOWERED
            axes.add_patch(Rectangle((column, row - 0.45), len(text), 0.9, color=color, alpha=abs(shade), linewidth=0))
        axes.text(column, row, text, va="center_baseline", family="DejaVu Sans Mono", fontsize=size, **how)

    for number, row in enumerate(rows):
        column = 0
        for text, shade in row:
            write(column, number, text, shade, color=INK if shade is not None or number < 1 else "#5c6675")
            column += len(text)
    for step in range(-12, 13):
        write(COLUMNS / 2 + step - 0.5, 2, " ", step / 12)
    write(COLUMNS / 2, 2, "0", None, ha="center")
    write(COLUMNS / 2 - 14, 2, f"lowered ≤ {-scale:.2g}", None, ha="right")
    write(COLUMNS / 2 + 14, 2, f"≥ {scale:+.2g} raised", None)
    return figure


def _plain(text: str) -> list[Piece]:
    """Text without colour, a piece for each word: a long one would drift from its columns."""
    return [(part, None) for part in re.findall(r"\n| *[^\s]+| +", printable(text))]


def _wrapped(pieces: Sequence[Piece], columns: int) -> list[list[Piece]]:
    """Lay pieces of text out in lines of at most `columns` characters, broken between words if possible."""
    words: list[list[Piece]] = []
    for text, shade in pieces:
        for part in re.findall(rf"\n|[^\n]{{1,{columns}}}", text.replace("\t", " ")):
            if part == "\n" or not words or part[0] == " " or words[-1][0][0] == "\n":
                words.append([])
            words[-1].append((part, shade))
    lines: list[list[Piece]] = [[]]

    def make_room(*added: Piece) -> None:
        if lines[-1] and sum(len(text) for text, _ in (*lines[-1], *added)) > columns:
            lines.append([])

    for word in words:
        if word[0][0] == "\n":
            lines.append([])
            continue
        make_room(*word)
        for piece in word:
            make_room(piece)  # again, for a word that is longer than a line
            lines[-1].append(piece)
    return lines


def style() -> "AbstractContextManager[None]":
    """Return the context manager in which figures are drawn and saved."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def as_svg(figure: "Figure") -> str:
    """Return a figure as an inline SVG element that takes the page's text colour."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)  # of the svg element; the page sets the size


def save_png(figure: "Figure", file: Path) -> None:
    """Save a figure as PNG on white, at 200 dpi."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # letters of a rationale that the font lacks
        figure.savefig(file, dpi=200, facecolor="white")


def _new(title: str, rows: int = 0) -> "tuple[Figure, Axes]":
    """An empty figure, high enough for `rows` of bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, max(HEIGHT_IN, 1.1 + 0.24 * rows)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=9, loc="left")
    return figure, axes


def _with_intervals(axes: "Axes", at: Sequence[float], scores: Sequence[Score], **style: Any) -> None:
    rates = [100 * score.strict for score in scores]
    below = [100 * (score.strict - score.low) for score in scores]
    above = [100 * (score.high - score.strict) for score in scores]
    axes.errorbar(at, rates, yerr=[below, above], marker="o", markersize=4, capsize=3, **style)


def _rows(axes: "Axes", names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _legend_below(axes: "Axes", columns: int) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=columns)
