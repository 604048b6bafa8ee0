"""The look of every figure: palette, frames, legend and heat map; and how a figure becomes an SVG.

The same rows give the same bytes, and few of them, since figures lie in git: no date, no random ids, text as
text. Lines differ in colour (Okabe and Ito, safe for colour-blind readers), in marker and in dashes, so that
they can be told apart in grey, too.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*<>hd"  # the three cycles have lengths that keep 84 lines apart
DASHES = ((), (4, 2), (1, 1.5), (5, 1.5, 1, 1.5))
PANEL = (4.4, 3.2)  # inches
MARGIN = 0.15  # inches round a figure, for a reader's font that is wider than ours
STYLE: dict[str, Any] = {
    "svg.hashsalt": "infini-bench",
    "svg.fonttype": "none",
    "font.size": 9.0,
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # equally wide; every text of an SVG names them
    "axes.grid": True,
}
STYLE |= {"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}


def drawn(draw: Callable[[], Figure | None]) -> str | None:
    """The SVG of the figure that ``draw`` makes in our style; None if it makes none."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        for key, value in STYLE.items():
            matplotlib.rcParams[key] = value  # type: ignore[index]
        figure = draw()
        if figure is None:
            return None
        text = io.StringIO()
        # a page as large as what stands on it: a layout knows no title that is wider than its panel
        undated = {"Date": None, "Creator": None}
        figure.savefig(text, format="svg", metadata=undated, bbox_inches="tight", pad_inches=MARGIN)
    return compact(text.getvalue())


def compact(svg: str) -> str:
    """The same picture in half the bytes: no indents, no turns by nothing, coordinates to a hundredth of a
    point; a style that several elements share is a class."""
    lines = "".join(line.strip() + "\n" for line in svg.splitlines())
    lines = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", lines)
    lines = re.sub(r"<\w[^>]*>", lambda tag: re.sub(r"\d+\.\d{3,}", _hundredths, tag[0]), lines)
    styles = Counter(re.findall(r'style="([^"]*)"', lines))
    names = {style: f"s{i}" for i, style in enumerate(style for style, n in styles.items() if n > 1)}
    for style, name in names.items():
        lines = lines.replace(f'style="{style}"', f'class="{name}"')
    rules = "".join(f".{name}{{{style}}}\n" for style, name in names.items())
    return lines.replace("</style>", rules + "</style>", 1)


def _hundredths(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def grid(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, Any]:
    """A figure of rows x columns axes, an array; size: of one, in inches."""
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def panels(
    count: int, columns: int, size: tuple[float, float] = PANEL, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` axes in rows of ``columns``."""
    columns = min(columns, count)
    figure, axes = grid(-(-count // columns), columns, size, **shared)
    for unused in axes.flat[count:]:
        unused.set_axis_off()
    return figure, [*axes.flat[:count]]


def look(number: int) -> dict[str, Any]:
    """Colour and marker of a figure's line or model of this number."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def dashes(number: int) -> dict[str, Any]:
    return {"dashes": DASHES[number % len(DASHES)]}


def legend(figure: Figure, axes: Iterable[Axes]) -> Figure:
    """One legend for all panels, below them; each name once, chance last."""
    found = [pair for each in axes for pair in zip(*each.get_legend_handles_labels(), strict=True)]
    names = {name: handle for handle, name in found if name != "chance"}
    names |= {name: handle for handle, name in found if name == "chance"}
    if names:
        letters = 15 * figure.get_figwidth()  # that a line holds, symbols as eight
        columns = max(1, int(letters // (8 + max(len(line) for name in names for line in name.splitlines()))))
        height = 0.2 * max(len(name.splitlines()) for name in names)
        figure.set_figheight(figure.get_figheight() + height * -(-len(names) // columns))
        figure.legend([*names.values()], [*names], loc="outside lower center", ncols=columns, frameon=False)
    return figure


def heat(
    axes: Axes,
    values: np.ndarray,
    names: tuple[Iterable[str], Iterable[str]],
    limits: tuple[float, float],
    digits: int = 0,
    size: float = 8,
) -> None:
    """A map of values (rows, columns) with the numbers in it; a dash where there is none (nan).

    names: of rows and columns. limits: the least and the largest of the scale. size: of the numbers, points.
    """
    low, high = limits
    axes.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        dark = np.isfinite(value) and value - low <= 0.5 * (high - low)
        text = "—" if np.isnan(value) else f"{value:.{digits}f}"
        axes.text(j, i, text, ha="center", va="center", color="white" if dark else "black", fontsize=size)
    rows, columns = (list(each) for each in names)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns)
    axes.grid(False)
