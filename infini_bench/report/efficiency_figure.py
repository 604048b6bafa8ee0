"""Figure of `efficiency`: times and memory against length, log-log, with the bounds of the machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from textwrap import fill
from typing import TYPE_CHECKING

from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from infini_bench.report.cells import Row, grouped, is_shape, settings, three
from infini_bench.report.style import grid, look
from infini_bench.units import format_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

PANELS = {  # (metric, position) -> what the axis says, and its unit
    ("forward_ms", None): ("forward, ms", 1),
    ("train_ms", None): ("training step, ms", 1),
    ("decode_ms", None): ("decoding, ms a token", 1),
    ("peak_bytes", "forward"): ("peak memory, forward, GiB", 1 << 30),
    ("peak_bytes", "train"): ("peak memory, training, GiB", 1 << 30),
    ("state_bytes", None): ("carried state, MiB", 1 << 20),
}
TIMES = ("ms", "token")  # as panels end that have a bound


def shape(row: Row) -> str:
    """b1-h8-d128-n2048; a peer's rows have it as their condition."""
    words = str(row["variant"]).split()[0]
    return words if is_shape(words) else str(row["condition"])


def name(row: Row) -> str:
    """A line's name: the peer's; or the model, what else is special about it, and its form."""
    first, *words = settings(row)
    if shape(row) != first:
        return " ".join([f"{first} (delta)" if "delta" in row["model"] else first, *words])
    return " ".join([row["model"], *words, *([row["condition"]] if row["condition"] else [])])


def efficiency_figure(rows: list[Row]) -> Figure:
    """A line of panels for each machine and shape, curves first, or points where one length was measured."""
    rows = [{**row, "shape": shape(row), "name": name(row)} for row in rows if row["value"]]
    groups = grouped(rows, ("scale", "device", "protocol", "shape"))
    groups.sort(key=lambda group: len(_lengths(group)) == 1)
    tall = [4.0 if len(_lengths(group)) > 1 else max(3.0, 0.3 * len(_lines(group))) for group in groups]
    size = (3.4, sum(tall) / max(len(tall), 1) or 3.0)
    # a column more than panels, in which the names of curves stand
    figure, axes = grid(max(len(groups), 1), len(PANELS) + 1, size, height_ratios=tall or [1.0])
    for (*line, beside), group in zip(axes, groups, strict=False):
        beside.set_axis_off()
        for ax, (metric, position) in zip(line, PANELS, strict=True):
            shown = [row for row in group if (row["metric"], row["position"]) == (metric, position)]
            if not shown:
                ax.set_axis_off()
            elif len(_lengths(group)) > 1:
                _panel(ax, _lines(group), shown, *PANELS[metric, position])
            else:
                _points(ax, group, shown, *PANELS[metric, position], named=ax is line[0])
        title = ", ".join(group[0][key] for key in ("shape", "protocol", "device", "scale"))
        alone = f", {format_length(group[0]['length'])} tokens" if len(_lengths(group)) == 1 else ""
        line[0].set_title(title + alone, fontsize=8, loc="left")
        found = [pair for ax in line for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
        if names := {words: handle for handle, words in found}:
            names = dict(sorted(names.items(), key=lambda pair: pair[0].startswith("bound")))  # last
            beside.legend([*names.values()], [*names], loc="upper left", fontsize=8, frameon=False)
    return figure


def _lengths(rows: list[Row]) -> list[int]:
    return sorted({row["length"] for row in rows})


def _lines(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in rows))


def _points(ax: Axes, group: list[Row], rows: list[Row], title: str, unit: float, named: bool) -> None:
    """A point with its interval for each of the group's lines, named without the words that all share."""
    lines = _lines(group)
    common = set.intersection(*({*line.split()[1:]} for line in lines)) if len(lines) > 1 else set()
    for row in rows:
        value, place = row["value"] / unit, lines.index(row["name"])
        low, high = (
            (row[key] if row[key] is not None else row["value"]) / unit for key in ("ci_low", "ci_high")
        )
        ax.errorbar([value], [place], xerr=[[value - low], [high - value]], capsize=2, **look(0))
        if "bound_ms" in row["extra"] and title.endswith(TIMES):
            bar = ax.plot([row["extra"]["bound_ms"]], [place], "|", color="0.3", markersize=9)
            bar[0].set_label("bound of the point in that row")
        ax.annotate(three(value), (high, place), (5, 0), textcoords="offset points", va="center", fontsize=7)
    short = [fill(" ".join(word for word in line.split() if word not in common), 32) for line in lines]
    ax.set_yticks(range(len(lines)), short if named else [""] * len(lines), fontsize=7)
    ax.set(xscale="log", xlabel=title, ylim=(len(lines) - 0.5, -0.5))
    ax.margins(x=0.3)
    _ticks(ax.xaxis)


def _panel(ax: Axes, names: list[str], rows: list[Row], title: str, unit: float) -> None:
    for line in grouped(rows, ("name",)):
        style = look(names.index(line[0]["name"]))
        color = style["color"]
        line = sorted(line, key=lambda row: row["length"])
        x, y = [row["length"] for row in line], [row["value"] / unit for row in line]
        ax.plot(x, y, label=line[0]["name"], linewidth=1.3, markersize=3.5, **style)
        band = [row for row in line if row["ci_low"] is not None]
        low, high = ([row[key] / unit for row in band] for key in ("ci_low", "ci_high"))
        ax.fill_between([row["length"] for row in band], low, high, color=color, alpha=0.2, linewidth=0)
        bound = [(row["length"], row["extra"]["bound_ms"]) for row in line if "bound_ms" in row["extra"]]
        if bound and title.endswith(TIMES):
            alone = "_" if len(bound) == 1 else None  # a line of one point is none
            ax.plot(*zip(*bound, strict=True), color=color, linewidth=0.9, linestyle=":", marker=alone)
            ax.plot(
                [], [], color="0.3", linewidth=0.9, linestyle=":", label="bound of the line of that colour"
            )
    ticks = _lengths(rows)
    ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel=title)
    bottom, top = ax.get_ylim()
    if top < 10 * bottom:  # a logarithm over less than a decade makes mountains of noise
        middle = (bottom * top) ** 0.5
        ax.set_ylim(middle / 10**0.5, middle * 10**0.5)
    _ticks(ax.yaxis)
    ax.set_xticks(ticks, [format_length(n) for n in ticks], fontsize=7)
    ax.minorticks_off()


def _ticks(axis: Axis) -> None:
    """Round numbers, also where a logarithm spans less than a decade; over many, powers of ten alone."""
    low, high = axis.get_view_interval()
    spans = {2.5: (), 20: (1, 2, 5), 300: (1, 3), math.inf: (1,)}
    subs = next(subs for span, subs in spans.items() if high < span * low)
    axis.set_major_locator(LogLocator(subs=subs, numticks=6) if subs else MaxNLocator(4))
    axis.set_major_formatter(lambda x, _: f"{x:,g}")
    axis.set_minor_locator(NullLocator())


FIGURES: dict[str, Callable[[list[Row]], Figure]] = {"efficiency": efficiency_figure}
