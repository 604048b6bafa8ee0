"""Layouts of retrieval: needles in book text by length, and RULER's effective length."""

from __future__ import annotations

from collections.abc import Callable

from infini_bench.metrics.intervals import wilson
from infini_bench.report import adapted, reached
from infini_bench.report.cells import ABSENT, BUDGET, MODEL, SEEDS, Column, Line, Row, fact, grouped, number
from infini_bench.units import K, format_length

TITLES = {"table3_hard": "Table 3, harder: needles in text"}
LINES = {"table3_hard": ("condition", "protocol")}
SHARE = (
    0.85  # of the score at the base length that an effective length keeps (RULER: about 0.856 for Llama 2)
)
BASE = 4 * K  # tokens
LEAST = 50.0  # percent: who finds fewer at the base length has no effective length


def score(line: Line, length: int) -> tuple[float, float, float, int] | None:
    """Exact match over depths that are `far`: percent, its Wilson interval, trials; None if not measured."""
    rows = [row for row in line if row["metric"] == "exact_match" and row["length"] == length and far(row)]
    rows = [row for row in rows if row["value"] is not None]
    if not rows:
        return None
    n = sum(row["n"] for row in rows)
    hits = sum(row["value"] / 100 * row["n"] for row in rows)
    low, high = wilson(hits, n)
    return 100 * hits / n, 100 * low, 100 * high, n


def far(row: Row) -> bool:
    """Whether the needle lies before the question's segment: in it, no memory is needed to find it."""
    return bool(row["extra"].get("segments", 1))


def effective_length(line: Line) -> int | None:
    """The longest length up to which every score is at least SHARE of that at `base`; None without one."""
    start = score(line, base(line))
    if start is None or start[0] < LEAST:
        return None
    longest = base(line)
    for length in (length for length in asked(line) if length > longest):
        found = score(line, length)
        if found is None or found[0] < SHARE * start[0]:
            break
        longest = length
    return longest


def base(line: Line) -> int:
    """4K, or the shortest length of a line that was not asked there."""
    return BASE if BASE in asked(line) else min(asked(line))


def asked(rows: list[Row]) -> list[int]:
    """The lengths of prompts, rising."""
    return sorted({row["length"] for row in rows if row["metric"] == "exact_match"})


def _hard(rows: list[Row]) -> list[Column]:
    return [
        MODEL,
        SEEDS,
        Column("needles", lambda line: str(line[0]["condition"])),
        Column("protocol", lambda line: str(line[0]["protocol"]), wide=True),
        Column("trained at", reached.tokens),
        *(Column(format_length(length), _cell(length)) for length in asked(rows)),
        Column("effective length", _effective),
        *adapted.columns(rows),
        Column("memory floats", fact("state_floats"), wide=True),
        *BUDGET,
    ]


def _cell(length: int) -> Callable[[Line], str]:
    def cell(line: Line) -> str:
        found = score(line, length)
        if found is None:
            return ABSENT
        value, low, high = (number(share, 0) for share in found[:3])
        return f"{value}\n[{low}-{high}]"

    return cell


def _effective(line: Line) -> str:
    if "memory_off" in line[0]["condition"]:
        return ABSENT
    found = effective_length(line)
    return "none" if found is None else format_length(found)


def _caption(rows: list[Row]) -> str:
    task = rows[0]["config"]["task"]
    bases = {format_length(base(line)) for line in grouped(rows, ("model", "variant", *LINES["table3_hard"]))}
    depths = "/".join(dict.fromkeys(str(row["position"]) for row in rows if far(row)))
    return (
        f"Exact match in % over the depths before the question's segment ({depths}), with 95 % Wilson "
        f"intervals; {task['digits']}-digit numbers, {1 + task['distractors']} keys, {task['values']} "
        "values, text of another split than training's. Effective length: the longest up to which every "
        f"score is at least {SHARE:.0%} of that at {' or '.join(sorted(bases))}; none: fewer than "
        f"{LEAST:.0f} % found there. Trained at: {reached.MEANING}{adapted.caption(rows)}"
    )


BUILDERS = {"table3_hard": _hard}
CAPTIONS = {"table3_hard": _caption}
