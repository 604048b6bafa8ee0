"""Rules about trainings, beside those of `infini_bench.report.evidence`: what became of gates and losses."""

from __future__ import annotations

from typing import Any

from infini_bench.report.cells import number
from infini_bench.report.evidence import (
    INFINI,
    SCALES,
    Evidence,
    Finding,
    Rule,
    best_known,
    few,
    finding,
    same_line,
)
from infini_bench.report.gates import history
from infini_bench.report.reached import reached
from infini_bench.report.records import Record

DIVERGED = "gave loss"  # in the error of a training whose loss or gradient was no number


def gates(metric: str, least: float, words: str, models: tuple[str, ...] = INFINI, seeds: int = 2) -> Rule:
    """Trained gates show at least so many percent of something, for every model.

    Only lines that had fewer at the first step logged count: what was there from the start is no finding.
    """

    def rule(evidence: Evidence) -> Finding | None:
        every = evidence.find("figure3_gates", metric, model=models, scale=SCALES)
        found = [row for row in every if row["condition"] is None and row["seeds"] >= seeds]
        began = [history([row for row in every if same_line(row, one)], metric)[0] for one in found]
        pairs = list(zip(found, began, strict=True))
        fresh = [row for row, (_, share) in pairs if share < least]
        rows = [best_known([row for row in fresh if row["model"] == model]) for model in models]
        known = [row for row in rows if row is not None]
        if len(known) < len(models):
            if {row["model"] for row in found} != {*models}:
                return None
            stale = [(row, at) for row, at in pairs if at[1] >= least]
            first: dict[str, tuple[int, float]] = {}  # of a model's lines, the one with the smallest share
            for row, at in sorted(stale, key=lambda pair: pair[1][1]):
                first.setdefault(row["model"], at)
            told = (f"{model} {number(share, 0)} % at step {n}" for model, (n, share) in first.items())
            needs = f"Needs gates that start elsewhere, {seeds} seeds (`reproduce figure3 --scale gpu`)."
            text = f"{words}: {', '.join(told)} already. {needs}"
            return finding(None, text, found)
        shares = ", ".join(f"{row['model']} {number(row['value'], 0)} %" for row in known)
        text = f"{words}: {shares} (borders 0.1, 0.4, 0.6 and 0.9).{few(known)}"
        return finding(all(row["value"] >= least for row in known), text, known)

    return rule


def stable(models: tuple[str, ...] = INFINI) -> Rule:
    """No training with the paper's features and normaliser ended in a loss that is no number.

    Repeated ones count each, and of their lengths those that records say training came to.
    """

    def rule(evidence: Evidence) -> Finding | None:
        runs = [r for r in evidence.records if r.kind == "train" and r.config["model"] in models]
        runs = [r for r in runs if r.config["scale"] in SCALES and _papers(r.config["memory"])]
        ended = [r for r in runs if r.status == "done" or (r.error and DIVERGED in r.error)]
        if not ended:
            return None
        broken = [r for r in ended if r.status != "done"]
        least, most = (max(ends) for ends in zip(*map(_segments, ended), strict=True))
        text = f"{len(ended) - len(broken)} of {len(ended)} trainings of {' and '.join(models)} ended with "
        text += f"finite losses, through up to {least} segments as far as records say"
        text += "." if most == least else f"; no curriculum went beyond {most}."
        return Finding(not broken, text, sorted(r.id for r in ended))

    return rule


def _papers(memory: dict[str, Any]) -> bool:
    return (memory.get("features", "elu1"), memory.get("normaliser", "sum")) == ("elu1", "sum")


def _segments(record: Record) -> tuple[int, int]:
    """`reached`, in which a language model's rows count as well."""
    own = (record.config["task"].get("sequence") or 0) // record.config["memory"]["segment"]
    least, most = reached(record, {})
    return max(least, own), max(most, own)
