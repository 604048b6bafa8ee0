"""One door to all documents: ``load_documents``."""

from __future__ import annotations

from infini_bench.data.chronicles import load_chronicles
from infini_bench.data.documents import Document
from infini_bench.data.hub import load_hub
from infini_bench.data.local import load_local
from infini_bench.data.plays import load_plays
from infini_bench.errors import UserError
from infini_bench.schema import DataConfig
from infini_bench.units import suggest

SPLITS = ("train", "validation", "test")
SOURCES = ("embedded", "local", "hub")


def load_documents(data: DataConfig, split: str, pairs: bool = False) -> list[Document]:
    """Documents of one split, the first ``data.max_documents`` of them.

    Args:
        data: where they come from.
        split: train, validation or test.
        pairs: every document must have a summary. Embedded are then the chronicles, else the plays.

    Raises ``UserError`` for whatever is missing, empty or broken.
    """
    if split not in SPLITS:
        raise UserError(f'"{split}" is not a split{suggest(split, SPLITS)}; use {", ".join(SPLITS)}.')
    if pairs and data.source != "embedded" and data.summary_column is None:
        raise UserError(f"data={data.name} has no summaries; name their column with data.summary_column=.")
    if data.max_documents is not None and data.max_documents < 1:
        raise UserError(
            f"data.max_documents={data.max_documents} leaves nothing; use 1 or more, or leave it out."
        )
    documents = _load(data, split, pairs)[: data.max_documents]
    lacking = [document.id for document in documents if not document.summaries] if pairs else []
    if lacking:
        raise UserError(
            f"{len(lacking)} of {len(documents)} documents of data={data.name} ({split}) have no summary in "
            f'"{data.summary_column}", the first is {lacking[0]}; remove them or drop them with data.filter.'
        )
    return documents


def _load(data: DataConfig, split: str, pairs: bool) -> list[Document]:
    if data.source == "embedded":
        return load_chronicles(split) if pairs else load_plays(split)
    if data.source == "local":
        return load_local(data, split)
    if data.source == "hub":
        return load_hub(data, split)
    hint = suggest(data.source, SOURCES)
    raise UserError(f'data.source="{data.source}" is unknown{hint}; use {", ".join(SOURCES)}.')
