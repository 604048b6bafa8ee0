"""What adaptation did to a language model: bits per byte before and after, for rows of adapted models.

Found among the records: before = a language-model evaluation of the base itself, with local attention in the
same segments (``infini-bench eval lm --base BASE model=local_block``); after = one of the very run whose
keys or summaries are shown. Both on a validation split, of the same documents and as much of each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from infini_bench.report.cells import ABSENT, Column, Line, Row, measured
from infini_bench.report.records import Record

SPLIT = "validation"
METRICS = {"bits_per_byte_before": "before", "bits_per_byte_after": "after"}
# Tables that show them -> what tells their lines apart beside the protocol.
SHOWN = {"table3_passkey": (), "table3_hard": ("condition",), "table4_booksum": ("length", "position")}


def run_name(training: Record) -> str:
    """The name of its folder; one that was resumed has a record of its own in the folder of its beginning."""
    return Path(training.train.get("folder") or training.id).name


def run_before(record: Record, runs: Collection[str]) -> str | None:
    """The name of the run whose model this one goes on from, if it is among these."""
    model = (record.config.get("base") or {}).get("model")
    return name if model is not None and (name := Path(model).name) in runs else None


def rooted(records: list[Record]) -> list[Record]:
    """The same records; one that goes on from another run names the pretrained model, not that run, which is
    kept, rooted as well, as ``train["before"]``.

    Else seeds, each of which has its own chain of stages, would never share a line of a table.
    """
    runs = {run_name(r): r for r in records if r.kind == "train"}
    return [_rooted(r, runs) for r in records]


def _rooted(record: Record, runs: dict[str, Record]) -> Record:
    name = run_before(record, runs)
    if name is None:
        return record
    before = _rooted(runs[name], runs)
    model = (before.config.get("base") or {}).get("model")
    data = {**record.config["data"], "tokenizer": model}  # the stages pass it on
    config = {**record.config, "base": {**record.config["base"], "model": model}, "data": data}
    return replace(record, config=config, train={**record.train, "before": before})


def language(record: Record, records: list[Record]) -> list[tuple[Record, dict[str, Any]]]:
    """(Evaluation, metric row) of bits per byte before and after, as METRICS; newest ones.

    records: all, as `rooted` gives them.
    """
    base, run = (record.config.get("base") or {}).get("model"), record.train.get("id")
    if base is None:
        return []
    texts = [r for r in records if (r.kind, r.status, r.task) == ("eval", "done", "lm")]
    texts = [r for r in texts if r.config["task"]["split"] == SPLIT]
    before = {_corpus(r): r for r in texts if _local(r, base, record.config["memory"]["segment"])}
    texts = [r for r in texts if _asked(r) == _asked(record)]
    after = {_corpus(r): r for r in texts if run is not None and r.train.get("id") == run}
    shared = [corpus for corpus in before if corpus in after] or [*before, *after]
    if not shared:
        return []
    pairs = zip(METRICS, (before.get(shared[-1]), after.get(shared[-1])), strict=True)
    return [(r, {**_row(r), "metric": name}) for name, r in pairs if r is not None]


def _asked(record: Record) -> dict[str, Any]:
    """What the evaluation changed in the trained memory."""
    return record.config["task"].get("memory") or {}


def _local(record: Record, base: str, segment: int) -> bool:
    """Whether this is the base itself, with attention inside segments only."""
    config = record.config
    own = (config.get("base") or {}).get("model") == base and "id" not in record.train
    return own and (config["memory"]["kind"], config["memory"]["segment"]) == ("block", segment)


def _corpus(record: Record) -> tuple:
    """The documents that were read, and how many bytes of each: runs may have had more to choose from."""
    extra = _row(record)["extra"]
    return tuple(extra["documents"]), tuple(extra["bytes"])


def _row(record: Record) -> dict[str, Any]:
    row = next(row for row in record.metrics if (row["metric"], row["condition"]) == ("bits_per_byte", None))
    return {**row, "length": None}  # in these tables a length is a prompt's


def lines(record: Record, table: str) -> list[dict[str, Any]]:
    """Columns of each line that an evaluation has in a table."""
    keys = ("dataset", "split", "protocol", *SHOWN[table])
    return [
        dict(zip(keys, values, strict=True))
        for values in dict.fromkeys(tuple(row.get(key) for key in keys) for row in record.metrics)
    ]


def columns(rows: list[Row]) -> list[Column]:
    """Those of METRICS that a sheet has."""
    there = {row["metric"] for row in rows}
    return [Column(f"bits/byte, {place}", _cell(name)) for name, place in METRICS.items() if name in there]


def _cell(metric: str) -> Callable[[Line], str]:
    def cell(line: Line) -> str:
        row = next((row for row in line if row["metric"] == metric), None)
        if row is None:
            return ABSENT
        return measured(metric, 3, condition=row["condition"], position=row["position"])(line)

    return cell


def caption(rows: list[Row]) -> str:
    found = {f"{r['extra']['corpus']} ({r['extra']['split']})" for r in rows if r["metric"] in METRICS}
    if not found:
        return ""
    return (
        f" Bits/byte of {', '.join(sorted(found))}: before, of the pretrained model with attention inside "
        "the same segments; after, of the adapted model of the line."
    )
