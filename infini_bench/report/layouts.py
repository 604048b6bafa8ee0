"""Tidy rows -> the paper's layout: one row a model, one sheet for each scale, machine and corpus.

A cell is text of one or more lines (value, interval, control); how lines are joined is the renderer's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from infini_bench.report import paper
from infini_bench.report.compare import REFERENCES
from infini_bench.report.records import Record, current
from infini_bench.report.tidy import NAMES, POSITIONS, TABLES, rank
from infini_bench.units import format_length

Row = dict[str, Any]
Line = list[Row]  # all tidy rows of one printed row

TITLES = {
    "table2_lm": "Table 2: language modelling",
    "lm_position": "Table 2 by position: loss along the document",
    "table3_passkey": "Table 3: passkey retrieval",
    "table4_booksum": "Table 4: book summaries",
}
PIPELINE = "At this scale language-modelling and ROUGE rows prove the pipeline, not the architecture."
SCALES = {"smoke": f"Trained for seconds. {PIPELINE}", "laptop": PIPELINE}
INTERVALS = "In brackets 95 % intervals: over documents with one seed, over seeds (Student) with several."
ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """``wide``: left out on a terminal."""

    title: str
    cell: Callable[[Line], str]
    wide: bool = False


@dataclass(frozen=True)
class Sheet:
    """One printed table."""

    table: str
    title: str
    columns: list[Column]
    rows: list[list[str]]
    caption: str
    failures: list[str] = field(default_factory=list)
    records: list[str] = field(default_factory=list)


def sheets(rows: list[Row], records: Iterable[Record], names: Iterable[str] = NAMES) -> list[Sheet]:
    """The sheets of the named tables; a table without any row is one empty sheet."""
    failed = _failures(records)
    made = []
    for name in names:
        own = [row for row in rows if row["table"] == name]
        groups = _grouped(own, ("scale", "device", "dataset", "split")) or [[]]
        last = len(groups) - 1
        made += [_sheet(name, group, failed.get(name, []) if i == last else []) for i, group in enumerate(groups)]
    return made


def _sheet(name: str, rows: list[Row], failures: list[str]) -> Sheet:
    lines = _grouped(rows, ("model", "variant", "protocol"))
    columns = BUILDERS[name](rows)
    head = [rows[0][key] for key in ("dataset", "split", "scale", "device")] if rows else []
    parts = [SCALES.get(head[2]), CAPTIONS[name](rows)] if rows else ["No finished run is recorded yet."]
    return Sheet(
        table=name,
        title=", ".join([TITLES[name], *(part for part in head if part)]),
        columns=columns,
        rows=[[column.cell(line) for column in columns] for line in lines],
        caption=" ".join(part for part in parts if part),
        failures=failures,
        records=sorted({record for row in rows for record in row["records"]}),
    )


def _failures(records: Iterable[Record]) -> dict[str, list[str]]:
    """Table -> its runs that did not finish and were not repeated since."""
    found: dict[str, list[str]] = {}
    for r in current(records):
        if r.status != "done" and r.task in TABLES:
            reason = (r.error or "no reason recorded").strip().splitlines()[-1]
            text = f"{r.kind} {r.config['model']}, {r.config['scale']}, seed {r.seed}: {r.status} ({reason}) [{r.id}]"
            found.setdefault(TABLES[r.task], []).append(text)
    return found


def _grouped(rows: list[Row], keys: tuple[str, ...]) -> list[Line]:
    """Rows by equal ``keys``, in order of first appearance."""
    groups: dict[tuple, Line] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.values())


# --- cells ----------------------------------------------------------------------------------------------


def find(line: Line, metric: str, **match: Any) -> Row | None:
    match = {"condition": None, "position": None, **match}
    wanted = [r for r in line if r["metric"] == metric and all(r[key] == value for key, value in match.items())]
    return wanted[0] if wanted else None


def number(value: float | None, digits: int, sign: str = "") -> str:
    return ABSENT if value is None else f"{value:{sign},.{digits}f}"


def measured(metric: str, digits: int, sign: str = "", **match: Any) -> Callable[[Line], str]:
    """A cell of the metric's value with its interval on a second line."""

    def cell(line: Line) -> str:
        row = find(line, metric, **match)
        if row is None:
            return ABSENT
        low, high = (number(row[key], digits, sign) for key in ("ci_low", "ci_high"))
        interval = "" if row["ci_low"] is None else f"\n[{low}, {high}]"
        return number(row["value"], digits, sign) + interval

    return cell


def fact(key: str) -> Callable[[Line], str]:
    return lambda line: number(line[0][key], 0)


def setting(group: str, key: str) -> Callable[[Line], str]:
    return lambda line: str(line[0]["config"][group][key])


def _name(line: Line) -> str:
    return "\n".join(part for part in (line[0]["model"], line[0]["variant"]) if part)


MODEL = Column("model", _name)
SEEDS = Column("seeds", lambda line: str(max(row["seeds"] for row in line)), wide=True)
BUDGET = [Column("params", fact("params"), wide=True), Column("train tokens", fact("train_tokens"), wide=True)]


def _paper(title: str, cell: Callable[[str], str]) -> Column:
    return Column(f"{paper.HEADER}: {title}", lambda line: cell(line[0]["model"]), wide=True)


# --- the tables -----------------------------------------------------------------------------------------


def _table2(rows: list[Row]) -> list[Column]:
    def printed(model: str) -> str:
        row = paper.TABLE2.get(model)
        return f"{row['pg19']:.2f} / {row['arxiv_math']:.2f}" if row else ABSENT

    against = [name for name in REFERENCES if any(row["condition"] == name for row in rows)]
    return [
        MODEL,
        SEEDS,
        Column("memory floats", fact("state_floats")),
        Column("segment", setting("memory", "segment")),
        Column("token ppl", measured("token_ppl", 2)),
        Column("word ppl", measured("word_ppl", 1), wide=True),
        Column("bits/byte", measured("bits_per_byte", 3)),
        Column("memory off", measured("bits_per_byte_memory_off", 3)),
        Column("other memory", measured("bits_per_byte_other_memory", 3)),
        *(Column(f"Δ vs {name}", measured("delta_bits_per_byte", 3, "+", condition=name)) for name in against),
        *BUDGET,
        _paper("token ppl, PG19 / Arxiv-math", printed),
    ]


def _caption2(rows: list[Row]) -> str:
    data = rows[0]["config"]["data"]
    tokenizer = f"{data['tokenizer']} ({data['vocab_size']})" if data["tokenizer"] == "bpe" else data["tokenizer"]
    return (
        f"Whole documents, state carried from the first token to the last; tokenizer {tokenizer}. {INTERVALS} "
        "Memory off and other memory (another document's state): bits per byte. Δ: bits per byte against that "
        "model on the same documents, seeds and budget, paired bootstrap; below zero is better."
    )


def _positions(rows: list[Row]) -> list[Column]:
    metrics = sorted({row["metric"] for row in rows})
    places = sorted({row["position"] for row in rows}, key=lambda name: rank(POSITIONS, name))
    cells = [(f"{metric} {place}", measured(metric, 3, position=place)) for metric in metrics for place in places]
    return [MODEL, SEEDS, *(Column(title, cell) for title, cell in cells)]


def _table3(rows: list[Row]) -> list[Column]:
    lengths = sorted({row["length"] for row in rows})
    places = _places(rows)
    return [
        MODEL,
        SEEDS,
        Column("protocol", lambda line: str(line[0]["protocol"]), wide=True),
        Column("trained at", lambda line: format_length(_trained_length(line[0]["config"]))),
        *(Column(_header(rows, length), _passkey(length, places)) for length in lengths),
        *BUDGET,
        _paper("32K … 1M, token accuracy after fine-tuning", _printed_passkey),
    ]


def _places(rows: list[Row]) -> list[str]:
    return sorted({row["position"] for row in rows}, key=lambda name: rank(POSITIONS, name))


def _header(rows: list[Row], length: int) -> str:
    within = all(length <= _trained_length(row["config"]) for row in rows)
    return format_length(length) + ("*" if within else "")


def _trained_length(config: Row) -> int:
    segments = config["trainer"]["curriculum"] or [config["task"]["segments"]]
    return max(segments) * config["memory"]["segment"]


def _passkey(length: int, places: list[str]) -> Callable[[Line], str]:
    """``on`` for each position, its intervals, then ``off`` for each position."""

    def triple(line: Line, control: str | None, text: Callable[[Row], str]) -> str:
        cells = [find(line, "exact_match", length=length, position=place, condition=control) for place in places]
        return "/".join(ABSENT if row is None else text(row) for row in cells) if any(cells) else ""

    def cell(line: Line) -> str:
        values = triple(line, None, lambda row: number(row["value"], 0))
        intervals = triple(line, None, lambda row: f"{number(row['ci_low'], 0)}–{number(row['ci_high'], 0)}")
        off = triple(line, "memory_off", lambda row: number(row["value"], 0))
        return "\n".join(part for part in (values, intervals and f"[{intervals}]", off and f"off {off}") if part) or ABSENT

    return cell


def _printed_passkey(model: str) -> str:
    cells = paper.TABLE3.get((model, "paper"))
    return " … ".join("/".join(map(str, cells[i])) for i in (0, -1)) if cells else ABSENT


def _caption3(rows: list[Row]) -> str:
    task, trials = rows[0]["config"]["task"], {row["n"] for row in rows if row["metric"] == "exact_match"}
    counts = str(min(trials)) if len(trials) == 1 else f"{min(trials)} to {max(trials)}"
    return (
        f"Exact match in %, {task['digits']}-digit key, needle at {'/'.join(_places(rows))}, {counts} trials a number "
        "(all seeds together); in brackets 95 % Wilson intervals; off: the same with memory off. "
        "* = not longer than trained."
    )


def _table4(rows: list[Row]) -> list[Column]:
    names = {"rouge1": "R-1", "rouge2": "R-2", "rougeL": "R-L", "rougeLsum": "R-Lsum", "overall": "overall"}

    def printed(model: str) -> str:
        row = paper.TABLE4.get(model)
        return " / ".join(f"{row[key]:.1f}" for key in ("rouge1", "rouge2", "rougeL", "overall")) if row else ABSENT

    return [
        MODEL,
        SEEDS,
        *(Column(title, measured(metric, 1)) for metric, title in names.items()),
        Column("summary tokens", measured("summary_tokens", 0)),
        Column("overall, memory off", measured("overall", 1, condition="memory_off")),
        Column("overall, other memory", measured("overall", 1, condition="other_memory")),
        *BUDGET,
        _paper("R-1 / R-2 / R-L / overall", printed),
    ]


def _caption4(rows: list[Row]) -> str:
    return (
        "ROUGE F1 x 100, mean over (book, reference) pairs; overall = geometric mean of R-1, R-2 and R-L; best of "
        f"references in the CSV. Other memory: another book's state. {INTERVALS}"
    )


BUILDERS = {"table2_lm": _table2, "lm_position": _positions, "table3_passkey": _table3, "table4_booksum": _table4}
CAPTIONS: dict[str, Callable[[list[Row]], str]] = {
    "table2_lm": _caption2,
    "lm_position": lambda rows: f"By token position in the document. {INTERVALS}",
    "table3_passkey": _caption3,
    "table4_booksum": _caption4,
}
