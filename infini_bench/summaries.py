"""Summaries beside the records, which name them: a compressed file of JSON lines, named by its hash.

A line has ``book``, ``condition``, ``length``, ``sample`` and, of a model's summary, ``seed`` (of
``numpy.random.default_rng``, unless greedy) and ``text``; of one made of the book's own sentences
``sentences``, their numbers from 0 as `infini_bench.metrics.rouge.split_sentences` cuts the book: texts of
others are not kept.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from infini_bench.errors import UserError
from infini_bench.files import atomic_write

FOLDER = "summaries"  # in the folder of records


def save_summaries(records: Path, lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Write the lines below the folder ``records``; returns what a record says of them."""
    texts = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    content = "".join(texts).encode()
    digest = hashlib.sha256(content).hexdigest()
    name = f"{FOLDER}/{digest[:16]}.jsonl.xz"
    atomic_write(records / name, lzma.compress(content))
    return {"file": name, "sha256": digest, "lines": len(texts)}


def read_summaries(records: Path, saved: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines that a record names. Raises UserError if they are missing or not those."""
    path = records / saved["file"]
    try:
        content = lzma.decompress(path.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise UserError(f"The summaries {path} cannot be read ({error}); restore the file.") from error
    if hashlib.sha256(content).hexdigest() != saved["sha256"]:
        raise UserError(f"The summaries {path} are not those of the record; restore the file.")
    return [json.loads(line) for line in content.decode().splitlines()]
