"""Keys found at the longest lengths over all three depths together: few trials a depth say little alone."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from infini_bench.report.compare import Seed
from infini_bench.units import K

Row = dict[str, Any]
Cells = dict[tuple, dict[Seed, Row]]  # a table's cell -> its row of each seed

TABLE, METRIC = "table3_passkey", "exact_match_pooled"
DEPTHS = ("start", "middle", "end_outside")  # the needle outside the question's segment
LEAST = K * K  # tokens


def pooled(cells: Cells, names: tuple[str, ...]) -> Cells:
    """Cells of METRIC: exact match over DEPTHS, of each seed that was asked at all of them.

    names: what the parts of a cell's key are.
    """
    found: dict[tuple, dict[str, dict[Seed, Row]]] = defaultdict(dict)
    for key, by_seed in cells.items():
        cell = dict(zip(names, key, strict=True))
        asked = (cell["table"], cell["metric"]) == (TABLE, "exact_match") and (cell["length"] or 0) >= LEAST
        if asked and cell["position"] in DEPTHS:
            place = {**cell, "metric": METRIC, "position": None}
            found[tuple(place[name] for name in names)][cell["position"]] = by_seed
    made: Cells = {}
    for key, depths in found.items():
        seeds = set.intersection(*map(set, depths.values())) if len(depths) == len(DEPTHS) else ()
        if seeds:
            made[key] = {seed: _together([depths[depth][seed] for depth in DEPTHS]) for seed in sorted(seeds)}
    return made


def _together(rows: list[Row]) -> Row:
    n = sum(row["n"] for row in rows)
    blank = {"position": None, "ci_low": None, "ci_high": None, "extra": {"depths": list(DEPTHS)}}
    value = sum(row["value"] * row["n"] for row in rows) / n
    records = list(dict.fromkeys(record for row in rows for record in row["records"]))
    return {**rows[0], **blank, "metric": METRIC, "value": value, "n": n, "records": records}
