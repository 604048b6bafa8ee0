"""How long the rows were that a training came to: a curriculum may end before its last level.

A tidy row's ``reached`` holds segments: of the seed that came least far, 0 where no record says how far, and
of the one that came furthest, at most its curriculum's last level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from infini_bench.report.cells import ABSENT, Line, Row
from infini_bench.report.records import Record
from infini_bench.units import format_length

Reached = tuple[int, int]
Curves = dict[str, list[dict[str, Any]]]
MEANING = (  # of the column, for captions
    "the longest rows that training came to, from the seed that came least far to the one that came "
    "furthest; at most: the last level of the curriculum, where no record says how far it went."
)


def curves(records: Iterable[Record]) -> Curves:
    """A run's name -> the points that its newest training record keeps of it."""
    ended = sorted(
        (r for r in records if r.kind == "train" and r.train.get("curve")), key=lambda r: r.started
    )
    return {Path(r.train["folder"]).name: r.train["curve"] for r in ended}


def reached(record: Record, known: Curves) -> Reached:
    """Of a training, or of the model that a run evaluated, at its checkpoint; 0 where a task's rows count no
    segments."""
    levels = record.config["trainer"].get("curriculum") or [record.config["task"].get("segments") or 0]
    if len(levels) == 1:
        return levels[0], levels[0]
    if record.kind == "train":
        passed = [point["level"] for point in record.train.get("curve", [])]
    else:
        curve = known.get(record.train.get("id", ""), [])
        passed = [point["level"] for point in curve if point["step"] <= record.train["steps"]]
    return (passed[-1], passed[-1]) if passed else (0, max(levels))


def together(rows: Iterable[Row]) -> Reached:
    least, most = zip(*(row["reached"] for row in rows), strict=True)
    return min(least), max(most)


def segments(line: Line, text: Callable[[int], str] = "{:,}".format) -> str:
    """The cell of ``trained at``."""
    least, most = together(line)
    if least == most:
        return text(most)
    return f"{text(least)} to {text(most)}" if least else f"at most {text(most)}"


def tokens(line: Line) -> str:
    """As `segments`, in tokens; a pretrained model as it is was trained at no length of keys."""
    if line[0]["train_tokens"] is None:
        return ABSENT
    return segments(line, lambda count: format_length(count * line[0]["config"]["memory"]["segment"]))
