"""Figures of retrieval: keys found by depth and length, and gates while a model learns to find them."""

from __future__ import annotations

import re

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infini_bench.report.cells import Line, Row, grouped
from infini_bench.report.records import Record
from infini_bench.report.style import heat, panels
from infini_bench.report.tidy import POSITIONS, rank
from infini_bench.units import format_length

COLUMNS = 4
RETRIEVAL = ("passkey", "needles")


def heat_maps(rows: list[Row]) -> Figure:
    """Exact match at (depth, length): a map for each model, variant, machine and condition; no controls."""
    keys = [row for row in rows if row["metric"] == "exact_match" and "memory_off" not in row["condition"]]
    lines = grouped(keys, ("scale", "device", "dataset", "model", "variant", "protocol", "condition"))
    figure, axes = panels(max(len(lines), 1), COLUMNS, (3.4, 2.4))
    for each, line in zip(axes, lines, strict=False):
        _heat(each, line)
    return figure


def _heat(axes: Axes, line: Line) -> None:
    depths = sorted({row["position"] for row in line}, key=lambda name: rank(POSITIONS, name))
    lengths = sorted({row["length"] for row in line})
    values = np.full((len(depths), len(lengths)), np.nan)
    for row in line:
        if row["value"] is not None:
            values[depths.index(row["position"]), lengths.index(row["length"])] = row["value"]
    heat(axes, values, (depths, map(format_length, lengths)), (0, 100))
    first = line[0]
    device = first["device"].split(",")[0][:24]
    place = first["base"] or first["dataset"]
    asked = first["protocol"].partition(", ")[2]  # what the protocol adds to the training's name
    name = ", ".join(filter(None, [first["model"], first["condition"], asked]))
    parts = [name, f"{place}, {first['scale']}, {device}"]
    axes.set_title("\n".join([*parts, *([_short(first["variant"])] if first["variant"] else [])]), fontsize=7)


def _short(variant: str, most: int = 44) -> str:
    """A variant's settings without their sections, as many as fit."""
    words = re.sub(r"\b(?:\w+\.)+(\w+=)", r"\1", variant)
    return words if len(words) <= most else f"{words[: most - 1]}…"


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
    low, mean, high = (
        np.array([point["gates"][name] for point in points]).T for name in ("min", "mean", "max")
    )
    colors = _colors(len(mean))
    for layer, color in enumerate(colors):
        right.plot(tokens, mean[layer], color=color, linewidth=1.2)
        right.fill_between(tokens, low[layer], high[layer], color=color, alpha=0.15)
    right.set(ylim=(0, 1))
    right.set_ylabel("gate: mean of heads, least to most")
    config = record.config
    name = f"{config['model']} on {record.task}, {config['scale']}, seed {record.seed}"
    axes.set_title(f"{name}\n{record.id[:15]}; dotted: longer rows", fontsize=7)
    last = len(colors) - 1  # between the first layer and this one from dark to light
    shown = range(last + 1) if last < 4 else (0, last)
    lines, words = right.get_lines(), [f"layer {i}" for i in shown]
    axes.legend([loss, *(lines[i] for i in shown)], ["loss", *words], fontsize=6)


def _colors(count: int) -> list[tuple[float, ...]]:
    """From the first layer's to the last's."""
    scale = matplotlib.colormaps["viridis"]
    return [scale(i / max(count - 1, 1) * 0.85) for i in range(count)]


FIGURES = {"table3_passkey": heat_maps, "table3_hard": heat_maps}
