"""``infini-bench rebuild``: sets to compare with the recorded ones, made from public data sets on the hub.

A file of ``conf/rebuild/`` says which: documents by number (``splits``), or from the first on until a split
has so many bytes of text (``bytes``). Rows are streamed, nothing but the chosen documents is kept, and each
split is one file, ``train|validation|test.jsonl.xz``, as ``data=books_local`` and ``math_local`` read it.
"""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from infini_bench.data.documents import Document, documents_from
from infini_bench.errors import UserError
from infini_bench.files import atomic_write
from infini_bench.schema import DataConfig
from infini_bench.units import suggest

FOLDER = Path(str(files("infini_bench.conf"))) / "rebuild"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Rebuild:
    """A file of ``conf/rebuild/``. Either ``splits`` (numbers of documents) or ``bytes`` is given."""

    name: str
    hub_id: str
    hub_revision: str | None = None
    download_bytes: int | None = None  # of all rows, which are read through; None = until it is enough
    id_column: str | None = None  # its last digits are the document's number; unset = the row's number
    title_column: str | None = None
    filter: dict[str, str] = field(default_factory=dict)
    splits: dict[str, list[int]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def plan(self, out: Path) -> str:
        """What would be read and written, in words; asks no network."""
        size = (
            "as much as is needed" if self.download_bytes is None else f"{self.download_bytes / 1e9:.1f} GB"
        )
        revision = f" ({self.hub_revision})" if self.hub_revision else ""
        where = "".join(f", rows with {key}={value}" for key, value in self.filter.items())
        lines = [f"read: https://huggingface.co/datasets/{self.hub_id}{revision}, {size}{where}"]
        for split in SPLITS:
            if split in self.splits:
                ids = self.splits[split]
                some = ", ".join(map(str, ids[:5])) + (" ..." if len(ids) > 5 else "")
                what = f"{len(ids)} documents by number: {some}"
            else:
                what = f"documents from the first on, up to {self.bytes[split] / 1e6:.1f} MB of text"
            lines.append(f"write: {out / f'{split}.jsonl.xz'}: {what}")
        return "\n".join(lines)

    def documents(self, split: str) -> list[Document]:
        """The split's documents. Raises UserError for what the hub does not have, or too little of it."""
        rows = _rows(self.hub_id, self.hub_revision, split)
        data = DataConfig(
            id_column=self.id_column, title_column=self.title_column, filter=self.filter, text_column="text"
        )
        chosen = self._by_number(rows, data, split) if self.splits else self._by_size(rows, data, split)
        return [*chosen]

    def _by_number(
        self, rows: Iterable[Mapping[str, Any]], data: DataConfig, split: str
    ) -> Iterator[Document]:
        missing = set(self.splits[split])
        for row in rows:
            number = int((re.findall(r"\d+", str(row.get(self.id_column or "", ""))) or [-1])[-1])
            if number in missing:
                missing.remove(number)
                (document,) = documents_from([(f"{self.hub_id} {split}, {number}", row)], data)
                yield replace(document, id=f"pg{number}")
            if not missing:
                return
        some = ", ".join(map(str, sorted(missing)[:5]))
        raise UserError(f"{self.hub_id} {split} lacks {len(missing)} of the documents asked for: {some}.")

    def _by_size(self, rows: Iterable[Mapping[str, Any]], data: DataConfig, split: str) -> Iterator[Document]:
        size, wanted = 0, self.bytes[split]
        for number, row in enumerate(rows):
            for document in documents_from([(f"{self.hub_id} {split}, row {number}", row)], data):
                yield replace(document, id=f"{split}{number}")
                size += len(document.text.encode())
            if size >= wanted:
                return
        raise UserError(f"{self.hub_id} {split} has {size:,} bytes of such text, not {wanted:,}.")


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_rebuild(name: str) -> Rebuild:
    """Raises UserError for a set that nothing is known of."""
    if name not in names():
        there = f"choose one of {', '.join(names())}"
        raise UserError(f'There is no "{name}" to rebuild{suggest(name, names())}; {there}.')
    return Rebuild(**yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))


def rebuild(made: Rebuild, out: Path) -> list[Path]:
    """Writes the splits that are not there yet and returns their files; each appears whole or not at all."""
    paths = []
    for split in SPLITS:
        path = out / f"{split}.jsonl.xz"
        if not path.exists():
            rows = [{"id": d.id, "title": d.title, "text": d.text} for d in made.documents(split)]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            atomic_write(path, lzma.compress(text.encode()))
        paths.append(path)
    return paths


def _rows(hub_id: str, revision: str | None, split: str) -> Iterator[Mapping[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset(hub_id, split=split, revision=revision, streaming=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(
            f"cannot read {hub_id} from the hub: {reason}; add --dry-run to see what it needs."
        ) from error
