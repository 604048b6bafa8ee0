"""The vocabulary of synthetic tasks: symbols without a spelling, behind a text tokenizer's ids if any."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import numpy as np

from infini_bench.data.documents import hash_texts
from infini_bench.data.tokenizers import Tokenizer
from infini_bench.errors import UserError
from infini_bench.files import read_json, write_json

SYMBOLS_FILE, TEXT_FOLDER = "symbols.json", "text"


class SymbolTokenizer(Tokenizer):
    """Ids ``first`` ... ``first + symbols - 1`` are symbols; below them are the ids of ``text``.

    So no text ever holds a symbol. Without ``text`` nothing can be encoded, and eos is one more id.
    """

    kind = "symbols"

    def __init__(self, symbols: int, text: Tokenizer | None = None) -> None:
        self.symbols, self.text = symbols, text
        self.first = text.vocab_size if text else 0
        self.eos_id = text.eos_id if text else symbols
        self.vocab_size = self.first + symbols + (text is None)
        self.name = f"{text.name}+{symbols}" if text else f"symbols-{symbols}"
        self.fingerprint = hash_texts(["symbols", str(symbols), text.fingerprint if text else ""])[:16]

    def encode(self, text: str) -> np.ndarray:
        if self.text is None:
            raise UserError(f"A model with the vocabulary {self.name} reads symbols, no text.")
        return self.text.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text as text, symbols as ``<0>``, ``<1>`` ...; eos gives nothing."""
        spelt = [
            self._spell(run, of_text) for of_text, run in groupby(map(int, ids), lambda i: i < self.first)
        ]
        return "".join(spelt)

    def _spell(self, run: Iterable[int], of_text: bool) -> str:
        if of_text and self.text:
            return self.text.decode(run)
        return "".join(f"<{i - self.first}>" for i in run if i != self.eos_id)

    def _save_files(self, folder: Path) -> None:
        write_json(folder / SYMBOLS_FILE, {"symbols": self.symbols, "text": self.text is not None})
        if self.text:
            self.text.save(folder / TEXT_FOLDER)

    @classmethod
    def read(cls, folder: Path) -> SymbolTokenizer:
        """The tokenizer that ``save`` wrote. Raises ``UserError`` if a file is missing or broken."""
        about = read_json(folder / SYMBOLS_FILE)
        return cls(about["symbols"], Tokenizer.load(folder / TEXT_FOLDER) if about["text"] else None)
