"""Documents: what every source yields, and the one way in which a row of any table becomes one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from infini_bench.errors import UserError
from infini_bench.schema import DataConfig
from infini_bench.units import suggest

# Where a row stands, for messages ("books.jsonl, line 3"), and its columns.
Row = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Summary:
    """One reference summary of a document; ``source`` tells the kinds of a set apart."""

    source: str
    text: str


@dataclass(frozen=True)
class Document:
    """One document, whole."""

    id: str
    title: str
    text: str
    summaries: tuple[Summary, ...] = ()

    @cached_property
    def digest(self) -> str:
        """sha256 of all fields, computed once: the texts are long and several caches ask."""
        fields = [self.id, self.title, self.text]
        fields += [part for summary in self.summaries for part in (summary.source, summary.text)]
        return hash_texts(fields)


def hash_texts(texts: Iterable[str]) -> str:
    """sha256 (hex) of a list of texts; their lengths are hashed too, so moving a border changes it."""
    total = hashlib.sha256()
    for text in texts:
        content = text.encode()
        total.update(len(content).to_bytes(8, "little"))
        total.update(content)
    return total.hexdigest()


def fingerprint(documents: Iterable[Document]) -> str:
    """Sixteen hex digits that change with any id, title, text, summary or the order of ``documents``."""
    return hash_texts(document.digest for document in documents)[:16]


def documents_from(rows: Iterable[Row], data: DataConfig, limit: int | None = None) -> list[Document]:
    """The first ``limit`` documents of a table's rows, after ``data.filter``.

    Some sets have a row for each pair of a book and a summary: rows of the same text and id (without a
    ``data.id_column``: of the same text) become one document with all their summaries.
    Raises ``UserError`` naming the row if a column is missing or its content is of no use.
    """
    documents: dict[tuple[str, str], Document] = {}
    for number, (where, row) in enumerate(rows):
        if any(_reach(row, name, where) != value for name, value in data.filter.items()):
            continue
        document = _document(where, row, number, data)
        named = data.id_column is not None or data.summary_column is None
        key = document.id if named else "", document.text  # two texts under one id are two documents
        if key not in documents and len(documents) == limit:
            if data.summary_column is None:
                break
            continue  # a later row can still bring a summary of what is there
        if key in documents:
            old = documents[key]
            new = (summary for summary in document.summaries if summary not in old.summaries)
            document = replace(old, summaries=(*old.summaries, *new))  # under the first one's id
        documents[key] = document
    return list(documents.values())


def _document(where: str, row: Mapping[str, Any], number: int, data: DataConfig) -> Document:
    name = str(number) if data.id_column is None else str(_column(row, data.id_column, "id_column", where))
    title = name if data.title_column is None else str(_column(row, data.title_column, "title_column", where))
    text = _text(_column(row, data.text_column, "text_column", where), where, data.text_column)
    if data.summary_column is None:
        return Document(name, title, text)
    value = _column(row, data.summary_column, "summary_column", where)
    return Document(name, title, text, tuple(_summaries(value, where, data.summary_column)))


def _column(row: Mapping[str, Any], name: str, key: str, where: str) -> Any:
    if name not in row:
        there = ", ".join(row)
        hint = suggest(name, row)
        raise UserError(f'{where}: no column "{name}"{hint}; set data.{key} to one of: {there}.')
    return row[name]


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise UserError(f'{where}: column "{column}" holds {type(value).__name__}, not text.')
    if not value.strip():
        raise UserError(f'{where}: column "{column}" is empty; fill it or remove the row.')
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell halves of a surrogate pair
        raise UserError(f'{where}: column "{column}" is not valid Unicode ({error.reason}).') from error
    return value


def _summaries(value: Any, where: str, column: str) -> list[Summary]:
    """A string, a list of strings or of {source, text}, or the same as columns (a dict of two lists)."""
    if value is None:
        return []
    if isinstance(value, str):
        return [Summary(column, _text(value, where, column))]
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        pairs = zip(value.get("source", [column] * len(value["text"])), value["text"], strict=True)
        value = [{"source": source, "text": text} for source, text in pairs]
    if not isinstance(value, list):
        raise UserError(f'{where}: column "{column}" is neither a text nor a list of {{source, text}}.')
    entries = [{"text": entry} if isinstance(entry, str) else entry for entry in value]
    if not all(isinstance(entry, Mapping) and "text" in entry for entry in entries):
        raise UserError(f'{where}: an entry of column "{column}" has no "text".')
    return [
        Summary(str(entry.get("source") or column), _text(entry["text"], where, f"{column}.text"))
        for entry in entries
    ]


def _reach(row: Mapping[str, Any], name: str, where: str) -> str | None:
    """Value, as text, of column ``name`` or of a key inside it: ``meta.config`` of a JSON text or struct."""
    if name in row:
        return str(row[name])
    first, *keys = name.split(".")
    value = _column(row, first, "filter", where)
    for key in keys:
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            raise UserError(f'{where}: data.filter asks for "{name}", but "{first}" is not JSON.') from error
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return str(value)
