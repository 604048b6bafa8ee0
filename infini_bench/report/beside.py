"""Summaries beside their references, whole, as Markdown: from a record and the data that it was made with.

Books and references are the data's, under licences of their own: they are read there, and belong to no
repository of results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infini_bench.config import build_config
from infini_bench.data import Document
from infini_bench.errors import UserError
from infini_bench.metrics import rouge
from infini_bench.report.record_files import bare
from infini_bench.report.records import Record, read_records
from infini_bench.summaries import read_summaries
from infini_bench.units import format_length

OWN = "pairwise"  # the condition of what is no control


@dataclass(frozen=True)
class Shown:
    """Which of a record's summaries. Unset: the longest input; references of every kind."""

    books: int = 5
    condition: str = OWN
    length: int | None = None
    kind: str | None = None


def beside(records: Path, name: str, data: Path | None, shown: Shown) -> str:
    """The first books of the record called ``name`` (its id, or a part that no other has).

    data: where the books are now; unset = where the record read them. Raises UserError for a record without
    summaries, and for data that are not the record's.
    """
    record = find_record(records, name)
    every = _lines(records, record)
    documents = {document.id: document for document in _documents(record, data)}
    kinds = sorted({summary.source for each in documents.values() for summary in each.summaries})
    if shown.kind not in (None, *kinds):
        raise UserError(f"No book has a reference of kind {shown.kind}; there are: {', '.join(kinds)}.")
    lines = _chosen(record, every, shown)
    books = [book for book in dict.fromkeys(line["book"] for line in lines) if _goals(documents, book, shown)]
    parts = [part for book in books[: shown.books] for part in _book(documents[book], lines, shown)]
    return "\n\n".join([*_head(record, lines[0], len(books[: shown.books]), len(books)), *parts]) + "\n"


def find_record(records: Path, name: str) -> Record:
    found = read_records(records)
    name = bare(name)
    same = [r for r in found if r.id == name] or [r for r in found if name in r.id]
    if len(same) != 1:
        there = "; `infini-bench ls runs` lists all" if not same else f", e.g. {same[0].id} and {same[1].id}"
        raise UserError(f'{len(same)} records in {records} are called "{name}"{there}.')
    return same[0]


def _lines(records: Path, record: Record) -> list[dict[str, Any]]:
    named = [(row["extra"] or {}).get("summaries") for row in record.metrics]
    saved = [file for file in named if isinstance(file, dict)]  # the task's first version had no files
    if not saved:
        raise UserError(f"{record.id} has no file of summaries; name a finished `eval booksum`.")
    return read_summaries(records, saved[0])


def _chosen(record: Record, lines: list[dict[str, Any]], shown: Shown) -> list[dict[str, Any]]:
    """Of one condition and one input length; of sentences that were chosen for one kind of reference."""
    lines = [line for line in lines if line.get("references") in (None, [None], [shown.kind])]
    if not lines:
        raise UserError(f"{record.id} chose its sentences for one kind of reference; name it with --kind.")
    conditions = list(dict.fromkeys(line["condition"] for line in lines))
    found = [line for line in lines if line["condition"] == shown.condition]
    if not found:
        there = ", ".join(conditions) or "none"
        raise UserError(f'{record.id} has no summaries "{shown.condition}"; there are: {there}.')
    lengths = list(dict.fromkeys(line["length"] for line in found))
    length = lengths[-1] if shown.length is None else shown.length
    if length not in lengths:
        there = ", ".join("whole" if n is None else format_length(n) for n in lengths)
        raise UserError(f"{record.id} has no input of {format_length(length)}; there are: {there}.")
    return [line for line in found if line["length"] == length]


def _documents(record: Record, path: Path | None) -> list[Document]:
    """The evaluated split, if the data are still those of the record."""
    from infini_bench.tasks import build_task

    place = {} if path is None else {"path": str(path)}
    task: Any = build_task(build_config({**record.config, "data": {**record.config["data"], **place}}))
    if task.fingerprint != record.data_fingerprint:
        where = path or task.cfg.data.path or task.cfg.data.name
        raise UserError(f"{where} has other books or summaries than {record.id} was made with; give --data.")
    return task.books(task.task.split)


def _goals(documents: dict[str, Document], book: str, shown: Shown) -> list[Any]:
    if book not in documents:
        raise UserError(f'The data have no book "{book}", of which the record has a summary; give --data.')
    return [s for s in documents[book].summaries if shown.kind in (None, s.source)]


def _head(record: Record, line: dict[str, Any], count: int, there: int) -> Iterator[str]:
    yield f"# {record.config['model']}: {count} of {there} books, summaries beside their references"
    read = "whole books" if line["length"] is None else f"{format_length(line['length'])} tokens of a book"
    yield (
        f"Record `{record.id}`; {read}; {line['condition']}, {line['protocol']}. ROUGE: F1 x 100 of R-1 / "
        "R-2 / R-L / R-Lsum, Porter stemmer, mean over the references below; overall: geometric mean of the "
        "first three. References are under licences of their own, which the data name."
    )


def _book(book: Document, lines: list[dict[str, Any]], shown: Shown) -> Iterator[str]:
    own = [line for line in lines if line["book"] == book.id]
    texts = [line["text"] if "text" in line else _extract(book, line["sentences"]) for line in own]
    goals = _goals({book.id: book}, book.id, shown)
    scores = rouge.score_documents([texts], [[goal.text for goal in goals]])[0]
    means = [rouge.pairwise(each) for each in scores]
    yield f"## {book.title} ({book.id})"
    yield f"ROUGE of the book: {_numbers(np.mean(means, axis=0))}"
    for goal in goals:
        yield f"### Reference, {goal.source}, {len(goal.text.split()):,} words"
        yield _quoted(goal.text)
    for line, text, mean in zip(own, texts, means, strict=True):
        yield f"### Summary, sample {line['sample']}, {len(text.split()):,} words: {_numbers(mean)}"
        yield _quoted(text)


def _extract(book: Document, sentences: list[int]) -> str:
    every = rouge.split_sentences(book.text)
    return "\n\n".join(every[i] for i in sentences)


def _numbers(scores_4: np.ndarray) -> str:
    return " / ".join(f"{score:.1f}" for score in scores_4) + f", overall {rouge.overall(scores_4[None]):.1f}"


def _quoted(text: str) -> str:
    """As a quotation, so that no line of a summary becomes a heading."""
    return "\n".join(f"> {line}".rstrip() for line in (text.strip() or "(empty)").splitlines())
