"""Trainings run more than once with the same settings and seed: each is a further run of that seed.

On a GPU they differ, by as much as other seeds do. So none may hide another.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from infini_bench.report.records import Record, training_of

Row = dict[str, Any]
LINE = ("table", "model", "variant", "device", "scale", "protocol", "dataset", "split", "seed")


def planned(records: list[Record]) -> list[Record]:
    """The same records, each in all plans of its training's settings and seed, wherever it was repeated."""
    plans: dict[str | None, set[str]] = defaultdict(set)
    for r in records:
        plans[training_of(r)[0]] |= {*r.plans}
    return [replace(r, plans=sorted(plans[digest])) if (digest := training_of(r)[0]) else r for r in records]


def numbered(rows: list[Row], records: list[Record]) -> list[Row]:
    """The same rows, ``seed`` being (of the training, how many runs of the line with it were earlier, of the
    evaluation).

    rows: with (of the training, of the evaluation); the first of ``records`` is the run's own.
    """
    names = {r.id: training_of(r)[1] or "" for r in records}
    runs: dict[tuple, set[str]] = defaultdict(set)
    for row in rows:
        runs[tuple(row[key] for key in LINE)] |= {names[row["records"][0]]}
    ordered = {line: sorted(each) for line, each in runs.items()}  # a name begins with the time
    made = []
    for row in rows:
        earlier = ordered[tuple(row[key] for key in LINE)].index(names[row["records"][0]])
        made.append({**row, "seed": (row["seed"][0], earlier, row["seed"][1])})
    return made
