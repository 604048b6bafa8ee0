"""Books that a pretrained model seems to know beside those that it does not, for the rows of Table 4.

Measure: bits per byte of a book's opening under the pretrained model itself, before any adaptation, within
one window of attention:

    infini-bench eval lm --base BASE model=local_block memory.segment=2048 --length 2K data=booksum_local \
        task.max_documents=null task.controls=false

Books below the median of the split are called ``known``, the others ``obscure``. It is a proxy: a text that
was read many times costs few bits, and so does plain prose. So the same halves are also given for what knows
nothing (lead), whose difference is the books' own, and for the memory switched off.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np

from infini_bench.metrics.intervals import bootstrap
from infini_bench.metrics.rouge import overall
from infini_bench.report.records import Record
from infini_bench.schema import EXTRACTIVE

Row = dict[str, Any]
HALVES = ("known", "obscure")
MEASURED = {"pairwise": "", "memory_off": "memory_off, "}  # which are split; names of their halves
LEAST = 2  # books of a half: one has no interval


def openings(records: list[Record]) -> dict[tuple[str, str, str], tuple[dict[str, float], str]]:
    """(Corpus, split, pretrained model) -> bits per byte of each book's opening, and the newest record's id.

    records: oldest first. Only those of a pretrained model as it is, all of the opening in its sight.
    """
    found = {}
    for r in records:
        memory, most = r.config["memory"], r.config["task"].get("max_tokens")
        base = (r.config.get("base") or {}).get("model")
        if (r.kind, r.status, r.task) != ("eval", "done", "lm") or base is None or r.train.get("id"):
            continue
        if memory["kind"] != "block" or most is None or most > memory["segment"]:
            continue
        sums = next(m for m in r.metrics if m["metric"] == "bits_per_byte" and m["position"] is None)["extra"]
        bits = np.array(sums["nats"]) / np.array(sums["bytes"]) / np.log(2)
        name = str(base).rstrip("/").rpartition("/")[2]
        place = r.config["data"]["name"], r.config["task"]["split"], name
        found[place] = dict(zip(sums["documents"], map(float, bits), strict=True)), r.id
    return found


def halves(measured: list[Row], records: list[Record]) -> Iterator[tuple[list[Row], tuple]]:
    """Overall of each half of the books: (a row a seed, (value, ci_low, ci_high, n books)).

    A model has the halves of its own pretrained model; what has no weights those of the only one there is.
    """
    known = openings(records)
    runs: dict[tuple, list[Row]] = defaultdict(list)
    keys = ("model", "variant", "condition", "protocol", "position", "length", "scale", "device")
    for row in measured:
        if row["table"] == "table4_booksum" and row["metric"] == "overall" and "scores" in row["extra"]:
            runs[*(row[key] for key in keys), row["dataset"], row["split"], row["base"]].append(row)
    for (*_, dataset, split, base), rows in runs.items():
        here = {key[2]: each for key, each in known.items() if key[:2] == (dataset, split)}
        alone = list(here.values()) if len(here) == 1 and _weightless(rows[0]) else [None]
        chosen = here.get(base, alone[0])
        if chosen and rows[0]["condition"] in MEASURED:
            yield from _split(list({row["seed"]: row for row in rows}.values()), *chosen)


def _weightless(row: Row) -> bool:
    return row["config"]["task"].get("baseline") in EXTRACTIVE


def _split(rows: list[Row], bits: dict[str, float], record: str) -> Iterator[tuple[list[Row], tuple]]:
    """rows: one a seed, newest; scores are their means. Nothing if a book was not measured."""
    books = rows[0]["extra"]["books"]
    if any(row["extra"]["books"] != books for row in rows) or not {*books} <= {*bits}:
        return
    border = median(bits.values())
    scores_D4 = np.mean([row["extra"]["scores"] for row in rows], 0)
    low = np.array([bits[book] < border for book in books])
    for half, inside in zip(HALVES, (low, ~low), strict=True):
        if inside.sum() >= LEAST:
            condition = MEASURED[rows[0]["condition"]] + half
            own = [book for book, kept in zip(books, inside, strict=True) if kept]
            extra = {"books": own, "border_bits_per_byte": border}
            heads = [
                {**row, "condition": condition, "extra": extra, "records": [*row["records"], record]}
                for row in rows
            ]
            value, bounds = overall(scores_D4[inside]), bootstrap(scores_D4[inside], overall)
            yield heads, (value, *(bounds or (None, None)), int(inside.sum()))
