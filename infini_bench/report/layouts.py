"""Tidy rows -> the paper's layout: one row a model, one sheet for each scale, machine and corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from infini_bench.report import booksum, diagnostics, efficiency, paper, probes
from infini_bench.report.cells import (
    ABSENT,
    BUDGET,
    MODEL,
    SEEDS,
    Column,
    Line,
    Row,
    fact,
    find,
    grouped,
    measured,
    number,
    setting,
)
from infini_bench.report.compare import REFERENCES
from infini_bench.report.records import Record, current
from infini_bench.report.tidy import NAMES, POSITIONS, VIEWS, rank, tables_of
from infini_bench.units import format_length

TITLES = {
    "table2_lm": "Table 2: language modelling",
    "lm_position": "Table 2 by position: loss along the document",
    "table3_passkey": "Table 3: passkey retrieval",
    **diagnostics.TITLES,
    **probes.TITLES,
    **efficiency.TITLES,
    **booksum.TITLES,
}
LINES = {  # what the rows of a line share beside model and variant; a control by position has its own
    **dict.fromkeys(NAMES, ("protocol",)),
    "lm_position": ("condition",),
    **dict.fromkeys(VIEWS, ()),
    **diagnostics.LINES,
    **probes.LINES,
    **efficiency.LINES,
    **booksum.LINES,
}
PIPELINE = "At this scale perplexities and ROUGE prove the pipeline, not the architecture."
SMOKE = "Trained for seconds: this scale proves the pipeline only."
INTERVALS = "In brackets 95 % intervals: over documents with one seed, over seeds (Student) with several."
DELTA = "delta_bits_per_byte"
NEEDLE = "constant"  # the paper's kind
SHEET = ("scale", "device", "dataset", "split")  # what the rows of a sheet share; views have no split
OF_SCALE = ("table2_lm", "lm_position", "table4_booksum")


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
        if name == booksum.NAME:
            own = booksum.spread(own)
        *groups, last = grouped(own, SHEET if name not in VIEWS else SHEET[:-1]) or [[]]
        made += [*(_sheet(name, group, []) for group in groups), _sheet(name, last, failed.get(name, []))]
    return made


def _sheet(name: str, rows: list[Row], failures: list[str]) -> Sheet:
    lines = grouped(rows, ("model", "variant", *LINES[name]))
    columns = BUILDERS[name](rows)
    cells = [[column.cell(line) for column in columns] for line in lines]
    return Sheet(
        table=name,
        title=_title(name, rows),
        columns=columns,
        rows=cells + (booksum.printed_only(rows, len(columns)) if name == booksum.NAME else []),
        caption=_caption(name, rows),
        failures=failures,
        records=sorted({record for row in rows for record in row["records"]}),
    )


def _title(name: str, rows: list[Row]) -> str:
    if not rows:
        return TITLES[name]
    first = rows[0]
    split = None if name in VIEWS else first["split"]
    corpus = f"{first['dataset']} ({split})" if split else first["dataset"]
    return f"{TITLES[name]}, {corpus}, scale {first['scale']}, {first['device']}"


def _caption(name: str, rows: list[Row]) -> str:
    if not rows:
        return "No run is recorded yet."
    if name in (*probes.CAPTIONS, *efficiency.CAPTIONS):  # untrained: no scale is too small for it
        return CAPTIONS[name](rows)
    scale = rows[0]["scale"]
    warned = PIPELINE if name in OF_SCALE else ""  # a memory that finds the key is no matter of scale
    warning = {"smoke": SMOKE, "laptop": warned}.get(scale, "")
    return f"{warning} {CAPTIONS[name](rows)}".strip()


def _failures(records: Iterable[Record]) -> dict[str, list[str]]:
    """Table -> its runs that did not finish and were not repeated since."""
    found: dict[str, list[str]] = {}
    for r in current(records):
        if r.status != "done":
            reason = (r.error or "killed, or still running").strip().splitlines()[-1]
            what = f"{r.kind} {r.config['model']}, {r.config['scale']}, seed {r.seed}"
            for table in tables_of(r):
                found.setdefault(table, []).append(f"{what}: {r.status} ({reason}) [{r.id}]")
    return found


# --- the tables -----------------------------------------------------------------------------------------


def _paper(title: str, cell: Callable[[str], str]) -> Column:
    return Column(f"{paper.HEADER}: {title}", lambda line: cell(line[0]["model"]), wide=True)


def _table2(rows: list[Row]) -> list[Column]:
    def printed(model: str) -> str:
        row = paper.TABLE2.get(model)
        return f"{row['pg19']:.2f} / {row['arxiv_math']:.2f}" if row else ABSENT

    against = [name for name in REFERENCES if any(row["condition"] == name for row in rows)]
    return [
        MODEL,
        SEEDS,
        Column("memory floats", fact("state_floats")),
        Column("segment", setting("memory", "segment"), wide=True),
        Column("token ppl", measured("token_ppl", 2)),
        Column("word ppl", measured("word_ppl", 1), wide=True),
        Column("bits/byte", measured("bits_per_byte", 3)),
        Column("memory off", measured("bits_per_byte_memory_off", 3)),
        Column("other memory", measured("bits_per_byte_other_memory", 3)),
        *(Column(f"Δ vs {name}", measured(DELTA, 3, "+", condition=name)) for name in against),
        *BUDGET,
        _paper("token ppl, PG19 / Arxiv-math", printed),
    ]


def _caption2(rows: list[Row]) -> str:
    data = rows[0]["config"]["data"]
    size = f" with {data['vocab_size']} tokens" if data["tokenizer"] == "bpe" else ""
    return (
        "Whole documents, state carried from the first token to the last; tokenizer "
        f"{data['tokenizer']}{size}. {INTERVALS} "
        f"A unigram model needs {_unigram(rows)} bits a token. Memory off and other memory (another "
        "document's state): bits per byte. Δ: bits per byte against that model on the same documents, seeds "
        "and budget, paired bootstrap; below zero is better."
    )


def _unigram(rows: list[Row]) -> str:
    row = find(rows, "unigram_bits_per_token")
    return number(row["value"] if row else None, 2)


def _positions(rows: list[Row]) -> list[Column]:
    def cell(place: str) -> Callable[[Line], str]:
        return lambda line: measured("loss", 3, position=place, condition=line[0]["condition"])(line)

    return [
        MODEL,
        SEEDS,
        Column("control", lambda line: line[0]["condition"] or ABSENT),
        *(Column(f"{int(place):,}", cell(place)) for place in _places(rows)),
    ]


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

    def triple(line: Line, condition: str, text: Callable[[Row], str]) -> str:
        cell = {"length": length, "condition": condition}
        cells = [find(line, "exact_match", position=place, **cell) for place in places]
        return "/".join(ABSENT if row is None else text(row) for row in cells) if any(cells) else ""

    def cell(line: Line) -> str:
        on = triple(line, NEEDLE, lambda row: number(row["value"], 0))
        interval = triple(line, NEEDLE, lambda row: f"{row['ci_low']:.0f}-{row['ci_high']:.0f}")
        off = triple(line, "memory_off", lambda row: number(row["value"], 0))
        parts = (on, interval and f"[{interval}]", off and f"off {off}")
        return "\n".join(part for part in parts if part) or ABSENT

    return cell


def _printed_passkey(model: str) -> str:
    cells = paper.TABLE3.get((model, "paper"))
    return " … ".join("/".join(map(str, cells[i])) for i in (0, -1)) if cells else ABSENT


def _caption3(rows: list[Row]) -> str:
    task, trials = rows[0]["config"]["task"], {row["n"] for row in rows if row["metric"] == "exact_match"}
    counts = str(min(trials)) if len(trials) == 1 else f"{min(trials)} to {max(trials)}"
    return (
        f"Exact match in %, {task['digits']}-digit key, needle at {'/'.join(_places(rows))}, {counts} trials "
        "a number (all seeds together); in brackets 95 % Wilson intervals, wider where seeds disagree; "
        "off: the same with memory off. * = not longer than trained."
    )


BUILDERS = {
    "table2_lm": _table2,
    "lm_position": _positions,
    "table3_passkey": _table3,
    **diagnostics.BUILDERS,
    **probes.BUILDERS,
    **efficiency.BUILDERS,
    **booksum.BUILDERS,
}
CAPTIONS: dict[str, Callable[[list[Row]], str]] = {
    "table2_lm": _caption2,
    "lm_position": lambda rows: (
        f"Nats per token; column p: tokens p to 2p - 1 of every document. {INTERVALS}"
    ),
    "table3_passkey": _caption3,
    **diagnostics.CAPTIONS,
    **probes.CAPTIONS,
    **efficiency.CAPTIONS,
    **booksum.CAPTIONS,
}
