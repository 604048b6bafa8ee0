"""Tidy rows -> the paper's layout: one row a model, one sheet for each scale, machine and corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from infini_bench.report import (
    adapted,
    booksum,
    diagnostics,
    efficiency,
    gates,
    language,
    paper,
    probes,
    rates,
    reached,
    retrieval,
    trials,
)
from infini_bench.report.cells import (
    ABSENT,
    BUDGET,
    MODEL,
    SEEDS,
    Column,
    Line,
    Row,
    between,
    find,
    grouped,
    number,
)
from infini_bench.report.pooled import DEPTHS
from infini_bench.report.pooled import METRIC as POOLED
from infini_bench.report.records import Record, current
from infini_bench.report.tidy import NAMES, POSITIONS, rank, tables_of
from infini_bench.report.variants import BY_BASE, VIEWS
from infini_bench.schema import ANY_ALIGNMENT
from infini_bench.units import format_length

TITLES = {
    **language.TITLES,
    **rates.TITLES,
    "table3_passkey": "Table 3: passkey retrieval",
    **retrieval.TITLES,
    **diagnostics.TITLES,
    **probes.TITLES,
    **efficiency.TITLES,
    **gates.TITLES,
    **booksum.TITLES,
}
LINES = {  # what the rows of a line share beside model and variant; a control by position has its own
    **dict.fromkeys(NAMES, ("protocol",)),
    **language.LINES,
    **rates.LINES,
    **dict.fromkeys(VIEWS, ()),
    **retrieval.LINES,
    **diagnostics.LINES,
    **probes.LINES,
    **efficiency.LINES,
    **gates.LINES,
    **booksum.LINES,
}
PIPELINE = "At this scale perplexities and ROUGE prove the pipeline, not the architecture."
SMOKE = "Trained for seconds: this scale proves the pipeline only."
NEEDLE = "constant"  # the paper's kind
OF_PAPER = "token accuracy at start/middle/end (in the question's own segment)"
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
    records = list(records)
    failed = _failures(records)
    made = []
    for name in names:
        own = [row for row in rows if row["table"] == name]
        if name == booksum.NAME:
            own = booksum.spread(own)
        keys = SHEET[:-1] if name in VIEWS else SHEET + (("base",) if name in BY_BASE else ())
        *groups, last = grouped(own, keys) or [[]]
        found = [*(_sheet(name, group, []) for group in groups), _sheet(name, last, failed.get(name, []))]
        if name == "table2_lm" and own:
            found = [
                replace(sheet, caption=f"{sheet.caption} {trials.sentence(records, group)}")
                for sheet, group in zip(found, [*groups, last], strict=True)
            ]
        made += found
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
    base = f", {first['base']} adapted" if name in BY_BASE and first["base"] else ""
    return f"{TITLES[name]}, {corpus}{base}, scale {first['scale']}, {first['device']}"


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


def _table3(rows: list[Row]) -> list[Column]:
    keys = [row for row in rows if row["metric"] == "exact_match"]
    lengths, places = sorted({row["length"] for row in keys}), _places(keys)
    pooled = sorted({row["length"] for row in rows if row["metric"] == POOLED})
    return [
        MODEL,
        SEEDS,
        Column("protocol", lambda line: str(line[0]["protocol"]), wide=True),
        Column("trained at", reached.tokens),
        *(Column(_header(rows, length), _passkey(length, places)) for length in lengths),
        *(Column(f"{format_length(length)}, all depths", _found(length)) for length in pooled),
        *adapted.columns(rows),
        *BUDGET,
        Column("token accuracy", _tokens(lengths, places), wide=True),
        Column(f"{paper.HEADER}: {OF_PAPER}", _printed_passkey, wide=True),
    ]


def _places(rows: list[Row]) -> list[str]:
    return sorted({row["position"] for row in rows}, key=lambda name: rank(POSITIONS, name))


def _header(rows: list[Row], length: int) -> str:
    trained = [row for row in rows if row["train_tokens"] is not None]
    within = trained and all(
        length <= row["reached"][0] * row["config"]["memory"]["segment"] for row in trained
    )
    return format_length(length) + ("*" if within else "")


def _passkey(length: int, places: list[str]) -> Callable[[Line], str]:
    """``on`` for each position, its intervals, then ``off`` for each position."""

    def triple(line: Line, condition: str, text: Callable[[Row], str]) -> str:
        cell = {"length": length, "condition": condition}
        cells = [find(line, "exact_match", position=place, **cell) for place in places]
        return "/".join(ABSENT if row is None else text(row) for row in cells) if any(cells) else ""

    def cell(line: Line) -> str:
        on = triple(line, NEEDLE, lambda row: number(row["value"], 0))
        interval = triple(line, NEEDLE, between)
        off = triple(line, "memory_off", lambda row: number(row["value"], 0))
        parts = (on, interval and f"[{interval}]", off and f"off {off}")
        return "\n".join(part for part in parts if part) or ABSENT

    return cell


def _found(length: int) -> Callable[[Line], str]:
    """How many keys of how many, over all depths outside the question's segment, with its interval."""

    def cell(line: Line) -> str:
        row = find(line, POOLED, condition=NEEDLE, length=length)
        if row is None:
            return ABSENT
        found = round(row["value"] / 100 * row["n"])
        return f"{found} of {row['n']}\n[{between(row)}]"

    return cell


def _tokens(lengths: list[int], places: list[str]) -> Callable[[Line], str]:
    """``length: share for each position``, a line for each length."""

    def cell(line: Line) -> str:
        parts = []
        for length in lengths:
            match = {"length": length, "condition": NEEDLE}
            cells = [find(line, "token_accuracy", position=place, **match) for place in places]
            shown = "/".join(ABSENT if row is None else number(row["value"], 0) for row in cells)
            parts += [f"{format_length(length)}: {shown}"] if any(cells) else []
        return ";\n".join(parts) or ABSENT

    return cell


def _printed_passkey(line: Line) -> str:
    """The paper's zero-shot numbers for such a line, else those after fine-tuning; all its lengths."""
    cells = paper.passkey(line[0]["model"], line[0]["protocol"])
    named = zip(map(format_length, paper.TABLE3_LENGTHS), cells or (), strict=bool(cells))
    return ";\n".join(f"{length}: {'/'.join(map(str, cell))}" for length, cell in named) or ABSENT


def _caption3(rows: list[Row]) -> str:
    keys = [row for row in rows if row["metric"] == "exact_match"]
    task, trials = rows[0]["config"]["task"], {row["n"] for row in keys}
    counts = str(min(trials)) if len(trials) == 1 else f"{min(trials)} to {max(trials)}"
    return (
        f"Exact match in %, {task['digits']}-digit key, needle at {'/'.join(_places(keys))}, {counts} trials "
        "a number (all seeds together); in brackets 95 % Wilson intervals, wider where seeds disagree; "
        f"off: the same with memory off. Trained at: {reached.MEANING} "
        "* = not longer than the training of any line is known to have come to."
        f"{_caption_pooled(rows)}{_caption_alignment(rows)}{adapted.caption(rows)}"
    )


def _caption_pooled(rows: list[Row]) -> str:
    if not any(row["metric"] == POOLED for row in rows):
        return ""
    return f" All depths: keys found of those asked for at {'/'.join(DEPTHS)} together."


def _caption_alignment(rows: list[Row]) -> str:
    if not any(row["protocol"].endswith(ANY_ALIGNMENT) for row in rows):
        return ""
    return (
        f" {ANY_ALIGNMENT.capitalize()}: each trial cuts another number of tokens, up to a segment, so that "
        "questions start at all places of a segment; elsewhere all trials of a number share one place."
    )


BUILDERS = {
    **language.BUILDERS,
    **rates.BUILDERS,
    "table3_passkey": _table3,
    **retrieval.BUILDERS,
    **diagnostics.BUILDERS,
    **probes.BUILDERS,
    **efficiency.BUILDERS,
    **gates.BUILDERS,
    **booksum.BUILDERS,
}
CAPTIONS: dict[str, Callable[[list[Row]], str]] = {
    **language.CAPTIONS,
    **rates.CAPTIONS,
    "table3_passkey": _caption3,
    **retrieval.CAPTIONS,
    **diagnostics.CAPTIONS,
    **probes.CAPTIONS,
    **efficiency.CAPTIONS,
    **gates.CAPTIONS,
    **booksum.CAPTIONS,
}
