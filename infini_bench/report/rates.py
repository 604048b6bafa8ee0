"""Learning rates: each model's loss on the validation split at each rate, and which one is chosen.

``table2_lr``: bits per byte of language models, by evaluations of whole documents. ``table4_lr``: the loss of
fine-tuning on summaries, by the validation at the step of the checkpoint that was asked (`loss`), which has
every plot of the split in it; beside it, ROUGE of the summaries that the model writes of the split's books.

A line is one model on one budget: all settings equal but the rate and the folder of the corpus, which the
fingerprint knows by content. Machines share a line, since none decides which rate is best. A training's last
loss on what it learns from does not count.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from infini_bench.report.cells import MODEL, SEEDS, Column, Line, find, measured, number
from infini_bench.report.compare import RATE, Seed, memory, rate
from infini_bench.report.reached import Curves
from infini_bench.report.records import Record
from infini_bench.report.seeds import over_seeds
from infini_bench.units import format_length

Row = dict[str, Any]
Seeds = dict[Seed, Row]
LANGUAGE, SUMMARIES = "table2_lr", "table4_lr"
LOSS = "validation_loss"
FREE = (RATE, "data.path", "trained.corpus")
CHOSEN = "chosen_rate"
BESIDE = ("metric", "value", "ci_low", "ci_high", "n")  # of the evaluation that stands beside a loss


def loss(record: Record, known: Curves) -> float | None:
    """The validation loss of an evaluated model at its own step, where its training's record has it: nats."""
    curve = known.get(record.train.get("id", ""), [])
    return next((point.get(LOSS) for point in curve if point["step"] == record.train["steps"]), None)


def sweeps(losses: list[Row]) -> dict[tuple, dict[float, Seeds]]:
    """(memory, budget) -> rate -> a row a seed. losses: of one seed each, oldest first."""
    lines: dict[tuple, dict[float, Seeds]] = defaultdict(lambda: defaultdict(dict))
    for row in losses:
        budget = tuple(pair for pair in row["budget"] if pair[0] not in FREE)
        best = row["config"]["trainer"].get("best")  # its rows, of a book each, are not all as long
        place = (None if best else row["train_tokens"], row["dataset"], row["length"], row["n"], budget)
        lines[(*memory(row), row["own"]), place][rate(row)][row["seed"]] = row
    return lines


def _of_language(rows: list[Row]) -> list[Row]:
    wanted = ("table2_lm", "bits_per_byte", "validation", None)
    keys = ("table", "metric", "split", "protocol")
    return [row for row in rows if tuple(row[key] for key in keys) == wanted and row["value"] is not None]


def _of_summaries(rows: list[Row]) -> list[Row]:
    """The loss of each model as it was trained in place of the overall score of the summaries that it wrote
    by itself, which is the row's ``beside``.
    """
    wanted = ("table4_booksum", "overall", "validation", "pairwise")
    keys = ("table", "metric", "split", "condition")
    asked = [row for row in rows if tuple(row[key] for key in keys) == wanted and row[LOSS] is not None]
    asked = [row for row in asked if not {"baseline", "memory"} & _set(row["config"]["task"])]
    kinds = {(row["records"][0], row["position"]) for row in asked}
    found = []
    for row in asked:
        kind = dict(row["budget"]).get("trained.train_kind")  # of the references, if they are of several
        if row["position"] == (kind if (row["records"][0], kind) in kinds else None):
            n = row["config"]["trainer"]["validate_rows"]
            blank = {"metric": LOSS, "value": row[LOSS], "ci_low": None, "ci_high": None, "n": n}
            found.append({**row, **blank, "position": None, "beside": row})
    return found


def _set(section: dict[str, Any]) -> set[str]:
    return {key for key, value in section.items() if value}


def best(line: dict[float, Seeds]) -> float | None:
    """The rate of the least loss, mean over seeds; None where no other was tried."""
    losses = {key: sum(row["value"] for row in seeds.values()) / len(seeds) for key, seeds in line.items()}
    return min(losses, key=losses.__getitem__) if len(losses) > 1 else None


def chosen(rows: list[Row]) -> dict[tuple, float]:
    """Memory -> its language model's best rate, of the sweep with most rates, then most tokens."""
    found: dict[tuple, tuple[int, int, float]] = {}
    for (key, place), line in sweeps(_of_language(rows)).items():
        if (value := best(line)) is not None:
            found[key[:3]] = max(found.get(key[:3], (0, 0, 0.0)), (len(line), place[0] or 0, value))
    return {key: value for key, (_, _, value) in found.items()}


def tabled(rows: list[Row]) -> Iterator[tuple[list[Row], tuple]]:
    """Rows of the tables: (a row a seed, (value, ci_low, ci_high, n)); budgets in which a rate was chosen."""
    for name, losses in ((LANGUAGE, _of_language(rows)), (SUMMARIES, _of_summaries(rows))):
        lines = sweeps(losses)
        budgets = {place for (_, place), line in lines.items() if best(line) is not None}
        machines = {place: _machines(lines, place) for place in budgets}
        for (key, place), line in lines.items():
            if place in budgets:
                named = _differing(lines, key, place) if name == LANGUAGE else _without_rate(line)
                blank = {"table": name, "variant": named, "budget": place[-1], "device": machines[place]}
                yield from _line(line, blank)


def _line(line: dict[float, Seeds], blank: Row) -> Iterator[tuple[list[Row], tuple]]:
    for value, seeds in sorted(line.items()):
        group = [{**row, **blank, "condition": f"{value:g}"} for row in seeds.values()]
        yield group, _estimate(group)
        if all("beside" in row for row in group):
            shown = [{**row, **{key: row["beside"][key] for key in BESIDE}} for row in group]
            yield shown, _estimate(shown)
    if (least := best(line)) is not None:
        blank = {**blank, "metric": CHOSEN, "condition": None}
        heads = [{**row, **blank} for seeds in line.values() for row in seeds.values()]
        yield heads, (least, None, None, len(line))


def _differing(lines: dict[tuple, dict[float, Seeds]], key: tuple, place: tuple) -> str | None:
    """What tells a line's memory from those of the model's other lines on the budget."""
    same = [dict(other[3]) for other, there in lines if there == place and other[:2] == key[:2]]
    differing = sorted({name for own in same for name in own if len({o.get(name) for o in same}) > 1})
    return " ".join(f"{name}={dict(key[3]).get(name)}" for name in differing) or None


def _without_rate(line: dict[float, Seeds]) -> str | None:
    """What tells the line's runs from others, but for the rate."""
    row = next(iter(next(iter(line.values())).values()))
    words = re.split(r" (?=[\w.]+=)", row["variant"] or "")
    return " ".join(word for word in words if not word.startswith(f"{RATE}=")) or None


def _machines(lines: dict[tuple, dict[float, Seeds]], wanted: tuple) -> str:
    found = [seeds for (_, place), line in lines.items() if place == wanted for seeds in line.values()]
    return " and ".join(sorted({row["device"] for seeds in found for row in seeds.values()}))


def _estimate(group: list[Row]) -> tuple:
    first = group[0]
    if len(group) == 1:
        return first["value"], first["ci_low"], first["ci_high"], first["n"]
    return (*over_seeds(first["metric"], [row["value"] for row in group]), first["n"])


# --- layout ---------------------------------------------------------------------------------------------

TITLES = {LANGUAGE: "Table 2's learning rates", SUMMARIES: "Table 4's learning rates"}
LINES = {LANGUAGE: ("budget",), SUMMARIES: ("budget", "length")}


def _tried(rows: list[Row]) -> list[str]:
    return sorted({row["condition"] for row in rows if row["condition"]}, key=float)


def _cell(metric: str, value: str) -> Callable[[Line], str]:
    def text(line: Line) -> str:
        found = find(line, CHOSEN)
        mark = "\n(chosen)" if found and f"{found['value']:g}" == value else ""
        return measured(metric, 3, condition=value)(line) + mark

    return text


def _language(rows: list[Row]) -> list[Column]:
    return [
        MODEL,
        SEEDS,
        *(Column(value, _cell("bits_per_byte", value)) for value in _tried(rows)),
        Column("ffn", lambda line: number(_ffn(line[0]), 0), wide=True),
        Column("train tokens", lambda line: number(line[0]["train_tokens"], 0)),
    ]


def _summaries(rows: list[Row]) -> list[Column]:
    tried = _tried(rows)
    return [
        MODEL,
        SEEDS,
        *(Column(value, _cell(LOSS, value)) for value in tried),
        *(Column(f"overall, {value}", measured("overall", 1, condition=value)) for value in tried),
        Column("input", lambda line: format_length(line[0]["length"]) if line[0]["length"] else "whole"),
        Column("train tokens", lambda line: number(line[0]["train_tokens"], 0)),
    ]


def _ffn(row: Row) -> int:
    decoder = row["config"]["decoder"]
    return decoder["ffn"] or 4 * decoder["dim"]


BUILDERS = {LANGUAGE: _language, SUMMARIES: _summaries}
CAPTIONS = {
    LANGUAGE: lambda rows: (
        "Bits per byte of the validation split at each learning rate, from evaluations of whole documents; "
        "the least of a line is chosen where two rates or more were tried. In brackets 95 % intervals over "
        "documents, the same ones in all cells: far wider than what tells two cells apart. Cells of a line "
        "may be of different machines."
    ),
    SUMMARIES: lambda rows: (
        "At each learning rate the loss that fine-tuning minimises (nats a token of the summary, and "
        "task.lm_weight times those of the book), on rows of the validation split, of the checkpoint that "
        "stands for a run (with trainer.best of least loss); the least of a line is chosen where two "
        "rates or more were tried. Losses compare within a line: another "
        "line's rows have other inputs. Overall: ROUGE, as in Table 4, of the summaries that the model then "
        "writes of the split's books from this input, against references of the kind that it was taught; in "
        "brackets 95 % intervals over books, which are too few to choose by. Cells of a line may be of "
        "different machines."
    ),
}
