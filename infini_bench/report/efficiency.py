"""The table of times, memory and ratios against length."""

from __future__ import annotations

from collections.abc import Callable

from infini_bench.report.cells import ABSENT, MODEL, Column, Line, Row, find, number, three
from infini_bench.units import format_length

TITLES = {"efficiency": "Time and memory against length, untrained"}
LINES = {"efficiency": ("protocol", "condition", "length")}
GiB, MiB = 1 << 30, 1 << 20
MANY = 1 << 20  # tokens; what longer documents are compared with


def cell(metric: str, position: str | None = None, unit: float = 1.0) -> Callable[[Line], str]:
    """Three digits of the value, its spread below; why there is none, if it was tried."""

    def text(line: Line) -> str:
        row = find(line, metric, position=position, condition=line[0]["condition"])
        if row is None or row["value"] is None:
            return str(row["extra"].get("failed", ABSENT)) if row else ABSENT
        value, low, high = (
            "" if row[key] is None else three(row[key] / unit) for key in ("value", "ci_low", "ci_high")
        )
        return value + (f"\n[{low}, {high}]" if low else "")

    return text


def _form(line: Line) -> str:
    backends = {row["extra"].get("backend") for row in line} - {None, ""}
    named = f"\n({', '.join(sorted(backends))})" if backends else ""
    return (line[0]["condition"] or line[0]["protocol"]) + named


def _weights(line: Line) -> str:
    """Parameters of a whole model; a peer's, whose lines have a condition, stand in its rows."""
    first = line[0]
    if first["protocol"] != "model":
        return ABSENT
    return number(first["extra"].get("params") if first["condition"] else first["params"], 0)


def _growth(rows: list[Row]) -> list[Column]:
    """What a document longer than 1M tokens costs over one of 1M, where both are measured."""
    keys = ("model", "variant", "protocol", "condition", "metric", "position")

    def value(row: Row) -> float | None:
        """Of a document's token, where the whole document is timed."""
        whole = row["metric"] == "forward_ms" and row["value"] is not None
        return row["value"] / row["length"] if whole else row["value"]

    base = {tuple(row[key] for key in keys): value(row) for row in rows if row["length"] == MANY}

    def ratio(row: Row) -> float | None:
        own, before = value(row), base.get(tuple(row[key] for key in keys))
        return own / before if row["length"] > MANY and own and before else None

    columns = []
    for title, metric, position in (
        ("forward time a token, x 1M", "forward_ms", None),
        ("forward peak memory, x 1M", "peak_bytes", "forward"),
        ("decode time, x 1M", "decode_ms", None),
        ("decode peak memory, x 1M", "peak_bytes", "decode"),
    ):
        own = [row for row in rows if (row["metric"], row["position"]) == (metric, position)]

        def text(line: Line, metric: str = metric, position: str | None = position) -> str:
            row = find(line, metric, position=position, condition=line[0]["condition"])
            return number(ratio(row) if row else None, 3)

        columns += [Column(title, text)] if any(ratio(row) for row in own) else []
    return columns


def _columns(rows: list[Row]) -> list[Column]:
    times = [
        Column(f"{mode}, ms" + " a token" * (mode == "decode"), cell(f"{mode}_ms"))
        for mode in ("forward", "train", "decode")
    ]
    rates = [
        Column(f"{mode}, {words}", cell(metric, mode, unit), wide=mode != "forward")
        for metric, words, unit in (
            ("tokens_per_s", "K tokens/s", 1e3),
            ("percent_of_peak", "% of peak", 1),
            ("peak_bytes", "peak GiB", GiB),
        )
        for mode in ("forward", "train")
    ]
    rates.insert(2, Column("decode, tokens/s", cell("tokens_per_s", "decode")))
    ratios = {
        "ratio_to_local_forward": "x local, forward",
        "ratio_to_local_train": "x local, train",
        "ratio_to_full_forward": "full / this, forward",
        "ratio_to_peer_inference": "peer / this, forward",
        "ratio_to_peer_train": "peer / this, train",
    }
    there = {row["metric"] for row in rows}
    return [
        MODEL,
        Column("form", _form),
        Column("tokens", lambda line: format_length(line[0]["length"])),
        *times,
        *rates,
        Column("state, MiB", cell("state_bytes", unit=MiB)),
        *_growth(rows),
        *(Column(title, cell(metric)) for metric, title in ratios.items() if metric in there),
        Column("params", _weights, wide=True),
    ]


def _caption(rows: list[Row]) -> str:
    flops, copies = ([row["extra"][key] for row in rows] for key in ("peak_tflops", "copy_gb_per_s"))
    low, high, slow, fast = min(flops), max(flops), min(copies), max(copies)
    peak = f"{three(low)} to {three(high)} TFLOP/s; a copy, {three(slow)} to {three(fast)} GB/s"
    return (
        "Medians, in brackets the 10th to 90th percentile of the repetitions; random weights and tokens. "
        "Model: forward over a document in calls with the state carried, a training step, decoding of a "
        "token after it. Operator: one layer's memory given projections; local (the floor) and full: "
        "scaled_dot_product_attention with the fastest backend, in parentheses. Peak: of a matrix product "
        f"in the same run, {peak}. x local: this over local attention only; full, peer / this: higher is "
        "better. Peak GiB: of tensors on a GPU, of the process on a CPU. x 1M: over the same at "
        "1M tokens. A peer's rows stand under its name, with the shape as their form; an operator's under "
        "ours, with its own name."
    )


BUILDERS = {"efficiency": _columns}
CAPTIONS: dict[str, Callable[[list[Row]], str]] = {"efficiency": _caption}
