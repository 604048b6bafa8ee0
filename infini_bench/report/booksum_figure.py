"""Figure 4: overall against input length, and what each further length brings to books that are longer."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from infini_bench.report import paper
from infini_bench.report.booksum import spread
from infini_bench.report.cells import Line, Row, grouped, settings
from infini_bench.report.style import grid, legend, look
from infini_bench.report.variants import weightless
from infini_bench.units import format_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHEET = ("scale", "device", "dataset", "split", "position")


def booksum_figure(rows: list[Row]) -> Figure | None:
    """Two panels for each sheet and kind of reference; None if no run has input lengths.

    Left: overall of all books, band = 95 % interval; level lines: baselines without weights, which read whole
    books; for references of all kinds the paper's curve. Right: gain over the next shorter input, on the
    books that the shorter one cuts, whose number stands at the point.
    """
    wanted = [row for row in spread(rows) if row["metric"] in ("overall", "overall_gain")]
    wanted = [row for row in wanted if row["condition"] == "pairwise" and row["value"] is not None]
    groups = [group for group in grouped(wanted, SHEET) if any(row["length"] for row in group)]
    if not groups:
        return None
    names = list(dict.fromkeys(label(row) for row in wanted))
    figure, axes = grid(len(groups), 2, (4.6, 3.4))
    for (left, right), group in zip(axes, groups, strict=True):
        first = group[0]
        _level(left, names, group)
        _curves(left, names, [row for row in group if row["metric"] == "overall" and row["length"]])
        if first["position"] is None and first["dataset"].startswith("booksum"):
            lengths, values = zip(*paper.FIGURE4.items(), strict=True)
            about = {
                "color": "0.5",
                "linestyle": ":",
                "marker": ".",
                "label": "paper: 8B model, BookSum validation",
            }
            left.plot(lengths, values, linewidth=1, **about)
        gains = [row for row in group if row["metric"] == "overall_gain"]
        _curves(right, names, gains, counted=True)
        right.axhline(0, color="0.4", linewidth=0.8)
        kind = first["position"] or "all"
        left.set_title(
            f"references: {kind}; {first['dataset']} ({first['split']}), {first['scale']}", fontsize=8
        )
        right.set_title("on the books that the shorter input cuts, n beside", fontsize=8)
        left.set_ylabel("overall")
        right.set_ylabel("gain over next shorter")
    return legend(figure, axes.flat)


def label(row: Row) -> str:
    """The model, its variant without sections, and how it writes; in lines that fit into a legend."""
    words = [row["model"], *settings(row), *([] if weightless(row["config"]) else [row["protocol"]])]
    return textwrap.fill(" ".join(word for word in words if word), 48)


def _level(ax: Axes, names: list[str], rows: Line) -> None:
    for row in rows:
        if weightless(row["config"]):
            color = look(names.index(label(row)))["color"]
            ax.axhline(row["value"], label=label(row), color=color, linestyle="--", linewidth=1)


def _curves(ax: Axes, names: list[str], rows: Line, counted: bool = False) -> None:
    for line in grouped([{**row, "name": label(row)} for row in rows], ("name",)):
        line = sorted(line, key=lambda row: row["length"])
        style, x = look(names.index(line[0]["name"])), [row["length"] for row in line]
        color = style["color"]
        ax.plot(
            x, [row["value"] for row in line], label=line[0]["name"], markersize=4, linewidth=1.3, **style
        )
        band = [row for row in line if row["ci_low"] is not None]
        low, high = ([row[key] for row in band] for key in ("ci_low", "ci_high"))
        ax.fill_between([row["length"] for row in band], low, high, color=color, alpha=0.15, linewidth=0)
        for row in line if counted else []:
            place: dict[str, Any] = {
                "xytext": (4, 4),
                "textcoords": "offset points",
                "fontsize": 7,
                "color": color,
            }
            ax.annotate(f"n={row['n']}", (row["length"], row["value"]), **place)
    ticks = sorted({row["length"] for row in rows})
    ax.set(xscale="log", xlabel="input tokens")
    ax.set_xticks(ticks, [format_length(n) for n in ticks], fontsize=7)
    ax.minorticks_off()


FIGURES: dict[str, Callable[[list[Row]], Figure | None]] = {"table4_booksum": booksum_figure}
