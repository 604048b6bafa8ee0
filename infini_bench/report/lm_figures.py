"""Figures of language models: loss along the document, and the gates of every head and layer.

A figure function takes tidy rows of its table and returns a matplotlib Figure; its caller writes the file.
"""

from __future__ import annotations

from collections.abc import Callable
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from infini_bench.report import gates, paper
from infini_bench.report.cells import Line, Row, find, grouped, settings
from infini_bench.report.compare import FLOOR, LESS
from infini_bench.report.style import COLOURS, dashes, grid, heat, legend, look
from infini_bench.units import format_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHEET = ("scale", "device", "dataset", "split", "protocol")
LINE = (*SHEET, "model", "variant")  # what the rows of a curve share
LEAST = 16  # position from which losses are drawn: before it they are those of a handful of tokens


def position_figure(rows: list[Row]) -> Figure:
    """Loss as trained against the position in the document, a line of panels for each corpus and machine.

    Left the loss; far positions are those of few, long documents. Right the same less local_block's, in which
    the choice of documents cancels. A model that was trained with several settings is drawn with those of the
    least loss; the table has all. Vertical lines: a segment and two, where a window of the own segment and
    Transformer-XL's end.
    """
    own = [row for row in rows if row["condition"] is None and row["value"] is not None]
    own = [row for row in own if row["position"].isdecimal() and int(row["position"]) >= LEAST]
    groups = grouped([row for row in own if row["metric"] == "loss"], SHEET)
    models = list(dict.fromkeys(row["model"] for row in own))
    figure, axes = grid(max(len(groups), 1), 2, (5.4, 3.2))
    for (left, right), group in zip(axes, groups, strict=False):
        for alike in grouped(group, ("model",)):
            line = min(grouped(alike, ("variant",)), key=lambda line: np.mean([row["value"] for row in line]))
            less = [row for row in own if row["metric"] == LESS and all(row[k] == line[0][k] for k in LINE)]
            for ax, curve in ((left, line), (right, less)):
                _curve(ax, curve, models.index(line[0]["model"]))
        right.axhline(0, color="0.3", linewidth=0.8)
        read = "joined to one stream" if group[0]["protocol"] else "by document"
        first = group[0]
        title = f"{first['dataset']} ({first['split']}), {read}, {first['scale']}, {first['device']}"
        left.set_title(title, fontsize=8, loc="left")
        left.set_ylabel("nats a token")
        right.set_ylabel(f"nats a token less {FLOOR}'s")
        _positions(left, group)
        _positions(right, group)
    return legend(figure, axes.flat)


def _positions(ax: Axes, rows: list[Row]) -> None:
    for segments in (1, 2):
        end = segments * rows[0]["config"]["memory"]["segment"]
        ax.axvline(end, color="0.6", linewidth=0.8)
        words, place = ("segment" if segments == 1 else "two"), ("data", "axes fraction")
        name = ax.annotate(words, (end, 0.98), xycoords=place, ha="right", va="top", fontsize=6)
        name.set(annotation_clip=True, in_layout=False)  # where the axis ends before, it is not shown
    places = sorted({int(row["position"]) for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(places[::2], [format_length(place) for place in places[::2]])
    ax.set(xlim=(places[0] / 1.3, places[-1] * 1.3), xlabel="position, tokens")


def _curve(ax: Axes, line: Line, number: int) -> None:
    if not line:  # local_block's own, less itself
        return
    line = sorted(line, key=lambda row: int(row["position"]))
    points = [(int(row["position"]), row["value"]) for row in line]
    style = look(number) | dashes(number // len(COLOURS))
    ax.plot(*zip(*points, strict=True), markersize=3, label=line[0]["model"], **style)
    known = [row for row in line if row["ci_low"] is not None]
    if len(known) > 1:
        places, low, high = ([float(row[key]) for row in known] for key in ("position", "ci_low", "ci_high"))
        ax.fill_between(places, low, high, color=style["color"], alpha=0.05, linewidth=0)


def gates_figure(rows: list[Row]) -> Figure:
    """Figure 3: a heat map for each model and start policy, the paper's first; below it the way there. Frozen
    gates, which go nowhere, are left out."""
    lines = gates.lines_of([row for row in rows if row["config"]["memory"].get("gate_frozen") is None])
    columns = min(len(lines) + 1, 4)
    blocks = -(-(len(lines) + 1) // columns)
    figure, axes = grid(2 * blocks, columns, (3.2, 2.7))
    for ax in axes.flat:
        ax.set_axis_off()
    _heat(axes[0, 0], paper.FIGURE3, "Munkhdalai et al. 2024, Figure 3\n(rows as printed)")
    for place, line in enumerate(lines, 1):
        block, column = divmod(place, columns)
        row = find(line, "gate")
        assert row is not None  # lines_of keeps no other
        extra = row["extra"]
        name = fill(" ".join([row["model"], *settings(row)]), 36)
        title = f"{name}\n{row['dataset']}, {row['scale']}, seed {extra['seed']}"
        _heat(axes[2 * block, column], extra["gates"], title)
        _way(axes[2 * block + 1, column], line)
    return legend(figure, axes.flat)


def _heat(ax: Axes, values: gates.Gates, title: str) -> None:
    ax.set_axis_on()
    numbers = [[str(n + 1) for n in range(count)] for count in (len(values), len(values[0]))]
    heat(ax, np.array(values), (numbers[0], numbers[1]), (0, 1), 1, 6)
    ax.set_title(title, fontsize=7)
    ax.set(xlabel="head", ylabel="layer")


def _way(ax: Axes, line: Line) -> None:
    """Heads of each kind over training."""
    ax.set_axis_on()
    for number, kind in enumerate(gates.KINDS):
        points = gates.history(line, kind)
        style = look(number) | dashes(number)
        ax.plot(*zip(*points, strict=True), markersize=3, label=kind.replace("_", " "), **style)
    ax.set(xlabel="step", ylabel="heads, %", ylim=(-3, 103))


FIGURES: dict[str, Callable[[list[Row]], Figure]] = {
    "lm_position": position_figure,
    "figure3_gates": gates_figure,
}
