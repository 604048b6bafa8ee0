"""Figures from tidy rows, as SVG: one function a table, ``rows -> Figure``, named in FIGURES.

Here those of the diagnostics; the others' functions stand in modules of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infini_bench.report import (
    booksum_figure,
    efficiency_figure,
    lm_figures,
    probe_figures,
    reached,
    retrieval_figures,
)
from infini_bench.report.cells import Line, Row, find, grouped
from infini_bench.report.diagnostics import FILLERS, distances, shared, trained_segments
from infini_bench.report.style import dashes, drawn, heat, legend, look, panels

LENGTH = ("task.segments", "trainer.batch", "trainer.curriculum")  # differ with the training length
SHEET = ("scale", "device", "dataset")


def svg(name: str, rows: list[Row]) -> str | None:
    """The figure of a table, None if it has none or nothing to show."""
    return drawn(lambda: FIGURES[name](rows)) if name in FIGURES and rows else None


Names = dict[tuple[str, str], str]  # of a figure's lines, by model and variant


def labels(rows: list[Row]) -> Names:
    """Names of all lines: the model, how it differs from others of its name, how far it was trained."""
    lines = {(line[0]["model"], line[0]["variant"]): line for line in grouped(rows, ("model", "variant"))}
    names = {}
    for (model, variant), line in lines.items():
        own = _settings(variant)
        others = [_settings(v) for m, v in lines if m == model]
        differs = [key for key in own if key not in LENGTH and any(o.get(key) != own[key] for o in others)]
        short = {key.rpartition(".")[2]: own[key] for key in differs}
        trained = f"(to {reached.segments(line)})" if any(k in own for k in LENGTH) else ""
        words = [model, *(f"{key}={value}" for key, value in short.items()), trained]
        names[model, variant] = " ".join(filter(None, words))
    return names


def _settings(variant: str | None) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\[[^\]]*\]|\S+)", variant or ""))


def curve(axes: Axes, names: Names, rows: list[Row], x: list[float]) -> None:
    """Values of rows over x with their intervals as a band; a value that is missing leaves a gap.

    names: of all lines of the figure, so that a line looks the same in every panel.
    """
    number = _number(names, rows[0])
    order = np.argsort(x)
    values = {key: np.array([_float(rows[i][key]) for i in order]) for key in ("value", "ci_low", "ci_high")}
    style = look(number)
    axes.plot(
        np.array(x)[order],
        values["value"],
        markersize=4,
        label=[*names.values()][number],
        **style,
        **dashes(number),
    )
    axes.fill_between(
        np.array(x)[order], values["ci_low"], values["ci_high"], alpha=0.15, color=style["color"]
    )


def _number(names: Names, row: Row) -> int:
    return [*names].index((row["model"], row["variant"]))


def _float(value: float | None) -> float:
    return np.nan if value is None else float(value)


def percent_axes(axes: Axes, rows: list[Row], x: str) -> None:
    """Accuracy in percent over powers of two, with the line of chance."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(ylim=(-3, 103), xlabel=x)
    axes.axhline(
        rows[0]["extra"]["chance"], color="0.4", linewidth=0.8, linestyle=(0, (1, 1)), label="chance"
    )


def trained_marks(axes: Axes, places: set[int], most: str = "") -> None:
    """A line at each largest value seen in training; lines of the figure may differ in it."""
    for x in sorted(places):
        axes.axvline(x, color="0.6", linewidth=0.8)
        words = f"trained to {most}{x} "
        axes.annotate(words, (x, 50), rotation=90, ha="right", va="center", fontsize=7)


def _place(row: Row) -> str:
    return f"{row['dataset']}, {row['scale']}, {row['device']}"


# --- one function a table ---------------------------------------------------------------------------------


def recall(rows: list[Row]) -> Figure:
    """Accuracy against segments after the fact: a line a model, a panel a filler and training length."""
    kept = [row for row in rows if row["metric"] == "exact_match" and row["condition"] in FILLERS]
    groups = [
        [row for row in sheet if trained_segments(row["config"]) == far]
        for sheet in grouped(kept, (*SHEET, "split", "condition"))
        for far in sorted({trained_segments(row["config"]) for row in sheet})
    ]
    groups.sort(key=lambda group: trained_segments(group[0]["config"]))
    figure, axes = panels(len(groups), 2, sharey=True)
    for each, group in zip(axes, groups, strict=True):
        _recall_panel(each, labels(kept), group)
        each.set_title(f"{group[0]['condition']} filler: {_place(group[0])}", fontsize=8)
    return legend(figure, axes)


def _recall_panel(axes: Axes, names: Names, rows: list[Row]) -> None:
    rows = [row for row in rows if row["position"] != "0"]  # a logarithm has no place for it
    for line in grouped(rows, ("model", "variant")):
        curve(axes, names, line, [float(row["position"]) for row in line])
    ends = {row["reached"] for row in rows}
    known = {segments - 1 for end in ends if end[0] for segments in end} - {0}
    trained_marks(axes, known)
    trained_marks(axes, {most - 1 for least, most in ends if not least} - known - {0}, "at most ")
    percent_axes(axes, rows, "segments from fact to question")
    axes.set_ylabel("exact match, %")


def mqar(rows: list[Row]) -> Figure:
    """Accuracy against pairs: a panel for each distance, a line for each model; then against state size."""
    kept = [row for row in rows if row["condition"] == f"{row['extra']['pairs']} pairs"]
    sheets = [
        [[row for row in sheet if row["position"] == place] for place in distances(sheet)]
        for sheet in grouped(kept, SHEET)
    ]
    figure, axes = panels(2 * sum(map(len, sheets)), min(4, max(map(len, sheets))), sharey=True)
    drawings = [(draw, group) for sheet in sheets for draw in (_pairs_panel, _state_panel) for group in sheet]
    for each, (draw, group) in zip(axes, drawings, strict=True):
        draw(each, labels(kept), group)
        each.set_ylabel("right values, %")
    return legend(figure, axes)


def _pairs_panel(axes: Axes, names: Names, rows: list[Row]) -> None:
    for line in grouped(rows, ("model", "variant")):
        curve(axes, names, line, [float(row["extra"]["pairs"]) for row in line])
    trained_marks(axes, {max(row["config"]["task"]["train_pairs"]) for row in rows})
    percent_axes(axes, rows, "pairs")
    axes.set_title(f"asked {rows[0]['position']} segments later: {_place(rows[0])}", fontsize=8)


def _state_panel(axes: Axes, names: Names, rows: list[Row]) -> None:
    """A point with its interval for each model, at the floats it carries and the most pairs asked of all."""
    each = grouped([row for row in rows if row["state_floats"] is not None], ("model", "variant"))
    common = set.intersection(*({row["extra"]["pairs"] for row in line} for line in each)) if each else set()
    for row in (row for line in each for row in line if row["extra"]["pairs"] == max(common, default=None)):
        value, low, high = (_float(row[key]) for key in ("value", "ci_low", "ci_high"))
        error = [[np.nan_to_num(value - low)], [np.nan_to_num(high - value)]]
        axes.errorbar([row["state_floats"]], [value], yerr=error, capsize=2, **look(_number(names, row)))
    percent_axes(axes, rows, "floats carried over a segment's end")
    floats = [row["state_floats"] for row in rows if row["state_floats"]]
    axes.set_xscale("symlog", base=2, linthresh=min(floats, default=1))  # some models carry none
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(axis="x", labelrotation=45, labelsize=7)
    axes.set_title(f"{max(common, default=0)} pairs, asked {rows[0]['position']} segments later", fontsize=8)


def features(rows: list[Row]) -> Figure:
    """Heat maps, feature map x normaliser: recall at two distances, and bits per byte."""
    maps = []
    for group in grouped(rows, (*SHEET, "model")):
        for filler in FILLERS:
            cells = [row for row in group if row["metric"] == "exact_match" and row["condition"] == filler]
            maps += [
                (f"recall, {filler}, {place} segments, %", group, {"position": place, "condition": filler})
                for place in distances(cells)
                if int(place) in SHOWN
            ]
        if any(row["metric"] == "bits_per_byte" for row in group):
            maps.append(("bits per byte", group, {}))
    figure, axes = panels(max(len(maps), 1), 3)
    for each, (title, group, match) in zip(axes, maps, strict=False):
        metric = "exact_match" if match else "bits_per_byte"
        _heat(each, group, metric, match, (0, 100) if match else None)
        each.set_title(f"{group[0]['model']}: {title}\n{_place(group[0])}", fontsize=8)
    return figure


SHOWN = (64, 1024)  # distances with a heat map


def _heat(axes: Axes, rows: list[Row], metric: str, match: Row, limits: tuple[float, float] | None) -> None:
    """Values at (feature map, normaliser)."""

    def setting(row: Row, name: str) -> str:
        return str(row["config"]["memory"].get(name, "sum"))

    maps, norms = (list(dict.fromkeys(setting(row, n) for row in rows)) for n in ("features", "normaliser"))
    values = np.full((len(maps), len(norms)), np.nan)
    for line in grouped(rows, ("variant",)):
        row = find(line, metric, **match)
        if row is not None:
            values[maps.index(setting(row, "features")), norms.index(setting(row, "normaliser"))] = _float(
                row["value"]
            )
    finite = values[np.isfinite(values)]
    low, high = limits or ((finite.min(), finite.max()) if len(finite) else (0.0, 1.0))
    heat(axes, values, (maps, norms), (low, high), 0 if limits else 3)


def variants(rows: list[Row]) -> Figure:
    """Recall curves of each variant, a panel for each model and filler, and their bits per byte."""
    parts: list[tuple[str, Line]] = []
    for group in grouped(rows, (*SHEET, "model")):
        for filler in FILLERS:
            cells = [row for row in group if row["metric"] == "exact_match" and row["condition"] == filler]
            cells = [row for row in cells if row["position"] in shared(cells)]
            parts += [(f"{filler} filler", cells)] if cells else []
        bits = [row for row in group if row["metric"] == "bits_per_byte"]
        parts += [("", bits)] if bits else []
    figure, axes = panels(max(len(parts), 1), 3)
    for each, (filler, group) in zip(axes, parts, strict=False):
        (_recall_panel if filler else _bits_panel)(each, labels(rows), group)
        title = f"{group[0]['model']}{filler and f', {filler}'}"
        each.set_title(f"{title}\n{_place(group[0])}", fontsize=8)
    return legend(figure, axes)


def _bits_panel(axes: Axes, names: Names, rows: list[Row]) -> None:
    """A point with its interval for each variant."""
    for place, row in enumerate(rows):
        if row["value"] is not None:
            number = _number(names, row)
            low, high = (_float(row[key]) for key in ("ci_low", "ci_high"))
            error = [[np.nan_to_num(row["value"] - low)], [np.nan_to_num(high - row["value"])]]
            axes.errorbar([row["value"]], [place], xerr=error, capsize=2, **look(number))
    own = [[*names.values()][_number(names, row)].partition(" ")[2] or row["model"] for row in rows]
    axes.set_yticks(range(len(rows)), [fill(words, 32) for words in own], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("bits per byte")


FIGURES: dict[str, Callable[[list[Row]], Figure | None]] = {
    "diag_recall": recall,
    "diag_mqar": mqar,
    "diag_features": features,
    "diag_gates": variants,
    "diag_local": variants,
    **probe_figures.FIGURES,
    **efficiency_figure.FIGURES,
    **retrieval_figures.FIGURES,
    **lm_figures.FIGURES,
    **booksum_figure.FIGURES,
}
