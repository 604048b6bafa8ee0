"""Rules about book summaries, beside those of `infini_bench.report.evidence`."""

from __future__ import annotations

from typing import Any

from infini_bench.report.cells import grouped, number
from infini_bench.report.evidence import (
    LINE,
    SCALES,
    Evidence,
    Finding,
    Row,
    Rule,
    few,
    finding,
    signed,
)

CONFIGURATION = (*LINE, "protocol")
KIND = (*CONFIGURATION, "position")
PLOTS = "wikipedia"  # kind of reference like BookSum's, whose corpus has no other and names none


def grows_with_input() -> Rule:
    """Each longer input raises the overall ROUGE of the books that the shorter one cuts, in pairs by book.

    Lengths of one configuration are compared, against one kind of reference, on the test split; of each
    Infini memory measured at three lengths or more, the configuration with the most lengths counts. The paper
    does not say which memory its figure is of.
    """

    def rule(evidence: Evidence) -> Finding | None:
        gains = _rows(evidence, "overall_gain")
        written = [row for row in _rows(evidence, "overall") if row["model"].startswith("infini")]
        lines = grouped(_plots(written), KIND)
        lines = [line for line in lines if len(line) >= 3]
        lines.sort(key=lambda line: (len(line), line[0]["seeds"]), reverse=True)
        known = {line[0]["model"]: line for line in reversed(lines)}
        words: list[str] = []
        rows: list[Row] = []
        holds = True
        for model, line in sorted(known.items()):
            steps = [row for row in gains if all(row[key] == line[0][key] for key in KIND)]
            steps = sorted(steps, key=lambda row: row["length"])
            if len(steps) < 2 or any(row["ci_low"] is None for row in steps):
                return None
            holds, rows = holds and all(row["ci_low"] > 0 for row in steps), [*rows, *line, *steps]
            text = ", ".join(f"{signed(row, 1)} to {row['length']:,} tokens" for row in steps)
            words.append(f"{model} {text}")
        if not words:
            return None
        text = f"Overall ROUGE that each longer input adds on the books cut before: {'; '.join(words)}."
        return finding(holds, text + few(rows), rows)

    return rule


def ahead_of(rivals: tuple[str, ...], also: tuple[str, ...] = ()) -> Rule:
    """The summaries of plots that the best adapted model writes are better than those of each rival: all
    paired intervals lie above 0.

    rivals: names of controls or models; also: of more, which count where they were run. Models are judged at
    their longest input, on the test split; the best is the one with the highest overall ROUGE there, of those
    set beside all rivals.
    """

    def rule(evidence: Evidence) -> Finding | None:
        written = [row for row in _rows(evidence, "overall") if row["base"] and row["train_tokens"]]
        written = _plots([row for row in written if row["model"].startswith("infini")])
        longest = [max(line, key=lambda row: row["length"]) for line in grouped(written, KIND)]
        deltas = _rows(evidence, "delta_overall", condition=(*rivals, *also))
        found = []
        for own in sorted(longest, key=lambda row: row["value"], reverse=True):
            beside = [row for row in deltas if all(row[key] == own[key] for key in (*KIND, "length"))]
            beside = [row for row in beside if row["ci_low"] is not None]
            if {row["condition"] for row in beside} >= {*rivals}:
                found.append([own, *sorted(beside, key=lambda row: (*rivals, *also).index(row["condition"]))])
        if not found:
            return None
        own, *beside = found[0]
        less = ", ".join(f"{row['condition']} {signed(row, 1)}" for row in beside)
        text = f"{own['model']} in {own['base']} after {own['length']:,} tokens of {own['n']} books: overall "
        text += f"ROUGE {number(own['value'], 1)} against plots; less that of {less}.{few(beside)}"
        return finding(all(row["ci_low"] > 0 for row in beside), text, [own, *beside])

    return rule


def _rows(evidence: Evidence, metric: str, condition: str | tuple = "pairwise", **match: Any) -> list[Row]:
    """Rows of Table 4 that count, of inputs cut to a length."""
    place = {"condition": condition, "scale": SCALES, "split": "test", **match}
    return [row for row in evidence.find("table4_booksum", metric, **place) if row["length"]]


def _plots(rows: list[Row]) -> list[Row]:
    kinds = {row["dataset"] for row in rows if row["position"] == PLOTS}
    return [row for row in rows if row["position"] == (PLOTS if row["dataset"] in kinds else None)]
