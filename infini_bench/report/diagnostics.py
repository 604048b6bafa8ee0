"""Layouts of the trained diagnostics: recall against compressions, MQAR, and what varies a memory's parts."""

from __future__ import annotations

from collections.abc import Callable

from infini_bench.report import reached
from infini_bench.report.cells import (
    ABSENT,
    BUDGET,
    MODEL,
    SEEDS,
    Column,
    Line,
    Row,
    between,
    fact,
    find,
    grouped,
    measured,
    number,
)
from infini_bench.report.seeds import LOGARITHMS

FILLERS = ("constant", "text")
WILSON = "in brackets 95 % Wilson intervals over all trials, wider where seeds disagree"

TITLES = {
    "diag_recall": "Recall against compressions",
    "diag_mqar": "Multi-query associative recall",
    "diag_features": "Feature maps and normalisers",
    "diag_gates": "Gates",
    "diag_local": "Local attention and memory",
}
# What a printed row has in common, beside model and variant.
LINES = {"diag_recall": ("condition",), "diag_mqar": ("condition",)}


def distances(rows: list[Row]) -> list[str]:
    """Positions that are numbers of segments, rising."""
    return sorted({row["position"] for row in rows if (row["position"] or "").isdecimal()}, key=int)


def shared(rows: list[Row]) -> list[str]:
    """Those of `distances` at which every line was asked that was asked at all."""
    asked = [{*distances(line)} for line in grouped(rows, ("model", "variant"))]
    return [place for place in distances(rows) if all(place in own for own in asked if own)]


def trained_segments(config: Row) -> int:
    """The longest training sequence asked for, in segments; `reached` knows how far training came."""
    return max(config["trainer"]["curriculum"] or [config["task"]["segments"]])


def _gate(place: str) -> Callable[[Line], str]:
    return lambda line: measured("gate", 2, position=place, condition=line[0]["condition"])(line)


def _percent(metric: str, place: str, condition: str | None = None) -> Callable[[Line], str]:
    """Percent with its interval, as short as it can be. condition: unset = the line's own."""

    def cell(line: Line) -> str:
        row = find(line, metric, position=place, condition=condition or line[0]["condition"])
        if row is None or row["value"] is None:
            return ABSENT
        return f"{number(row['value'], 0)}\n[{between(row)}]"

    return cell


def _grid(metric: str, rows: list[Row]) -> list[Column]:
    """A column for each distance in segments."""
    return [Column(f"{int(place):,}", _percent(metric, place)) for place in distances(rows)]


def _recall(rows: list[Row]) -> list[Column]:
    gates = [place for place in ("filler", "question") if any(row["position"] == place for row in rows)]
    return [
        MODEL,
        SEEDS,
        Column("filler or control", lambda line: str(line[0]["condition"])),
        Column("trained at", reached.segments),
        *_grid("exact_match", rows),
        *(Column(f"gate, {place}", _gate(place), wide=True) for place in gates),
        Column("memory floats", fact("state_floats"), wide=True),
        *BUDGET,
    ]


def _chance(rows: list[Row], metric: str = "exact_match") -> str:
    own = [row for row in rows if row["metric"] == metric and "chance" in row["extra"]]
    return ", ".join(sorted({f"{row['extra']['chance']:.3g}" for row in own})) or ABSENT


def _caption_recall(rows: list[Row]) -> str:
    trials = max(row["n"] for row in rows if row["metric"] == "exact_match")
    return (
        "Exact match in % by segments from fact to question (0: the same one), at most "
        f"{trials} trials a number, {WILSON}; chance {_chance(rows)} %. "
        f"Trained at, in segments: {reached.MEANING} "
        "Controls, where they were run, with the first filler: memory off, and the memory of another trial. "
        "Gate: mean sigmoid at the largest distance. Memory floats: capacity; of a state that grows, what a "
        "segment adds."
    )


def _mqar(rows: list[Row]) -> list[Column]:
    return [
        MODEL,
        SEEDS,
        Column("memory floats", fact("state_floats")),
        Column("pairs", lambda line: str(line[0]["condition"])),
        Column("trained at", reached.segments),
        *_grid("token_accuracy", rows),
        *BUDGET,
    ]


def _caption_mqar(rows: list[Row]) -> str:
    pairs = rows[0]["config"]["task"]["train_pairs"]
    return (
        "Keys whose value is the most probable token, in %, by segments from the last pair to the questions "
        f"(0: they follow directly), {WILSON}; chance {_chance(rows, 'token_accuracy')} %. Trained on "
        f"{', '.join(map(str, pairs))} pairs. Trained at, in segments: {reached.MEANING}"
    )


# --- views: recall and language modelling of the same settings --------------------------------------------


def _view(*more: Column) -> Callable[[list[Row]], list[Column]]:
    """Recall at every distance, bits per byte with its controls, and what a table needs beside them."""

    def columns(rows: list[Row]) -> list[Column]:
        recall = [
            Column(f"{filler} {int(place):,}", _percent("exact_match", place, filler))
            for filler in FILLERS
            for place in shared(rows)
            if any(row["position"] == place and row["condition"] == filler for row in rows)
        ]
        return [
            MODEL,
            SEEDS,
            *recall,
            Column("bits/byte", measured("bits_per_byte", 3)),
            *more,
            Column("training", _training),
        ]

    return columns


def _training(line: Line) -> str:
    """How the line's trainings ended: ``done``, or why not, each task once."""
    rows = [row for row in line if row["metric"] == "final_loss"]
    ends = {f"{row['condition']}: {row['extra']['failed']}" for row in rows if "failed" in row["extra"]}
    return "\n".join(sorted(ends)) or ("done" if rows else ABSENT)


def _both(metric: str, digits: int) -> Callable[[Line], str]:
    """recall's and lm's number, one above the other."""

    def cell(line: Line) -> str:
        rows = [find(line, metric, condition=task) for task in ("recall", "lm")]
        return "\n".join(number(row["value"] if row else None, digits) for row in rows)

    return cell


def _non_finite(line: Line) -> str:
    """Trainings that a loss or gradient of NaN or infinity ended, of how many: recall's above lm's."""
    rows = [find(line, "non_finite", condition=task) for task in ("recall", "lm")]
    return "\n".join(f"{row['value']:.0f} of {row['n']}" if row else ABSENT for row in rows)


def _floats(line: Line) -> str:
    """What recall's and lm's model carry, one above the other; nobody counted a failed training's."""
    found = {
        row["config"]["task"]["name"]: row["state_floats"] for row in line if row["state_floats"] is not None
    }
    return "\n".join(number(found.get(task), 0) for task in ("recall", "lm"))


OFF = [
    Column("bits/byte, memory off", measured("bits_per_byte_memory_off", 3)),
    Column("bits/byte, other memory", measured("bits_per_byte_other_memory", 3)),
    Column("recall 1 back, memory off", _percent("exact_match", "1", "memory_off")),
    Column("recall 1 back, other memory", _percent("exact_match", "1", "other_memory")),
]
GATES = [
    Column(f"gate, {filler} {place}", measured("gate", 2, position=place, condition=filler))
    for filler in FILLERS
    for place in ("filler", "question")
]
NORMS = [
    Column("gradient norm, mean (recall, lm)", _both("grad_norm_mean", 2)),
    Column("gradient norm, max (recall, lm)", _both("grad_norm_max", 1)),
    Column("ended by NaN (recall, lm)", _non_finite),
]
COST = [
    Column("training tokens/s (recall, lm)", _both("train_tokens_per_s", 0)),
    Column("memory floats (recall, lm)", _floats),
]


def _caption_view(what: str) -> Callable[[list[Row]], str]:
    return lambda rows: (
        "Recall (constant, text): exact match in % by segments from fact to question, at distances that all "
        f"lines were asked at, {WILSON}; chance {_chance(rows)} %. "
        f"Bits per byte: language model of the same settings. {what}"
        "A training that gave no number stands here with its reason."
    )


BUILDERS: dict[str, Callable[[list[Row]], list[Column]]] = {
    "diag_recall": _recall,
    "diag_mqar": _mqar,
    "diag_features": _view(*NORMS),
    "diag_gates": _view(*OFF, *GATES),
    "diag_local": _view(*COST),
}
CAPTIONS: dict[str, Callable[[list[Row]], str]] = {
    "diag_recall": _caption_recall,
    "diag_mqar": _caption_mqar,
    "diag_features": _caption_view(
        "Gradient norms: over all training steps, before clipping; "
        f"{LOGARITHMS.format('norms')}. Ended by NaN: trainings whose loss or "
        "gradient was not finite, at which they stop, of those that were begun. "
    ),
    "diag_gates": _caption_view("Gate: mean sigmoid over tokens of filler and of the question's segment. "),
    "diag_local": _caption_view(
        "Tokens a second: of the whole training, on the machine as busy as it was; "
        f"{LOGARITHMS.format('speeds')}. Memory floats: what the "
        "memory and its local attention carry over a segment's end. "
    ),
}
