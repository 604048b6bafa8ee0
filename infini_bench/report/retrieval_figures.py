"""Figures of retrieval: keys found by depth and length, and gates while a model learns to find them."""

from __future__ import annotations

from textwrap import wrap

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infini_bench.report.cells import Line, Row, grouped, settings
from infini_bench.report.records import Record
from infini_bench.report.style import heat, panels
from infini_bench.report.tidy import POSITIONS, rank
from infini_bench.report.variants import pretrained
from infini_bench.units import format_length

COLUMNS = 4
WIDTH = 48  # characters of a line of a panel's title
LAYERS = 4  # whose gates a panel tells apart
RETRIEVAL = ("passkey", "needles")
TIME = len("20261122-120437")  # which a record's id begins with


def heat_maps(rows: list[Row]) -> Figure:
    """Exact match at (depth, length): a map for each model, variant, machine and condition; no controls."""
    keys = [row for row in rows if row["metric"] == "exact_match" and "memory_off" not in row["condition"]]
    lines = grouped(keys, ("scale", "device", "dataset", "model", "variant", "protocol", "condition"))
    figure, axes = panels(max(len(lines), 1), COLUMNS, (3.4, 2.6))
    for each, line in zip(axes, lines, strict=False):
        _heat(each, line, _told_apart(line, lines))
    return figure


def _heat(axes: Axes, line: Line, own: list[str]) -> None:
    depths = sorted({row["position"] for row in line}, key=lambda name: rank(POSITIONS, name))
    lengths = sorted({row["length"] for row in line})
    values = np.full((len(depths), len(lengths)), np.nan)
    for row in line:
        if row["value"] is not None:
            values[depths.index(row["position"]), lengths.index(row["length"])] = row["value"]
    heat(axes, values, (depths, map(format_length, lengths)), (0, 100))
    first = line[0]
    device = first["device"].split(",")[0][:24]
    place = " in ".join(filter(None, [(first["base"] or "").removesuffix(".gguf"), first["dataset"]]))
    asked = first["protocol"].partition(", ")[2]  # what the protocol adds to the training's name
    name = ", ".join(filter(None, [first["model"], first["condition"], asked]))
    parts = [name, f"{place}, {first['scale']}, {device}", *wrap(" ".join(own), WIDTH)]
    axes.set_title("\n".join(parts), fontsize=6)


def _told_apart(line: Line, lines: list[Line]) -> list[str]:
    """The settings of a line's variant that not all lines of its model and pretrained body share."""
    alike = [other for other in lines if all(other[0][key] == line[0][key] for key in ("model", "base"))]
    shared = set.intersection(*(set(settings(other[0])) for other in alike)) if len(alike) > 1 else set()
    return [setting for setting in settings(line[0]) if setting not in shared]


def training(records: list[Record]) -> Figure | None:
    """Answer loss and gates of each layer over training tokens: a panel for each run of RETRIEVAL's tasks."""
    runs = [r for r in records if (r.kind, r.status) == ("train", "done") and r.task in RETRIEVAL]
    runs = [r for r in runs if r.train.get("curve") and r.train["curve"][0]["gates"]]
    if not runs:
        return None
    figure, axes = panels(len(runs), COLUMNS, (3.6, 2.8))
    for each, run in zip(axes, runs, strict=True):
        _curve(each, run)
    return figure


def _curve(axes: Axes, record: Record) -> None:
    points = record.train["curve"]
    tokens = [point["tokens"] / 1e6 for point in points]
    (loss,) = axes.plot(tokens, [point["task_loss"] for point in points], color="black", linewidth=1)
    levels = [point["level"] for point in points]
    for place in [i for i in range(1, len(points)) if levels[i] != levels[i - 1]]:
        axes.axvline(tokens[place], color="0.7", linewidth=0.7, linestyle=":")
    axes.set(xlabel="million tokens", ylim=(0, None))
    axes.set_ylabel("answer loss, nats")
    right = axes.twinx()
    right.grid(False)
    right.spines["right"].set_visible(True)
    axes.set_zorder(right.get_zorder() + 1)  # the loss in front of the gates
    axes.patch.set_visible(False)
    right.set(ylim=(0, 1))
    right.set_ylabel("gate")
    lines, words = _gates(right, tokens, [point["gates"] for point in points])
    config = record.config
    name = f"{config['model']} on {record.task}, {config['scale']}, seed {record.seed}, {record.id[:TIME]}"
    base = pretrained(config)
    if base and "-train-" in base:  # an earlier run, whose panel has its time as a name
        base = base[:TIME]
    start = f"{base.removesuffix('.gguf')}; " if base else ""
    axes.set_title(f"{name}\n{start}dotted: longer rows", fontsize=7)
    axes.legend([loss, *lines], ["loss", *words], fontsize=6)


def _gates(axes: Axes, tokens: list[float], gates: list[dict]) -> tuple[list[Artist], list[str]]:
    """Each layer's mean and spread of heads; of more than `LAYERS` layers, all layers' together."""
    low, mean, high = (np.array([each[name] for each in gates]).T for name in ("min", "mean", "max"))
    if len(mean) > LAYERS:
        (line,) = axes.plot(tokens, np.median(mean, 0), color="tab:green", linewidth=1.2)
        bands = [(low.min(0), high.max(0), 0.12), (mean.min(0), mean.max(0), 0.3)]
        heads, layers = (
            axes.fill_between(tokens, *ends, color="tab:green", alpha=alpha, linewidth=0)
            for *ends, alpha in bands
        )
        return [line, layers, heads], ["layers' mean gates, median", "least to most", "of all heads"]
    lines: list[Artist] = []
    for layer, color in enumerate(("tab:purple", "tab:green", "tab:orange", "tab:blue")[: len(mean)]):
        lines += axes.plot(tokens, mean[layer], color=color, linewidth=1.2)
        axes.fill_between(tokens, low[layer], high[layer], color=color, alpha=0.15, linewidth=0)
    return lines, [f"layer {i}, mean of heads" for i in range(len(mean))]


FIGURES = {"table3_passkey": heat_maps, "table3_hard": heat_maps}
