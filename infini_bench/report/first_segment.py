"""Loss over the first segment of a document, where no memory holds anything yet, and over all after it.

An evaluation keeps losses of tokens 2^k to 2^(k+1) - 1. A span is made of such ranges, so that the first one
ends with the last range inside the segment, and its name says where: tokens 1 to 511 of a segment of 512.
Legend: D documents.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from infini_bench.metrics.perplexity import interval, mean_nats
from infini_bench.report.cells import grouped
from infini_bench.report.records import Record

Row = dict[str, Any]


def spans(record: Record) -> list[Row]:
    """Metric rows ``loss`` of both spans, by condition; none where ranges lack their numbers of tokens."""
    ranges = [row for row in record.metrics if row["metric"] == "loss" and "tokens" in row["extra"]]
    border = 2 ** ((record.config["memory"]["segment"] + 1).bit_length() - 1)
    rows = []
    for group in grouped(ranges, ("condition",)):
        for name, near in ((f"1 to {border - 1}", True), (f"from {border}", False)):
            part = [row for row in group if (int(row["position"]) < border) is near]
            rows += [_pooled(part, record) | {"position": name}] if part else []
    return rows


def _pooled(ranges: list[Row], record: Record) -> Row:
    """All tokens of the ranges together; with documents' sums and an interval where every range has them."""
    tokens = [row["extra"]["tokens"] for row in ranges]
    value = sum(row["value"] * n for row, n in zip(ranges, tokens, strict=True)) / sum(tokens)
    known = all("nats" in row["extra"] for row in ranges)
    first_D, last_D = _documents(record)
    read_D, sums_D2 = np.zeros(len(last_D), bool), np.zeros((len(last_D), 2))  # sums: nats, tokens
    for row in ranges:
        low = int(row["position"])
        there_D = (first_D < 2 * low) & (last_D >= low)
        read_D |= there_D
        if known:
            sums_D2[there_D] += np.stack([row["extra"]["nats"], row["extra"]["counts"]], 1)
    nats, counts = sums_D2[read_D].T.tolist()
    bounds = interval(mean_nats, nats, counts, seed=record.seed) if known else None
    ends = dict(zip(("ci_low", "ci_high"), bounds or (None, None), strict=True))
    extra = {"tokens": sum(tokens), **({"nats": nats, "counts": counts} if known else {})}
    return {**ranges[0], **ends, "value": value, "n": int(read_D.sum()), "extra": extra}


def _documents(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """(D,) positions of the first and the last predicted token of each document."""
    whole = next(
        row for row in record.metrics if (row["metric"], row["condition"]) == ("bits_per_byte", None)
    )
    tokens_D = np.array(whole["extra"]["tokens"])
    ends_D = np.cumsum(tokens_D + 1) - 1 if record.config["task"].get("joined") else tokens_D
    return ends_D - tokens_D + 1, ends_D
