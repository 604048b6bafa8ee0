"""A rule about length, beside those of `infini_bench.report.evidence`: what a longer input costs."""

from __future__ import annotations

from infini_bench.report.cells import grouped
from infini_bench.report.evidence import INFINI, LINE, SCALES, Evidence, Finding, Row, Rule, finding

CONFIGURATION = (*LINE, "protocol")


def constant_time(models: tuple[str, ...] = INFINI, within: float = 1.1) -> Rule:
    """Time a token and peak memory at the longest length measured are those of a hundredth of it.

    Of each model, in the one configuration of a whole model that was measured over the widest range, and of
    documents of one full call or more: a shorter one is read in a smaller call, which takes less memory.
    """

    def rule(evidence: Evidence) -> Finding | None:
        calls = {record.id: record.config["task"].get("chunk", 0) for record in evidence.records}
        ratios, rows = [], []
        for model in models:
            place = {"model": model, "protocol": "model", "condition": None, "scale": SCALES}
            both = [
                evidence.find("efficiency", "forward_ms", **place),
                evidence.find("efficiency", "peak_bytes", position="forward", **place),
            ]
            whole, peaks = ([row for row in found if _full(row, calls)] for found in both)
            times = grouped(whole, CONFIGURATION)
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


def _full(row: Row, calls: dict[str, int]) -> bool:
    """Whether a document took at least one call of the size that its record asks for."""
    return all(row["length"] >= calls.get(record, 0) for record in row["records"])


def _far(line: list[Row]) -> tuple[Row, Row] | None:
    """The rows at the longest length and at a hundredth of it or less, the shorter first."""
    long = max(line, key=lambda row: row["length"], default=None)
    short = [row for row in line if long and 100 * row["length"] <= long["length"]]
    return (max(short, key=lambda row: row["length"]), long) if long and short else None
