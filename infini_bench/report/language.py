"""Layouts of Table 2: language models under one budget, and their loss along the document."""

from __future__ import annotations

from collections.abc import Callable

from infini_bench.report import paper
from infini_bench.report.cells import (
    ABSENT,
    BUDGET,
    MODEL,
    SEEDS,
    Column,
    Line,
    Row,
    fact,
    find,
    measured,
    number,
    printed,
    setting,
)
from infini_bench.report.compare import FLOOR, LESS, REFERENCES, SHORTER
from infini_bench.report.seeds import LOGARITHMS

TITLES = {
    "table2_lm": "Table 2: language modelling",
    "lm_position": "Table 2 by position: loss along the document",
}
LINES = {"table2_lm": ("protocol",), "lm_position": ("condition", "protocol")}
INTERVALS = "In brackets 95 % intervals: over documents with one seed, over seeds (Student) with several"
DELTA = "delta_bits_per_byte"
# What such a memory holds of earlier segments is not differentiated, or it holds nothing of them.
UNDIFFERENTIATED = ("block", "sparse", "kernel", "xl", "knn", "compressed")


def _table2(rows: list[Row]) -> list[Column]:
    def numbers(model: str) -> str:
        row = paper.TABLE2.get(model)
        return f"{row['pg19']:.2f} / {row['arxiv_math']:.2f}" if row else ABSENT

    against = [name for name in (*REFERENCES, SHORTER) if any(row["condition"] == name for row in rows)]
    return [
        MODEL,
        SEEDS,
        Column("memory floats", fact("state_floats")),
        Column("times smaller than memorizing", _ratio),
        Column("segment", setting("memory", "segment"), wide=True),
        Column("gradient span", _span, wide=True),
        Column("read", lambda line: line[0]["protocol"] or "by document", wide=True),
        Column("token ppl", measured("token_ppl", 2)),
        Column("word ppl", measured("word_ppl", 1), wide=True),
        Column("bits/byte", measured("bits_per_byte", 3)),
        Column("memory off", measured("bits_per_byte_memory_off", 3)),
        Column("other memory", measured("bits_per_byte_other_memory", 3)),
        *(Column(f"Δ vs {name}", measured(DELTA, 3, "+", condition=name)) for name in against),
        Column("tokens/s", measured("tokens_per_s", 0), wide=True),
        Column("GPU seconds", measured("gpu_seconds", 0), wide=True),
        Column("ffn", lambda line: number(_ffn(line[0]["config"]["decoder"]), 0), wide=True),
        *BUDGET,
        printed("token ppl, PG19 / Arxiv-math", numbers),
    ]


def _ffn(decoder: Row) -> int | None:
    return decoder["ffn"] or 4 * decoder["dim"]


def _ratio(line: Line) -> str:
    row = find(line, "state_ratio", condition="memorizing")
    return number(row["value"] if row else None, 1)


def _span(line: Line) -> str:
    """Tokens that a training gradient can cross, in one layer: from where the row's memory is written to its
    use. What is cached or stored without gradient spans the own segment alone."""
    memory, task = line[0]["config"]["memory"], line[0]["config"]["task"]
    segment, sequence = memory["segment"], task.get("sequence")
    kind = memory["kind"]
    if kind in UNDIFFERENTIATED:
        return number(segment, 0)
    if sequence is None:
        return ABSENT
    if kind in ("sliding", "sink"):
        return number(min(memory.get("window") or 2 * segment, sequence), 0)
    depth = memory.get("gradient_depth")
    return number(sequence if depth is None or kind == "full" else min(depth * segment, sequence), 0)


def _caption2(rows: list[Row]) -> str:
    data = rows[0]["config"]["data"]
    size = f" with {data['vocab_size']} tokens" if data["tokenizer"] == "bpe" else ""
    return (
        "Whole documents, state carried from the first token to the last; tokenizer "
        f"{data['tokenizer']}{size}. {INTERVALS}; "
        f"{LOGARITHMS.format('perplexities, speeds and seconds')}. "
        f"A unigram model needs {_unigram(rows)} bits a token. Memory off and other memory (another "
        "document's state): bits per byte. Δ: bits per byte against that model on the same documents, seeds "
        "and budget, paired bootstrap; below zero is better; each at its own best learning rate on the "
        "validation split where `table2_lr` knows both and both were run, else both at one rate. "
        "Gradient span: tokens that a training gradient "
        "crosses in a layer. Tokens a second of the reading and GPU seconds of training and reading: on the "
        "machine as busy as it was."
    )


def _unigram(rows: list[Row]) -> str:
    row = find(rows, "unigram_bits_per_token")
    return number(row["value"] if row else None, 2)


def _positions(rows: list[Row]) -> list[Column]:
    def cell(place: str, metric: str = "loss", sign: str = "") -> Callable[[Line], str]:
        return lambda line: measured(metric, 3, sign, position=place, condition=line[0]["condition"])(line)

    places = {row["position"] for row in rows}
    ranges = sorted((place for place in places if place.isdecimal()), key=int)
    spans = sorted(places.difference(ranges))
    paired = [span for span in spans if any((row["metric"], row["position"]) == (LESS, span) for row in rows)]
    return [
        MODEL,
        SEEDS,
        Column("control", lambda line: line[0]["condition"] or ABSENT),
        Column("read", lambda line: line[0]["protocol"] or "by document"),
        *(Column(span, cell(span)) for span in spans),
        *(Column(f"{span}, less {FLOOR}", cell(span, LESS, "+")) for span in paired),
        *(Column(f"{int(place):,}", cell(place)) for place in ranges),
    ]


BUILDERS = {"table2_lm": _table2, "lm_position": _positions}
CAPTIONS: dict[str, Callable[[list[Row]], str]] = {
    "table2_lm": _caption2,
    "lm_position": lambda rows: (
        "Nats per token; column p: tokens p to 2p - 1 of every document, or of the one stream of documents "
        "joined; before these, all columns that end within the first segment, in which no memory holds "
        f"anything yet, pooled over tokens, and all others. {INTERVALS}. Less {FLOOR}: on the same "
        "documents, seeds and budget, below zero is better; paired bootstrap where all runs kept each "
        "document's sums."
    ),
}
