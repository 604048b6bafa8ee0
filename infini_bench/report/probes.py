"""Tables of what is asked of untrained models: carried state, read-back, gradient reach."""

from __future__ import annotations

from collections.abc import Callable

from infini_bench.report import paper
from infini_bench.report.cells import ABSENT, MODEL, SEEDS, Column, Line, Row, find, number
from infini_bench.report.seeds import LOGARITHMS

TITLES = {
    "table1_memory": "Table 1: what crosses a segment boundary",
    "diag_memory": "The compressive memory alone, untrained: what can be read back",
    "diag_gradients": "Gradient reach, untrained: norm at the written segment",
}
LINES = {  # what a printed row has in common, beside model and variant
    "table1_memory": (),
    "diag_memory": ("protocol", "condition"),
    "diag_gradients": ("condition",),
}


# --- tables ---------------------------------------------------------------------------------------------


def _footprint(rows: list[Row]) -> list[Column]:
    counts = sorted({row["extra"]["segments"] for row in rows})

    def value(metric: str, segments: int) -> Callable[[Line], str]:
        def cell(line: Line) -> str:
            found = [r for r in line if (r["metric"], r["extra"]["segments"]) == (metric, segments)]
            return number(found[0]["value"], 0) if found else ABSENT

        return cell

    def words(part: int) -> Callable[[Line], str]:
        def cell(line: Line) -> str:
            name = line[0]["model"]
            row = paper.TABLE1.get("infini" if name.startswith("infini") else name)
            return row[part] if row else ABSENT

        return cell

    last = max(counts, default=0)
    return [
        MODEL,
        *(Column(f"floats after {n} segments", value("state_floats", n)) for n in counts),
        Column("grows", _growth),
        Column("bytes", value("state_bytes", last)),
        Column("unfinished segment, floats", value("local_floats", last)),
        Column("paper's formula, floats", value("paper_formula_floats", last)),
        Column("paper: formula", words(0), wide=True),
        Column("paper: context length", words(1), wide=True),
        Column("paper: update", words(2), wide=True),
        Column("paper: retrieval", words(3), wide=True),
    ]


def _growth(line: Line) -> str:
    """How much larger the state is after the last count than after the first."""
    floats = [row["value"] for row in line if row["metric"] == "state_floats"]
    return "no" if floats[-1] == floats[0] else f"x {floats[-1] / floats[0]:.3g}" if floats[0] else "yes"


def _caption1(rows: list[Row]) -> str:
    config = rows[0]["config"]
    body, n = config["decoder"], config["memory"]["segment"]
    made = "; shapes alone, no values" if config["task"]["shapes"] else ""
    return (
        f"Counted on live tensors at a segment boundary, one row, float32{made}: {body['layers']} layers of "
        f"{body['heads']} heads, width {body['dim']}, segments of {n} tokens. Unfinished segment: what is "
        "kept of it at its fullest, beside the state. Paper's formula: its Table 1 as printed, at these "
        "sizes, after as many segments as the last count; without the Transformer-XL cache that memorizing "
        "and infini_*_xl have besides."
    )


def _capacity(rows: list[Row]) -> list[Column]:
    ratios = sorted({row["position"] for row in rows}, key=float)

    def cell(ratio: str) -> Callable[[Line], str]:
        def text(line: Line) -> str:
            columns = {"position": ratio, "condition": line[0]["condition"]}
            found = [find(line, metric, **columns) for metric in ("cosine", "relative_error", "gain")]
            if found[0] is None:
                return ABSENT
            bounds = (
                "" if found[0]["ci_low"] is None else "\n[{ci_low:.2f}, {ci_high:.2f}]".format(**found[0])
            )
            return " / ".join(number(row["value"], 2) if row else ABSENT for row in found) + bounds

        return text

    return [
        MODEL,
        Column("writes", lambda line: str(line[0]["protocol"])),
        Column("keys", lambda line: str(line[0]["condition"])),
        *(Column(f"P / D = {ratio}", cell(ratio)) for ratio in ratios),
    ]


def _caption_capacity(rows: list[Row]) -> str:
    task, size = rows[0]["config"]["task"], rows[0]["extra"]["head_dim"]
    return (
        f"Cosine / relative error / gain of what is read with the exact key, and the cosine's 95 % interval "
        f"(bootstrap over {task['trials']} memories; Student over seeds with several). P distinct pairs, "
        f"D = {size}; gain: the part of the value that comes back. Duplicated, zipf: {task['copies']} writes "
        f"a pair; collinear: cosine {task['cosine']:g} between keys. Writes: how many make a segment."
    )


def _reach(rows: list[Row]) -> list[Column]:
    distances = sorted({row["position"] for row in rows}, key=int)

    def cell(distance: str) -> Callable[[Line], str]:
        def text(line: Line) -> str:
            row = find(line, "gradient_norm", position=distance, condition=line[0]["condition"])
            if row is None or row["value"] is None:
                return ABSENT
            if row["value"] == 0:
                return "0"
            low, high = row["ci_low"], row["ci_high"]
            return f"{row['value']:.1e}" + ("" if low is None else f"\n[{low:.1e}, {high:.1e}]")

        return text

    return [
        MODEL,
        SEEDS,
        Column("between", lambda line: str(line[0]["condition"])),
        *(Column(f"{int(n):,}", cell(n)) for n in distances),
    ]


def _caption_reach(rows: list[Row]) -> str:
    config = rows[0]["config"]
    body, n = config["decoder"], config["memory"]["segment"]
    return (
        "Norm of the gradient of the last segment's mean loss at the embeddings of segment 0; column s: so "
        f"many segments later. {body['layers']} layers, width {body['dim']}, segments of {n} tokens, random "
        "weights. Between: one segment repeated, or random tokens. 0 is exact: no path leads there, or "
        "only one through weights that start at 0. In brackets 95 % intervals: over texts with one seed, "
        f"over seeds (Student) with several; {LOGARITHMS.format('norms')}."
    )


BUILDERS = {"table1_memory": _footprint, "diag_memory": _capacity, "diag_gradients": _reach}
CAPTIONS: dict[str, Callable[[list[Row]], str]] = {
    "table1_memory": _caption1,
    "diag_memory": _caption_capacity,
    "diag_gradients": _caption_reach,
}
