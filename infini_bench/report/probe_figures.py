"""Figures of what is asked of untrained models: carried state, read-back, gradient reach.

A figure function takes tidy rows of its table and returns a matplotlib Figure; its caller writes the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from statistics import fmean
from textwrap import fill
from typing import TYPE_CHECKING, Any

from infini_bench.report.cells import Line, Row, grouped
from infini_bench.report.style import dashes, grid, legend, look
from infini_bench.schema import KEYS
from infini_bench.units import format_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def footprint_figure(rows: list[Row]) -> Figure:
    """Floats carried against tokens read, one panel a scale; what carries nothing is named below."""
    panels = grouped(rows, ("scale", "device"))
    figure, axes = grid(1, len(panels), (5.6, 3.8))
    for ax, own in zip(axes[0], panels, strict=True):
        floats = [row for row in own if row["metric"] == "state_floats"]
        empty = _curves(ax, floats, "length", lambda line: (_label(line[0]), _look(rows, line[0]["model"])))
        ax.set(xscale="log", yscale="log", title=f"scale {own[0]['scale']}", xlabel="tokens read")
        ticks = sorted({row["length"] for row in floats})
        ax.set_xticks(ticks, [format_length(n) for n in ticks], minor=False)
        ax.minorticks_off()
        _end_labels(ax, [row for row in floats if row["length"] == ticks[-1] and row["value"]])
        if empty:
            ax.set_title(f"carry nothing: {', '.join(empty)}", fontsize=7, loc="left", y=-0.24)
    axes[0][0].set_ylabel("floats that cross a boundary")
    return figure


def capacity_figure(rows: list[Row]) -> Figure:
    """Cosine and relative error against pairs / D: a column for each kind of keys, two rows for each variant.

    A colour for each model, dashes for the number of writes in a segment.
    """
    kinds = [kind for kind in KEYS if any(row["condition"] == kind for row in rows)]
    cuts = sorted(
        {row["protocol"] for row in rows}, key=lambda name: (not name[0].isdigit(), len(name), name)
    )
    groups = grouped(rows, ("scale", "device", "variant"))
    metrics = {"cosine": "cosine", "relative_error": "relative error"}
    figure, axes = grid(2 * len(groups), len(kinds), (2.5, 2.2), sharey="row")

    def style(line: Line) -> tuple[str, dict[str, Any]]:
        cut = line[0]["protocol"]
        look = _look(rows, line[0]["model"]) | dashes(cuts.index(cut))
        return f"{line[0]['model']}, {cut}", look

    for g, own in enumerate(groups):
        for (m, metric), (column, kind) in product(enumerate(metrics), enumerate(kinds)):
            ax = axes[2 * g + m][column]
            shown = [row for row in own if (row["metric"], row["condition"]) == (metric, kind)]
            _curves(ax, shown, "position", style)
            ax.set_xscale("log", base=2)
            ticks = sorted({float(row["position"]) for row in shown})
            ax.set_xticks(ticks, [str(Fraction(x).limit_denominator(64)) for x in ticks], fontsize=8)
            if metric == "cosine":
                ax.set_ylim(-0.05, 1.05)
            else:
                ax.axhline(1, color="#888888", linewidth=0.8, zorder=0)  # as far off as a read of zero
            if not (g or m):
                ax.set_title(kind)
            if 2 * g + m == len(axes) - 1:
                ax.set_xlabel("pairs / D")
        variant = own[0]["variant"] or "as in the paper"
        for m, title in enumerate(metrics.values()):
            axes[2 * g + m][0].set_ylabel(f"{title}\n({variant})" if len(groups) > 1 else title)
    return legend(figure, axes.flat)


def reach_figure(rows: list[Row]) -> Figure:
    """Gradient norm against segments crossed, both logarithmic; exact zeros lie on a line below."""
    groups = grouped(rows, ("scale", "device"))
    fillers = list(dict.fromkeys(row["condition"] for row in rows))
    figure, axes = grid(len(groups), len(fillers), (4.6, 3.8), sharey="row")
    for g, own in enumerate(groups):
        norms = [row for row in own if row["metric"] == "gradient_norm"]
        floor = 0.3 * min((row["value"] for row in norms if row["value"]), default=1.0)
        for column, filler in enumerate(fillers):
            ax, shown = axes[g][column], [row for row in norms if row["condition"] == filler]
            none = _curves(
                ax,
                shown,
                "position",
                lambda line: (_label(line[0]), _look(rows, line[0]["model"])),
                floor,
            )
            ax.set(xscale="log", yscale="log", title=f"{filler} filler, scale {own[0]['scale']}")
            ticks = sorted({int(row["position"]) for row in shown})
            ax.set_xticks(ticks, [str(n) for n in ticks])
            ax.minorticks_off()
            ax.set_xlabel("segments between write and loss")
            ax.axhline(floor, color="#888888", linewidth=0.8, linestyle=":", zorder=0)
            text = fill("exactly 0" + (f"; at every distance: {', '.join(none)}" if none else ""), 56)
            share = 0.02 + 0.045 * len(text.split("\n"))  # of the height, for the words below the line
            ax.set_ylim(bottom=floor * (floor / ax.get_ylim()[1]) ** (share / (1 - share)))
            ax.annotate(text, (ticks[0], floor), (0, -2), textcoords="offset points", fontsize=7, va="top")
        axes[g][0].set_ylabel("gradient norm at the write")
    return legend(figure, axes.flat)


FIGURES: dict[str, Callable[[list[Row]], Figure]] = {
    "table1_memory": footprint_figure,
    "diag_memory": capacity_figure,
    "diag_gradients": reach_figure,
}


def _curves(
    ax: Axes,
    rows: list[Row],
    x: str,
    style: Callable[[Line], tuple[str, dict[str, Any]]],
    floor: float | None = None,
) -> list[str]:
    """A line with its interval for each model, variant and cut. Returns the labels of those that are all 0.

    floor: where a zero is drawn on a logarithmic axis; unset: as it is.
    """
    empty = []
    for line in grouped(rows, ("model", "variant", "protocol")):
        label, look = style(line)
        line = sorted((row for row in line if row["value"] is not None), key=lambda row: float(row[x]))
        if not any(row["value"] for row in line):
            empty.append(label)
            continue
        places = [float(row[x]) for row in line]
        values = [row["value"] or floor or 0.0 for row in line]
        ax.plot(places, values, label=label, linewidth=1.4, markersize=3.5, **look)
        band = [row for row in line if row["ci_low"] is not None and row["value"]]
        lows = [max(row["ci_low"], floor or row["ci_low"]) for row in band]
        spots, highs = [float(row[x]) for row in band], [row["ci_high"] for row in band]
        ax.fill_between(spots, lows, highs, color=look["color"], alpha=0.2, linewidth=0)
    return empty


def _look(rows: list[Row], model: str) -> dict[str, Any]:
    """Colour and marker of a model among those of the figure."""
    names = sorted({row["model"]: None for row in rows}, key=lambda name: not name.startswith("infini"))
    return look(names.index(model))


def _label(row: Row) -> str:
    return row["model"] + (f" ({row['variant']})" if row["variant"] else "")


def _end_labels(ax: Axes, rows: list[Row]) -> None:
    """Names beside the ends of a logarithmic panel's lines, each joined to it; equal ones share a text."""
    low, high = (math.log(limit) for limit in ax.get_ylim())
    groups = sorted(grouped(rows, ("value",)), key=lambda same: same[0]["value"])
    texts = [",\n".join(_label(row).replace(" (", "\n(") for row in same) for same in groups]
    ends = [(math.log(same[0]["value"]) - low) / (high - low) for same in groups]
    places = apart(ends, [0.01 + 0.045 * len(text.split("\n")) for text in texts])  # shares of the height
    arrow = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 0}
    style: dict[str, Any] = {"textcoords": "axes fraction", "va": "center", "fontsize": 7}
    for same, text, place in zip(groups, texts, places, strict=True):
        end = same[0]["length"], same[0]["value"]
        ax.annotate(text, end, (1.05, place), annotation_clip=False, arrowprops=arrow, **style)


def apart(wanted: list[float], heights: list[float]) -> list[float]:
    """Middles of things of these heights, in their order and without overlap, as near to the wanted ones as
    that allows (least squares): what would overlap is stacked.
    """
    offsets = [sum(heights[:i]) + height / 2 for i, height in enumerate(heights)]
    stacks: list[list[float]] = []  # where each thing would have the lower end of its stack
    for place, offset in zip(wanted, offsets, strict=True):
        stacks.append([place - offset])
        while len(stacks) > 1 and fmean(stacks[-1]) < fmean(stacks[-2]):
            stacks[-2:] = [stacks[-2] + stacks[-1]]
    bases = [fmean(stack) for stack in stacks for _ in stack]
    return [base + offset for base, offset in zip(bases, offsets, strict=True)]
