"""Learning rates: each language model's loss on the validation split at each rate, and which one is chosen.

A line is one model on one budget: all settings equal but the rate and the folder of the corpus, which the
fingerprint knows by content. Machines share a line, since none decides which rate is best. A training's last
loss does not count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from infini_bench.report.cells import MODEL, SEEDS, Column, Line, find, measured, number
from infini_bench.report.compare import RATE, Seed, memory, rate
from infini_bench.report.seeds import over_seeds

Row = dict[str, Any]
Seeds = dict[Seed, Row]
NAME = "table2_lr"
FREE = (RATE, "data.path", "trained.corpus")
CHOSEN = "chosen_rate"


def sweeps(rows: list[Row]) -> dict[tuple, dict[float, Seeds]]:
    """(memory, budget) -> rate -> a row a seed. rows: of one seed each, oldest first."""
    lines: dict[tuple, dict[float, Seeds]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if _is_validation(row):
            budget = tuple(pair for pair in row["budget"] if pair[0] not in FREE)
            place = (row["train_tokens"], row["dataset"], budget)
            lines[(*memory(row), row["own"]), place][rate(row)][row["seed"]] = row
    return lines


def _is_validation(row: Row) -> bool:
    place = (row["table"], row["metric"], row["split"], row["protocol"])
    return place == ("table2_lm", "bits_per_byte", "validation", None) and row["value"] is not None


def best(line: dict[float, Seeds]) -> float | None:
    """The rate of the least loss, mean over seeds; None where no other was tried."""
    losses = {key: sum(row["value"] for row in seeds.values()) / len(seeds) for key, seeds in line.items()}
    return min(losses, key=losses.__getitem__) if len(losses) > 1 else None


def chosen(rows: list[Row]) -> dict[tuple, float]:
    """Memory -> its best rate, of the sweep with most rates, then most tokens."""
    found: dict[tuple, tuple[int, int, float]] = {}
    for (key, place), line in sweeps(rows).items():
        if (value := best(line)) is not None:
            found[key[:3]] = max(found.get(key[:3], (0, 0, 0.0)), (len(line), place[0] or 0, value))
    return {key: value for key, (_, _, value) in found.items()}


def tabled(rows: list[Row]) -> Iterator[tuple[list[Row], tuple]]:
    """Rows of the table: (a row a seed, (value, ci_low, ci_high, n)); budgets in which a rate was chosen."""
    lines = sweeps(rows)
    budgets = {place for (_, place), line in lines.items() if best(line) is not None}
    machines = {place: _machines(lines, place) for place in budgets}
    for (key, place), line in lines.items():
        if place not in budgets:
            continue
        same = [dict(other[3]) for other, there in lines if there == place and other[:2] == key[:2]]
        differing = sorted({name for own in same for name in own if len({o.get(name) for o in same}) > 1})
        named = " ".join(f"{name}={dict(key[3]).get(name)}" for name in differing) or None
        blank = {"table": NAME, "variant": named, "budget": place[2], "device": machines[place]}
        for value, seeds in sorted(line.items()):
            group = [{**row, **blank, "condition": f"{value:g}"} for row in seeds.values()]
            yield group, _estimate(group)
        if (least := best(line)) is not None:
            heads = [{**row, **blank, "metric": CHOSEN} for seeds in line.values() for row in seeds.values()]
            yield heads, (least, None, None, len(line))


def _machines(lines: dict[tuple, dict[float, Seeds]], wanted: tuple) -> str:
    found = [seeds for (_, place), line in lines.items() if place == wanted for seeds in line.values()]
    return " and ".join(sorted({row["device"] for seeds in found for row in seeds.values()}))


def _estimate(group: list[Row]) -> tuple:
    first = group[0]
    if len(group) == 1:
        return first["value"], first["ci_low"], first["ci_high"], first["n"]
    return (*over_seeds(first["metric"], [row["value"] for row in group]), first["n"])


# --- layout ---------------------------------------------------------------------------------------------

TITLES = {NAME: "Table 2's learning rates"}
LINES = {NAME: ("budget",)}


def _columns(rows: list[Row]) -> list[Column]:
    def cell(value: str) -> Callable[[Line], str]:
        def text(line: Line) -> str:
            found = find(line, CHOSEN)
            mark = "\n(chosen)" if found and f"{found['value']:g}" == value else ""
            return measured("bits_per_byte", 3, condition=value)(line) + mark

        return text

    tried = sorted({row["condition"] for row in rows if row["condition"]}, key=float)
    return [
        MODEL,
        SEEDS,
        *(Column(value, cell(value)) for value in tried),
        Column("ffn", lambda line: number(_ffn(line[0]), 0), wide=True),
        Column("train tokens", lambda line: number(line[0]["train_tokens"], 0)),
    ]


def _ffn(row: Row) -> int:
    decoder = row["config"]["decoder"]
    return decoder["ffn"] or 4 * decoder["dim"]


BUILDERS = {NAME: _columns}
CAPTIONS = {
    NAME: lambda rows: (
        "Bits per byte of the validation split at each learning rate, from evaluations of whole documents; "
        "the least of a line is chosen where two rates or more were tried. In brackets 95 % intervals over "
        "documents, the same ones in all cells: far wider than what tells two cells apart. Cells of a line "
        "may be of different machines."
    )
}
