"""Tables and figures from records, and from nothing else: files, one page, or a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infini_bench.errors import UserError
from infini_bench.files import atomic_write
from infini_bench.report import claims, paper, render, retrieval_figures
from infini_bench.report.evidence import Evidence
from infini_bench.report.figures import svg
from infini_bench.report.layouts import sheets
from infini_bench.report.records import Record, current, read_records
from infini_bench.report.style import drawn
from infini_bench.report.tidy import COLUMNS, NAMES, tidy
from infini_bench.units import suggest

if TYPE_CHECKING:
    from rich.console import Console

TRAINING = "table3_training"  # the figure of losses and gates while models learn to retrieve
FILE_WIDTH = 140  # columns, where the output is no terminal
FORMATS = {"csv": ".csv", "md": ".md", "latex": ".tex", "html": ".html"}
RENDERERS = {"md": render.markdown, "latex": render.latex}
PRINTED = ("table2_lm", "table3_passkey", "table4_booksum")


def write_report(
    records: Path | str,
    out: Path | str,
    formats: Iterable[str] = ("csv", "md"),
    figures: Path | str | None = None,
) -> list[Path]:
    """Write the tables and figures of all records in a folder and return the files.

    csv (tidy), md and latex give one file a table, ``<out>/<name>.<suffix>``; html gives one page with the
    figures in it, ``<out>/report.html``, or ``out`` itself if that ends in ``.html``. Tables with a figure
    and something to show in it give ``<figures>/<name>.svg``, and trainings ``table3_training.svg``; figures
    unset = the folder ``figures`` beside ``out``, or nothing but the page if ``out`` is one.
    Raises UserError for an unknown format, a missing folder or a broken record.
    """
    formats = list(formats)
    if unknown := [form for form in formats if form not in FORMATS]:
        raise UserError(
            f'unknown format "{unknown[0]}"{suggest(unknown[0], FORMATS)}; there are {", ".join(FORMATS)}'
        )
    if not Path(records).is_dir():
        raise UserError(f"There is no folder of records at {records}; nothing was written.")
    found = read_records(records)
    if not found:
        raise UserError(f"There is no record in {records}; nothing was written.")
    rows = tidy(found)
    files: dict[str, str] = {}
    lines = claims.judged(Evidence(rows, found))
    drawings = {name: svg(name, [row for row in rows if row["table"] == name]) for name in NAMES}
    drawings[TRAINING] = drawn(lambda: retrieval_figures.training(current(found)))
    pictures = {name: text for name, text in drawings.items() if text is not None}
    for form in formats:
        if form == "html":
            made = [claims.sheet(lines), *sheets(rows, found)]
            files["report.html"] = render.html(made, paper.SOURCE, pictures)
        else:
            files |= {name + FORMATS[form]: _table(name, form, rows, found) for name in NAMES}
            files[claims.NAME + FORMATS[form]] = _claims(form, lines)
    page = Path(out).suffix == ".html" and list(files) == ["report.html"]  # a file was named, not a folder
    written = {Path(out) if page else Path(out) / name: text for name, text in files.items()}
    if figures or not page:
        folder = Path(figures) if figures else Path(out).parent / "figures"
        written |= {folder / f"{name}.svg": text for name, text in pictures.items()}
    for path, text in written.items():
        atomic_write(path, text)
    return list(written)


def _table(name: str, form: str, rows: list[dict[str, Any]], records: list[Record]) -> str:
    if form == "csv":
        return to_csv([row for row in rows if row["table"] == name])
    return RENDERERS[form](sheets(rows, records, [name]))


def _claims(form: str, lines: list[list[str]]) -> str:
    if form == "csv":
        return claims.to_csv(lines)
    return RENDERERS[form]([claims.sheet(lines)])


def to_csv(rows: list[dict[str, Any]]) -> str:
    """Tidy rows as CSV: six digits of every float, empty where a column does not apply."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_plain(row[key]) for key in COLUMNS] for row in rows)
    return text.getvalue()


def _plain(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def print_tables(
    records: Iterable[Record], console: Console | None = None, names: Iterable[str] = PRINTED
) -> None:
    """Print the named tables in the paper's layout."""
    from rich.console import Console

    records = list(records)
    if console is None:
        console = Console()
        console.width = console.width if console.is_terminal else FILE_WIDTH
    render.show(sheets(tidy(records), records, names), console)
