"""Rules about length, beside those of `infini_bench.report.evidence`: what a longer input gives and costs."""

from __future__ import annotations

from infini_bench.report.cells import grouped
from infini_bench.report.evidence import INFINI, LINE, SCALES, Evidence, Finding, Row, Rule, finding, signed

CONFIGURATION = (*LINE, "protocol")
KIND = (*CONFIGURATION, "position")
PLOTS = "wikipedia"  # kind of reference like BookSum's, whose corpus has no other and names none


def grows_with_input(models: tuple[str, ...] = INFINI) -> Rule:
    """Each longer input raises the overall ROUGE of the books that the shorter one cuts, in pairs by book.

    Lengths of one configuration are compared, against one kind of reference, on the test split; of each model
    measured at three lengths or more, the configuration with the most lengths counts.
    """

    def rule(evidence: Evidence) -> Finding | None:
        place = {"condition": "pairwise", "scale": SCALES, "split": "test"}
        plots, gains = (
            [row for row in evidence.find("table4_booksum", metric, model=models, **place) if row["length"]]
            for metric in ("overall", "overall_gain")
        )
        kinds = {row["dataset"] for row in plots if row["position"] == PLOTS}
        plots = [row for row in plots if row["position"] == (PLOTS if row["dataset"] in kinds else None)]
        lines = [line for line in grouped(plots, KIND) if len(line) >= 3]
        lines.sort(key=lambda line: (len(line), line[0]["seeds"]), reverse=True)
        known = {line[0]["model"]: line for line in reversed(lines)}
        words: list[str] = []
        rows: list[Row] = []
        holds = True
        for model in (model for model in models if model in known):
            line = known[model]
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
        return finding(holds, text, rows)

    return rule


def constant_time(models: tuple[str, ...] = INFINI, within: float = 1.1) -> Rule:
    """Time a token and peak memory at the longest length measured are those of a hundredth of it.

    Of each model, in the one configuration of a whole model that was measured over the widest range.
    """

    def rule(evidence: Evidence) -> Finding | None:
        ratios, rows = [], []
        for model in models:
            place = {"model": model, "protocol": "model", "condition": None, "scale": SCALES}
            times = grouped(evidence.find("efficiency", "forward_ms", **place), CONFIGURATION)
            peaks = evidence.find("efficiency", "peak_bytes", position="forward", **place)
            ends = []
            for line in times:
                own = [row for row in peaks if all(row[key] == line[0][key] for key in CONFIGURATION)]
                ends += [[*time, *peak] for time, peak in [(_far(line), _far(own))] if time and peak]
            if not ends:
                return None
            short, long, small, large = widest = max(ends, key=lambda found: found[1]["length"])
            per_token = long["value"] / long["length"] / (short["value"] / short["length"])
            ratios += [per_token, large["value"] / small["value"]]
            rows += widest
        reach = min(row["length"] for row in rows[1::4])
        text = f"From a hundredth of it to {reach:,} tokens, time a token and "
        return finding(
            max(ratios) <= within, f"{text}peak memory grow at most {max(ratios):.2f} times.", rows
        )

    return rule


def _far(line: list[Row]) -> tuple[Row, Row] | None:
    """The rows at the longest length and at a hundredth of it or less, the shorter first."""
    long = max(line, key=lambda row: row["length"], default=None)
    short = [row for row in line if long and 100 * row["length"] <= long["length"]]
    return (max(short, key=lambda row: row["length"]), long) if long and short else None
