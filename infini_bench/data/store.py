"""Documents as tokens on disk: one flat file of ids for a set of documents, read through a memory map.

The folder's name is a hash of all it depends on, so a change of anything builds a new one beside the old.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from infini_bench.data.documents import Document, fingerprint, hash_texts
from infini_bench.data.tokenizers import Tokenizer
from infini_bench.errors import UserError
from infini_bench.files import atomic_folder, write_json
from infini_bench.schema import DataConfig

FORMAT = 1  # part of the name: raise it when the files change their meaning
_COLUMNS = ("ids", "titles", "n_tokens", "n_bytes", "n_words")


class TokenStore:
    """Tokenized documents.

    Attributes: ``ids`` and ``titles`` of the documents; ``n_tokens``, ``n_bytes`` (of the text in UTF-8) and
    ``n_words`` (split at white space), int64 of shape (documents,); ``eos_id``; ``fingerprint`` of it all.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder that ``token_store`` wrote. Raises ``UserError`` if it is not whole."""
        index = _checked_index(folder)
        self.ids: list[str] = index["ids"]
        self.titles: list[str] = index["titles"]
        self.n_tokens, self.n_bytes, self.n_words = (np.array(index[key], np.int64) for key in _COLUMNS[2:])
        self.eos_id: int = index["eos_id"]
        self.fingerprint = folder.name
        self._ends = np.cumsum(self.n_tokens)
        dtype = np.dtype(index["dtype"])
        self._tokens = np.memmap(folder / "tokens.bin", dtype, "r")

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, i: int) -> np.ndarray:
        """Ids of document ``i``: uint16 or uint32, shape (T,), read-only, read from disk when used."""
        end = int(self._ends[i])
        return self._tokens[end - int(self.n_tokens[i]) : end]

    @property
    def all_tokens(self) -> np.ndarray:
        """Ids of all documents end to end, (T,), likewise."""
        return self._tokens


def token_store(data: DataConfig, documents: list[Document], tokenizer: Tokenizer) -> TokenStore:
    """The tokens of ``documents``, from ``data.cache_dir/tokens`` or tokenized now.

    Raises ``UserError`` if the cache is damaged: it is named and nothing of it is used.
    """
    key = hash_texts([str(FORMAT), fingerprint(documents), tokenizer.fingerprint])[:16]
    folder = Path(data.cache_dir) / "tokens" / key
    if not folder.exists():
        with atomic_folder(folder) as temporary:
            _build(temporary, documents, tokenizer)
    return TokenStore(folder)


def _build(folder: Path, documents: list[Document], tokenizer: Tokenizer) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    n_tokens, checksum = [], 0
    with (folder / "tokens.bin").open("wb") as file:
        for ids in tokenizer.encode_all(document.text for document in documents):
            content = ids.astype(dtype).tobytes()
            checksum = zlib.crc32(content, checksum)
            file.write(content)
            n_tokens.append(len(ids))
    index = {
        "dtype": dtype.name,
        "eos_id": tokenizer.eos_id,
        "checksum": checksum,
        "ids": [document.id for document in documents],
        "titles": [document.title for document in documents],
        "n_tokens": n_tokens,
        "n_bytes": [len(document.text.encode()) for document in documents],
        "n_words": [len(document.text.split()) for document in documents],
    }
    write_json(folder / "index.json", index)


def _checked_index(folder: Path) -> dict[str, Any]:
    """The index, after the tokens were found to be those that it describes."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        size = sum(index["n_tokens"]) * np.dtype(index["dtype"]).itemsize
        rows = {len(index[key]) for key in _COLUMNS}
        expected, _ = index["checksum"], index["eos_id"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, f"its index is not whole: {error}") from error
    path = folder / "tokens.bin"
    found = path.stat().st_size if path.exists() else 0
    if len(rows) != 1 or found != size:
        raise _damaged(folder, f"its tokens take {found} bytes instead of {size}")
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    if checksum != expected:
        raise _damaged(folder, "its checksum is wrong")
    return index


def _damaged(folder: Path, reason: str) -> UserError:
    return UserError(f"the token cache {folder} is damaged ({reason}); delete that folder to build it again.")
