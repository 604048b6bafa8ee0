"""Columns of a printed table, and the cells in them.

A cell is text of one or more lines (value, interval, control); how lines are joined is the renderer's affair.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from infini_bench.report import paper

Row = dict[str, Any]
Line = list[Row]  # all tidy rows of one printed row

ABSENT = "—"
ASKED = "task.memory."


@dataclass(frozen=True)
class Column:
    """``wide``: left out on a terminal."""

    title: str
    cell: Callable[[Line], str]
    wide: bool = False


def settings(row: Row) -> list[str]:
    """A variant's settings without their sections, but ``task.memory``: a row may have the trained one, too.

    Values may hold blanks and dots: a setting begins where a name with an equals sign does.
    """
    pairs = (words.partition("=") for words in re.split(r" (?=[\w.]+=)", row["variant"] or "") if words)
    named = ((name if name.startswith(ASKED) else name.rpartition(".")[2], *rest) for name, *rest in pairs)
    return ["".join(parts) for parts in named]


def grouped(rows: list[Row], keys: tuple[str, ...]) -> list[Line]:
    """Rows by equal ``keys``, in order of first appearance."""
    groups: dict[tuple, Line] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.values())


def find(line: Line, metric: str, **match: Any) -> Row | None:
    """The line's row of a metric, without condition and position unless they are asked for."""
    wanted = {"metric": metric, "condition": None, "position": None, **match}.items()
    return next((row for row in line if all(row[key] == value for key, value in wanted)), None)


def number(value: float | None, digits: int, sign: str = "") -> str:
    """Halves away from 0, of nine digits: 29 keys of 40 print alike however their share came about."""
    if value is None or not math.isfinite(value):
        return ABSENT if value is None else str(value)
    exact = Decimal(str(round(value, 9))).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return f"{exact:{sign},f}"


def three(value: float) -> str:
    """Three digits, and more of what is larger, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def is_shape(words: str) -> bool:
    """Whether it is the size of what `profile` timed, b1-h8-d128-n2048, and no peer's name."""
    return words.startswith("b") and "-n" in words


def between(row: Row, digits: int = 0) -> str:
    """The interval of a share, as it is printed."""
    return f"{number(row['ci_low'], digits)}-{number(row['ci_high'], digits)}"


def measured(metric: str, digits: int, sign: str = "", **match: Any) -> Callable[[Line], str]:
    """A cell of the metric's value with its interval on a second line."""

    def cell(line: Line) -> str:
        row = find(line, metric, **match)
        if row is None:
            return ABSENT
        low, high = (number(row[key], digits, sign) for key in ("ci_low", "ci_high"))
        interval = "" if row["ci_low"] is None else f"\n[{low}, {high}]"
        return number(row["value"], digits, sign) + interval

    return cell


def fact(key: str) -> Callable[[Line], str]:
    return lambda line: number(line[0][key], 0)


def setting(group: str, key: str) -> Callable[[Line], str]:
    return lambda line: str(line[0]["config"][group][key])


def printed(title: str, cell: Callable[[str], str]) -> Column:
    """A column of the paper's own numbers, by model."""
    return Column(f"{paper.HEADER}: {title}", lambda line: cell(line[0]["model"]), wide=True)


def _name(line: Line) -> str:
    return "\n".join(part for part in (line[0]["model"], line[0]["variant"]) if part)


MODEL = Column("model", _name)


def _seeds(line: Line) -> str:
    """How many seeds, and how many trainings if some were repeated."""
    seeds = max(row["seeds"] for row in line)
    runs = max(len({part["seed"][:2] for part in row["parts"]}) for row in line)
    return f"{seeds} ({runs} runs)" if runs > seeds else str(seeds)


SEEDS = Column("seeds", _seeds, wide=True)
BUDGET = [
    Column("params", fact("params"), wide=True),
    Column("train tokens", fact("train_tokens"), wide=True),
]
