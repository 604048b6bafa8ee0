"""Figure 3: the gates of every head and layer after training, and on the way there.

The paper tells two kinds of heads: specialised ones, with a gate near 0 (local attention only) or near 1
(memory only), and mixers near 0.5. The borders are ours: at most 0.1, at least 0.9, from 0.4 to 0.6.

Letters: L layers with gates, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from infini_bench.report import paper
from infini_bench.report.cells import ABSENT, BUDGET, MODEL, SEEDS, Column, Line, Row, find, grouped, measured

if TYPE_CHECKING:
    from infini_bench.report.records import Record

Gates = list[list[float]]  # L x H

TITLES = {"figure3_gates": "Figure 3: gates after training"}
LINES: dict[str, tuple[str, ...]] = {"figure3_gates": ()}
LOW, MIDDLE, HIGH = 0.1, (0.4, 0.6), 0.9
KINDS: dict[str, Callable[[float], bool]] = {
    "local_heads": lambda gate: gate <= LOW,
    "mixer_heads": lambda gate: MIDDLE[0] <= gate <= MIDDLE[1],
    "memory_heads": lambda gate: gate >= HIGH,
}


def summary(gates: Gates) -> dict[str, float]:
    """Heads of each kind in percent, layers with a local head in percent, and the mean gate."""
    heads = [gate for layer in gates for gate in layer]
    found = {name: 100 * sum(map(kind, heads)) / len(heads) for name, kind in KINDS.items()}
    local = [any(gate <= LOW for gate in layer) for layer in gates]
    return {**found, "local_layers": 100 * sum(local) / len(local), "gate": sum(heads) / len(heads)}


def metrics(record: Record) -> list[dict[str, Any]]:
    """Metric rows of a training: the kinds of heads at the end (``condition`` none) and at each logged step,
    and every head's gate at the end, by seed, since heads of different seeds have nothing to do with one
    another."""
    history = record.train["gates"]
    last = history[-1]["gates"]
    blank = {"dataset": record.config["data"]["name"], "split": "train", "position": None}
    heads = sum(map(len, last))
    rows = []
    for condition, gates in [(None, last), *((f"step {h['step']}", h["gates"]) for h in history)]:
        extra = {"gates": gates, "seed": record.seed} if condition is None else {}
        for name, value in summary(gates).items():
            rows.append(
                {**blank, "condition": condition, "metric": name, "value": value, "n": heads, "extra": extra}
            )
    for layer, row in enumerate(last, 1):
        for head, gate in enumerate(row, 1):
            place = {"condition": f"seed {record.seed}", "position": f"layer {layer} head {head}"}
            rows.append({**blank, **place, "metric": "head_gate", "value": gate, "extra": {}})
    return rows


def _columns(rows: list[Row]) -> list[Column]:
    kinds = {
        "local_heads": "local heads, %",
        "mixer_heads": "mixers, %",
        "memory_heads": "memory heads, %",
        "local_layers": "layers with a local head, %",
    }
    return [
        MODEL,
        SEEDS,
        *(Column(title, measured(name, 0)) for name, title in kinds.items()),
        Column("mean gate", measured("gate", 2)),
        Column("heads", lambda line: _heads(line)),
        *BUDGET,
    ]


def _heads(line: Line) -> str:
    row = find(line, "gate")
    return ABSENT if row is None else f"{row['n']:,}"


def _caption(rows: list[Row]) -> str:
    printed = summary(paper.FIGURE3)
    words = ", ".join(f"{name.replace('_', ' ')} {printed[name]:.0f} %" for name in (*KINDS, "local_layers"))
    return (
        "Gate: sigmoid(beta), 0 = local attention only, 1 = memory only. Local head: at most 0.1; mixer: 0.4 "
        "to 0.6; memory head: at least 0.9. With several seeds means and their Student intervals. "
        f"{paper.HEADER}, counted from its Figure 3: {words}, mean gate {printed['gate']:.2f}."
    )


BUILDERS = {"figure3_gates": _columns}
CAPTIONS = {"figure3_gates": _caption}


def lines_of(rows: list[Row]) -> list[Line]:
    """The table's lines that have a heat map to show."""
    lines = grouped(rows, ("scale", "device", "dataset", "model", "variant"))
    return [line for line in lines if find(line, "gate") is not None]


def history(line: Line, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a kind of heads over training, rising."""
    steps = [row for row in line if row["metric"] == metric and (row["condition"] or "").startswith("step ")]
    return sorted((int(row["condition"].removeprefix("step ")), row["value"]) for row in steps)
