"""Records -> tidy rows: one number a row, seeds put together, with the columns of ``results/tables/*.csv``.

Runs that differ in anything but the seed never share a row: where model, scale, machine and corpus are the
same, the settings that differ become the row's ``variant``.

A run has a place in its task's own table, unless it is part of plans whose runs have a table of their own
(VIEWS): then in those, together with what its training was like.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from statistics import mean, variance
from typing import Any

from infini_bench.metrics.intervals import wilson
from infini_bench.report import gates, paper, rates
from infini_bench.report.adapted import SHOWN, language, lines, rooted
from infini_bench.report.compare import (
    Seed,
    booksum_deltas,
    compressions,
    deltas,
    longer,
    position_deltas,
)
from infini_bench.report.familiar import halves
from infini_bench.report.first_segment import spans
from infini_bench.report.pooled import METRIC as POOLED
from infini_bench.report.pooled import pooled
from infini_bench.report.reached import curves, reached, together
from infini_bench.report.records import Record, current
from infini_bench.report.repeated import numbered, planned
from infini_bench.report.seeds import over_seeds
from infini_bench.report.variants import VIEWS, chosen, of_memory, pretrained, setup_of, variants_of

Row = dict[str, Any]

COLUMNS = [
    *("table", "model", "variant", "protocol", "condition", "dataset", "split", "length", "position"),
    *("metric", "value", "ci_low", "ci_high", "n", "seeds"),
    *("params", "train_tokens", "state_floats", "device", "scale", "commit", "paper_value"),
]
TABLES = {
    "lm": "table2_lm",
    "passkey": "table3_passkey",
    "needles": "table3_hard",
    "booksum": "table4_booksum",
    "recall": "diag_recall",
    "mqar": "diag_mqar",
    "footprint": "table1_memory",
    "capacity": "diag_memory",
    "reach": "diag_gradients",
    "efficiency": "efficiency",
}
NAMES = (
    *("table1_memory", "table2_lm", rates.LANGUAGE, "lm_position", "figure3_gates"),
    *("table3_passkey", "table3_hard", "table4_booksum", rates.SUMMARIES),
    *("diag_memory", "diag_recall", "diag_mqar", *VIEWS, "diag_gradients", "efficiency"),
)
MODELS = (
    *("transformer_xl", "memorizing", "retrieval", "compressive", "rmt", "armt", "autocompressor", "sink"),
    *("local_block", "local_sliding", "local_sparse", "local_kernel", "full"),
    *("infini_linear", "infini_delta", "infini_delta_corrected", "infini_delta_token"),
    *("infini_linear_xl", "infini_delta_xl"),
    *("bart", "bart_unlimiformer", "primera", "primera_unlimiformer"),
    *("smollm2_1k", "smollm2_1k_sliding", "smollm2_1k_unlimiformer"),
    *("smollm2_4k", "smollm2_4k_sliding", "smollm2_4k_unlimiformer", "smollm2_full"),
)
# Table 2: the paper's rows in its order, then what they are judged by, then the other rivals.
TABLE2 = (
    *("transformer_xl", "memorizing", "rmt", "infini_linear", "infini_delta"),
    *("local_block", "local_sliding", "full", "infini_linear_xl", "infini_delta_xl"),
)
POSITIONS = ("start", "middle", "end_outside", "end")
PROPORTIONS = ("exact_match", "token_accuracy", POOLED)
COUNTS = ("non_finite",)
FACTS = ("table", "model", "variant", "device", "scale")
CELL = (*FACTS, "protocol", "condition", "dataset", "split", "length", "position", "metric")


def tidy(records: Iterable[Record]) -> list[Row]:
    """All tables' rows in printing order.

    Beside COLUMNS a row has, for layouts and the page, ``config`` (of its newest run), ``reached`` (how far
    trainings came), ``validation_loss`` (`rates.loss`), ``parts`` (the rows, one a run, that it sums up) and
    ``records`` (ids).
    """
    records = list(records)
    measured = measurements(records)
    cells: dict[tuple, dict[Seed, Row]] = defaultdict(dict)
    for row in measured:  # oldest first: a newer one of the same seed replaces one of no more trials
        by_seed = cells[tuple(row[key] for key in CELL)]
        before = by_seed.get(row["seed"])
        if before is None or row["metric"] not in PROPORTIONS or row["n"] >= before["n"]:
            by_seed[row["seed"]] = row
    cells |= pooled(cells, CELL)
    rows = [_aggregate(list(by_seed.values())) for by_seed in cells.values()]
    pairs = chain(
        deltas(measured, rates.chosen(measured)),
        longer(measured),
        position_deltas(measured),
        booksum_deltas(measured),
        halves(measured, current(records)),
    )
    rows += [_summed_up(group, values) for group, values in chain(pairs, rates.tabled(measured))]
    rows += compressions(rows)
    for row in rows:
        row["paper_value"] = paper.value(row["table"], row)
    return sorted(rows, key=_order)


def tables_of(record: Record) -> list[str]:
    """Tables that show a run. An adapted model's loss as a language model stands beside its retrieval."""
    views = [plan for plan in record.plans if plan in VIEWS]
    elsewhere = (views and len(views) == len(record.plans)) or (
        record.task == "lm" and pretrained(record.config)
    )
    return [*([] if elsewhere else [TABLES[record.task]]), *views]


def measurements(records: Iterable[Record]) -> list[Row]:
    """One row for each metric row of each finished evaluation and table, with its seed and ``extra``.

    Oldest first. In VIEWS also what each training was like (`_training`).
    """
    records = list(records)
    found = planned(rooted(current(records)))
    shown = [(r, table) for r in found if r.kind == "eval" and r.status == "done" for table in tables_of(r)]
    ended = [r for r in found if r.kind == "train" and r.status in ("done", "failed")]
    shown += [(r, table) for r in ended for table in tables_of(r) if table in VIEWS]
    learned = [r for r in ended if r.task == "lm" and not pretrained(r.config)]  # no stage of `adapt`
    shown += [(r, "figure3_gates") for r in learned if r.train.get("gates")]
    variants = variants_of(shown)
    rows = [
        row
        for record, table in shown
        for row in _measured(record, _metrics(record, table), table, variants[record.id, table])
        if table not in VIEWS or record.task != "lm" or row["position"] is None
    ]
    adapted = [(record, table) for record, table in shown if table in SHOWN]
    rows += [row for r, table in adapted for row in _language(r, found, table, variants[r.id, table])]
    known = curves(records)
    of_run = {r.id: {"reached": reached(r, known), rates.LOSS: rates.loss(r, known)} for r, _ in shown}
    return numbered([row | of_run[row["records"][0]] for row in rows], found)


def _language(record: Record, found: list[Record], table: str, variant: str | None) -> list[Row]:
    """Bits per byte of an adapted model, before and after, as rows of each line that it has in a table."""
    rows = []
    for source, metric in language(record, found):
        extra = {"corpus": metric["dataset"], "split": source.config["task"]["split"]}
        shown = [{**metric, **line, "extra": extra} for line in lines(record, table)]
        for row in _measured(record, shown, table, variant):
            rows.append({**row, "records": [record.id, source.id]})
    return rows


def _metrics(record: Record, table: str) -> list[dict[str, Any]]:
    """What a table shows of a run."""
    if table == "figure3_gates":
        return gates.metrics(record)
    if record.kind == "train":
        return _training(record)
    return [*record.metrics, *([*_gpu_seconds(record), *spans(record)] if table == "table2_lm" else [])]


def _gpu_seconds(record: Record) -> list[dict[str, Any]]:
    """Of a language model's training and reading, if a GPU did them."""
    trained = record.train.get("seconds")
    if record.device.startswith("CPU") or trained is None or record.seconds is None:
        return []
    summary = next(row for row in record.metrics if row["metric"] == "bits_per_byte")
    blank = {"ci_low": None, "ci_high": None, "extra": {"trained": trained, "evaluated": record.seconds}}
    return [{**summary, **blank, "metric": "gpu_seconds", "value": trained + record.seconds}]


def _training(record: Record) -> list[dict[str, Any]]:
    """How a training went, as metric rows; of one that failed without values, but with the reason."""
    train = record.train
    speed = record.tokens / train["seconds"] if record.tokens and train.get("seconds") else None
    values = {"final_loss": train.get("final_loss"), "train_tokens_per_s": speed}
    values |= {key: train.get(key) for key in ("grad_norm_mean", "grad_norm_max")}
    why = (record.error or "killed").strip().splitlines()[-1] if record.status == "failed" else ""
    values["non_finite"] = float(bool(re.search(r"Step \d+ gave loss", why)))  # which ends a training
    extra = {"failed": why} if why else {}
    blank = {"position": None, "condition": record.task, "dataset": record.config["data"]["name"]}
    return [{**blank, "metric": name, "value": value, "extra": extra} for name, value in values.items()]


def _measured(
    record: Record, metrics: Iterable[dict[str, Any]], table: str, variant: str | None
) -> list[Row]:
    """A run's metric rows with what is known of the run."""
    setup = setup_of(record)
    commit = (record.git_commit or "")[:10] + ("-dirty" if record.git_dirty else "")
    run = {
        "model": record.config["model"],
        "params": record.params,
        "train_tokens": _train_tokens(record),
        "state_floats": record.state_floats,
        "device": record.device,
        "scale": record.config["scale"],
        "base": pretrained(record.config),
        "commit": commit or None,
        "seed": (record.train.get("seed", record.seed), record.seed),  # of the training, of the evaluation
        "budget": tuple(sorted((k, v) for k, v in setup.items() if not of_memory(k))),
        "own": tuple(sorted((k, v) for k, v in setup.items() if of_memory(k))),
        "config": record.config,
        "records": [record.id],
    }
    rows = []
    for metric in metrics:
        by_position = table == "table2_lm" and metric["position"] is not None
        words = filter(None, [(metric.get("extra") or {}).get("variant"), variant])
        place = {"table": "lm_position" if by_position else table, "variant": " ".join(words) or None}
        rows.append({**{key: metric.get(key) for key in (*COLUMNS, "extra")}, **run, **place})
    return rows


def _train_tokens(record: Record) -> int | None:
    """Tokens of training, all stages together; in the first ones a pretrained model's own do not count.

    Of a run that stands for its best checkpoint those of the whole run, which is what it was chosen with.
    """
    own = record.tokens if record.kind == "train" else record.train.get("tokens")
    if own is None:
        return None
    if record.kind == "eval" and chosen(record):
        own = round(own * record.config["trainer"]["steps"] / record.train["steps"])
    return own + record.train.get("tokens_before", 0)


def _aggregate(rows: list[Row]) -> Row:
    """A cell's rows, one a seed, as one: proportions are pooled, COUNTS added, other metrics averaged.

    A pooled proportion's interval is Wilson's, for as many trials as the seeds' spread leaves.
    """
    values = [row["value"] for row in rows]
    first = rows[0]
    if first["metric"] in COUNTS:
        return _summed_up(rows, (sum(values), None, None, len(rows)))
    if None in values:  # a run that gave no finite number: shown as such, not averaged away
        rows = sorted(rows, key=lambda row: row["value"] is None)  # its reason is the last one's
        return _summed_up(rows, (None, None, None, first["n"]))
    if first["metric"] in PROPORTIONS:
        n = sum(row["n"] for row in rows)
        hits = round(sum(row["value"] / 100 * row["n"] for row in rows))
        spread = _overdispersion([row["value"] / 100 for row in rows], [row["n"] for row in rows], hits / n)
        low, high = wilson(hits / spread, n / spread)
        return _summed_up(rows, (100 * hits / n, 100 * low, 100 * high, n))
    if len(rows) == 1:
        return _summed_up(rows, (first["value"], first["ci_low"], first["ci_high"], first["n"]))
    return _summed_up(rows, (*over_seeds(first["metric"], values), first["n"]))


def _overdispersion(shares: list[float], trials: list[int], pooled: float) -> float:
    """How much more the seeds' shares vary than independent trials would, at least 1."""
    expected = pooled * (1 - pooled) * mean(1 / n for n in trials)
    return max(1.0, variance(shares) / expected) if len(shares) > 1 and expected > 0 else 1.0


def _summed_up(rows: list[Row], measured: tuple) -> Row:
    """One row for all seeds with ``measured`` = (value, ci_low, ci_high, n)."""
    newest = rows[-1]
    trained = [row["train_tokens"] for row in rows if row["train_tokens"] is not None]
    commits = sorted({row["commit"] for row in rows if row["commit"]})
    return {
        **newest,
        **dict(zip(("value", "ci_low", "ci_high", "n"), measured, strict=True)),
        "seeds": len({row["seed"][0] for row in rows}),
        "train_tokens": round(sum(trained) / len(trained)) if trained else None,
        "commit": "+".join(commits) or None,
        "reached": together(rows),
        "parts": rows,
        "records": sorted({record for row in rows for record in row["records"]}),
    }


def rank(names: tuple[str, ...], name: str | None) -> tuple[int, float, str]:
    """Sort key: known names in their order, then numbers (depths), then the rest; none first."""
    if name is None:
        return (-1, 0.0, "")
    try:
        return (len(names), float(name), "")
    except ValueError:
        return (names.index(name), 0.0, "") if name in names else (len(names) + 1, 0.0, name)


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort key in which ``4 pairs`` comes before ``16 pairs``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _order(row: Row) -> tuple:
    plain = [str(row[key] or "") for key in ("scale", "device", "dataset", "split", "variant", "protocol")]
    condition = _natural(row["condition"] or "")
    place = (row["length"] or 0, rank(POSITIONS, row["position"]), condition, row["metric"])
    models = (*TABLE2, *MODELS) if row["table"] in ("table2_lm", rates.LANGUAGE, "lm_position") else MODELS
    return (NAMES.index(row["table"]), plain[:4], rank(models, row["model"]), plain[4:], place)
