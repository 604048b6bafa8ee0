"""Documents from a data set in Parquet on the Hugging Face hub; loading scripts are never run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from infini_bench.data.documents import Document, Row, documents_from
from infini_bench.data.local import SPLIT_NAMES
from infini_bench.errors import UserError
from infini_bench.files import writing
from infini_bench.schema import DataConfig

log = logging.getLogger(__name__)


def load_hub(data: DataConfig, split: str) -> list[Document]:
    """Documents of one split of ``data.hub_id``, from the local copy that `datasets` keeps if there is one.

    Raises ``UserError`` if the hub cannot be reached or the set, its configuration or the split is missing.
    """
    import datasets

    if data.hub_id is None:
        raise UserError("data.source=hub needs data.hub_id=, for example data.hub_id=emozilla/pg19.")
    try:
        with writing(datasets.config.HF_DATASETS_CACHE):
            splits = datasets.load_dataset(data.hub_id, data.hub_config, revision=data.hub_revision)
    except (OSError, RuntimeError, ValueError) as error:
        # Not found, no network, gated (OSError); a loading script (RuntimeError); no such configuration.
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(
            f"cannot load {data.hub_id} from the hub: {reason}; offline, download its files elsewhere and "
            "pass data=local data.path=FOLDER with the same data.*_column."
        ) from error
    name = next((name for name in SPLIT_NAMES[split] if name in splits), None)
    if name is None:
        raise UserError(f"{data.hub_id} has no {split} split; it has: {', '.join(splits)}.")
    documents = documents_from(_rows(splits[name], data, name), data, data.max_documents)
    if not documents:
        raise UserError(f"no row of {data.hub_id} {name} passes data.filter={data.filter}.")
    return documents


def _rows(rows: Iterable[Mapping[str, Any]], data: DataConfig, name: str) -> Iterator[Row]:
    """Rows with text: nobody can mend somebody else's empty rows, so they are left out and counted."""
    empty = 0
    for number, row in enumerate(rows, 1):
        if data.text_column in row and not (row[data.text_column] or "").strip():
            empty += 1
        else:
            yield f"{data.hub_id} {name}, row {number}", row
    if empty:
        log.warning("%s %s: left out %d rows without text", data.hub_id, name, empty)
