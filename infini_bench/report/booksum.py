"""Table 4: book summaries, a line for each model, input length and kind of reference.

What has no weights stands in every sheet of its books, whatever machine and scale the models there have.
Models of the paper that were not run have a line with the paper's numbers only, which says why.
"""

from __future__ import annotations

from collections.abc import Callable

from infini_bench.report import adapted, paper
from infini_bench.report.cells import (
    ABSENT,
    BUDGET,
    MODEL,
    SEEDS,
    Column,
    Line,
    Row,
    find,
    grouped,
    measured,
    number,
)
from infini_bench.report.compare import SUMMARIES, controls
from infini_bench.report.familiar import HALVES
from infini_bench.report.variants import weightless
from infini_bench.units import format_length

NAME = "table4_booksum"
TITLES = {NAME: "Table 4: book summaries"}
LINES = {NAME: ("protocol", "length", "position")}
ROUGE = {"rouge1": "R-1", "rouge2": "R-2", "rougeL": "R-L", "rougeLsum": "R-Lsum", "overall": "overall"}
CONTROLS = {"memory_off": "memory off", "other_memory": "other memory", "shuffled": "shuffled"}
NAMES = {"names_in_book": ("names in book %", 0), "late_names": ("late names", 2)}
NAMES |= {"late_name_recall": ("late name recall %", 1)}
NO_WEIGHTS, NOT_RUN = "weights could not be had", "not run"
PLACE = ("scale", "device")


def spread(rows: list[Row]) -> list[Row]:
    """Rows of what has no weights as rows of every sheet of the same books; of one, if there is none."""
    fixed = [row for row in rows if weightless(row["config"])]
    models = [row for row in rows if not weightless(row["config"])]
    out = []
    for books in grouped(rows, ("dataset", "split")):
        here = {"dataset": books[0]["dataset"], "split": books[0]["split"]}
        own, common = ([row for row in part if here.items() <= row.items()] for part in (models, fixed))
        for sheet in grouped(own, PLACE) or grouped(common[:1], PLACE):
            place = {key: sheet[0][key] for key in PLACE}
            out += [*(sheet if own else []), *({**row, **place} for row in common)]
    return out


def printed_only(rows: list[Row], width: int) -> list[list[str]]:
    """Lines of the paper's models that have none, on books of BookSum's kind."""
    if not rows or not rows[0]["dataset"].startswith("booksum"):
        return []
    there = {row["model"] for row in rows}
    return [
        [f"{model}\n({_why(model)})", *[ABSENT] * (width - 2), _printed(model)]
        for model in paper.TABLE4
        if model not in there
    ]


def _why(model: str) -> str:
    """Why a model has the paper's numbers only."""
    return NO_WEIGHTS if model in paper.BASELINES4 else NOT_RUN


def _printed(model: str) -> str:
    row = paper.TABLE4.get(model)
    keys = ("rouge1", "rouge2", "rougeL", "overall")
    return " / ".join(f"{row[key]:.1f}" for key in keys) if row else ABSENT


def here(metric: str, digits: int, condition: str = "pairwise", sign: str = "") -> Callable[[Line], str]:
    """A cell of the line's own kind of reference."""
    return lambda line: measured(metric, digits, sign, condition=condition, position=line[0]["position"])(
        line
    )


def _input(line: Line) -> str:
    """The input's length, and how many books it cuts."""
    row = find(line, "overall", condition="pairwise", position=line[0]["position"])
    if line[0]["length"] is None:
        return "whole"
    cut = "" if row is None or "cut_books" not in row["extra"] else f"\n({row['extra']['cut_books']} cut)"
    return format_length(line[0]["length"]) + cut


def _books(line: Line) -> str:
    row = find(line, "overall", condition="pairwise", position=line[0]["position"])
    return number(row["n"] if row else None, 0)


def _table(rows: list[Row]) -> list[Column]:
    gates = list(dict.fromkeys(c for row in rows if (c := row["condition"] or "").startswith("gate_")))
    several = any(row["position"] for row in rows)
    lines = grouped(rows, ("model", "variant", *LINES[NAME]))
    titles = {**CONTROLS, **{gate: gate.replace("_", " ") for gate in gates}}
    columns = [
        MODEL,
        SEEDS,
        Column("protocol", lambda line: str(line[0]["protocol"]), wide=True),
        *([Column("input", _input)] if any(row["length"] for row in rows) else []),
        *([Column("references", lambda line: line[0]["position"] or "all")] if several else []),
        Column("books", _books, wide=True),
        *(Column(title, here(metric, 1)) for metric, title in ROUGE.items()),
        Column("overall, best reference", here("overall", 1, "best"), wide=True),
        Column("summary words", here("summary_words", 0)),
        Column("summary tokens", here("summary_tokens", 0), wide=True),
        Column("copied %", here("copied", 1), wide=True),
        Column("repeated %", here("repeated", 1), wide=True),
        Column("empty %", here("empty", 0), wide=True),
        *(Column(title, here(name, digits), wide=True) for name, (title, digits) in NAMES.items()),
        *(Column(f"overall, {title}", here("overall", 1, name)) for name, title in titles.items()),
        *(Column(f"overall, {half} books", here("overall", 1, half), wide=True) for half in HALVES),
        *(
            Column(f"{title}, {control}", here(name, digits, condition), wide=True)
            for name, (title, digits) in NAMES.items()
            for condition, control in titles.items()
        ),
        *(
            Column(f"Δ vs {name}", here("delta_overall", 2, name, "+"))
            for name in (*CONTROLS, *SUMMARIES, *controls(rows))
        ),
        *adapted.columns(rows),
        *BUDGET,
        Column(
            f"{paper.HEADER}: R-1 / R-2 / R-L / overall", lambda line: _printed(line[0]["model"]), wide=True
        ),
    ]
    last = len(columns) - 1  # the paper's, also for models that are not among the lines
    return [
        column
        for i, column in enumerate(columns)
        if not lines or i == last or any(column.cell(line) != ABSENT for line in lines)
    ]


def _caption(rows: list[Row]) -> str:
    return (
        "ROUGE F1 x 100, Porter stemmer, mean over each book's references; overall = geometric mean of R-1, "
        "R-2 and R-L. References: all of a book, or of one kind. Input: tokens from the book's start, and "
        "how many books they cut short. Copied: 5-grams that the book has; repeated: 5-grams that the "
        "summary had before; names in book: of the summary's names; late names: those that the book first "
        "has in its second half, in a summary, and of those in the references (recall). Memory off, other "
        "memory (another book's state), shuffled (the book's segments in random order), gate (all gates at "
        "one value): overall and names. Δ: overall less that of a control or of other summaries, paired over "
        "books; above zero is better. Extractive lines have no weights; their length was chosen on "
        "validation. In brackets 95 % intervals: over books with one seed, over seeds (Student) with several."
        + (_CONTROLLED if controls(rows) else "")
        + (_HALVES if any(row["condition"] in HALVES for row in rows) else "")
        + (_PRINTED if printed_only(rows, 2) else "")
        + adapted.caption(rows)
    )


_CONTROLLED = (
    " Δ vs smollm2_*: less the same pretrained model without a memory, fine-tuned on the same pairs for as "
    "many steps and rows, its summaries drawn alike; input (a control's own stands in its line) and learning "
    "rate may differ, and what the adapted model was trained on before; of several such runs the best."
)
_PRINTED = (
    " Models with the paper's numbers alone were not run here; of BART and PRIMERA the pretrained weights, "
    "on a hub, could not be had."
)
_HALVES = (
    " Known, obscure: the half of the split's books whose openings cost the pretrained model itself the "
    "fewest bits per byte, and the other half; a proxy, for plain prose costs few as well. Lead knows "
    "nothing: its difference is that of the books."
)
BUILDERS = {NAME: _table}
CAPTIONS = {NAME: _caption}
