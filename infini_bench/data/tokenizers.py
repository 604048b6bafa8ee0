"""Tokenizers: raw bytes, a byte-level BPE trained here, or anything that `transformers` can load.

``encode`` adds nothing to the text. ``eos_id`` is one more id, which our own two never make out of a text.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infini_bench.data.documents import hash_texts
from infini_bench.errors import UserError
from infini_bench.files import atomic_folder, atomic_write, read_json, write_json
from infini_bench.schema import DataConfig
from infini_bench.units import suggest

if TYPE_CHECKING:
    import tokenizers
    import transformers

EOS = "<|eos|>"
KIND_FILE = "infini_tokenizer.json"  # beside the tokenizer's own files
PIECE = 4096  # characters; BPE of a long text is many times faster in pieces
BATCH = 2048  # pieces encoded side by side: bounds memory
TEXTS = 32  # whole ones, likewise
TRAINING_CHARACTERS = 256_000_000  # a BPE is trained on the texts up to this many, from the start
_CUT = re.compile(r"\S(?=\s)")


class Tokenizer(ABC):
    """Text to ids and back.

    ``load`` knows the subclass by its ``kind``.
    """

    kind: str
    name: str  # for tables
    vocab_size: int  # with eos
    eos_id: int
    fingerprint: str  # of all that changes an id

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``: int32, shape (T,)."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; eos gives nothing."""

    def encode_all(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """``encode`` of each text, one after the other in bounded memory."""
        return map(self.encode, texts)

    def save(self, folder: Path) -> None:
        """Write everything that ``load`` needs into ``folder``."""
        self._save_files(Path(folder))
        write_json(Path(folder) / KIND_FILE, {"kind": self.kind, "name": self.name})

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer saved in ``folder``. Raises ``UserError`` if it is missing or broken."""
        folder = Path(folder)
        about = read_json(folder / KIND_FILE)
        kind, name = (about.get("kind"), about.get("name")) if isinstance(about, dict) else (None, None)
        if kind == "bytes":
            return ByteTokenizer()
        if kind == "bpe":
            return BPETokenizer(_read_bpe(folder / "tokenizer.json"), str(name))
        if kind == "pretrained":
            return PretrainedTokenizer(_from_pretrained(str(folder)), str(name))
        if kind == "symbols":
            from infini_bench.data.symbols import SymbolTokenizer

            return SymbolTokenizer.read(folder)
        raise UserError(f"{folder / KIND_FILE} names no tokenizer that we know; restore it from a copy.")

    def _save_files(self, folder: Path) -> None:  # noqa: B027 - bytes have none
        """Write the tokenizer's own files."""


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and eos."""

    kind = name = "bytes"
    vocab_size, eos_id = 257, 256
    fingerprint = hashlib.sha256(b"bytes").hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        # Anything can be generated, so bytes that are no UTF-8 become the replacement character.
        return bytes(i for i in map(int, ids) if i < self.eos_id).decode("utf-8", errors="replace")


class BPETokenizer(Tokenizer):
    """Byte-level BPE in which every digit is a token of its own: a number is as long as its digits."""

    kind = "bpe"

    def __init__(self, backend: tokenizers.Tokenizer, name: str) -> None:
        backend.encode_special_tokens = True  # "<|eos|>" in a text is text; not kept in the file, so set here
        eos_id = backend.token_to_id(EOS)
        if eos_id is None:
            raise UserError(f"the tokenizer {name} has no {EOS} token; restore its folder from a copy.")
        self._backend, self.name, self.eos_id = backend, name, eos_id
        self.vocab_size = backend.get_vocab_size()
        self.fingerprint = hash_texts([backend.to_str()])[:16]

    def encode(self, text: str) -> np.ndarray:
        return next(self.encode_all([text]))

    def encode_all(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        for text in texts:
            pieces = _pieces(text)
            ids = [np.zeros(0, np.int32)]
            while batch := list(islice(pieces, BATCH)):
                encodings = self._backend.encode_batch_fast(batch, add_special_tokens=False)
                ids.extend(np.array(encoding.ids, np.int32) for encoding in encodings)
            yield np.concatenate(ids)

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([i for i in map(int, ids) if i != self.eos_id], skip_special_tokens=False)

    def _save_files(self, folder: Path) -> None:
        atomic_write(folder / "tokenizer.json", self._backend.to_str(pretty=True))


class PretrainedTokenizer(Tokenizer):
    """A tokenizer of the hub or of a local folder; text is encoded whole, as its makers meant it."""

    kind = "pretrained"

    def __init__(self, backend: transformers.PreTrainedTokenizerBase, name: str) -> None:
        if backend.eos_token_id is None:
            raise UserError(f'the tokenizer "{name}" has no end-of-text token; choose another one.')
        self._backend, self.name = backend, name
        self.vocab_size = len(backend)
        self.eos_id = int(backend.eos_token_id)
        if backend.is_fast:
            content = backend.backend_tokenizer.to_str()
        else:  # cannot be serialized as one thing, so its vocabulary stands for it
            content = json.dumps(sorted(backend.get_vocab().items()))
        self.fingerprint = hash_texts([type(backend).__name__, content])[:16]

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._backend.encode(text, add_special_tokens=False, verbose=False), np.int32)

    def encode_all(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        texts = iter(texts)
        while batch := list(islice(texts, TEXTS)):  # on all cores
            options = {"return_attention_mask": False, "verbose": False}
            found = self._backend(batch, add_special_tokens=False, **options)["input_ids"]
            yield from (np.array(ids, np.int32) for ids in found)

    def decode(self, ids: Iterable[int]) -> str:
        listed = [int(i) for i in ids]
        return str(self._backend.decode(listed, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _save_files(self, folder: Path) -> None:
        self._backend.save_pretrained(folder)


def build_tokenizer(data: DataConfig, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that ``data.tokenizer`` names: ``bytes``, ``bpe``, a local folder or a hub id.

    ``texts`` gives the texts of the train split, anew at each call, and is called for ``bpe`` only. What was
    trained is kept in ``data.cache_dir/tokenizers`` by the hash of texts and settings. Raises ``UserError``.
    """
    if data.tokenizer == "bytes":
        return ByteTokenizer()
    if data.tokenizer == "bpe":
        return _build_bpe(data, texts)
    if (Path(data.tokenizer) / KIND_FILE).exists():
        return Tokenizer.load(Path(data.tokenizer))
    return PretrainedTokenizer(_from_pretrained(data.tokenizer), data.tokenizer)


def _build_bpe(data: DataConfig, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    if data.vocab_size < 257:
        raise UserError(f"data.vocab_size={data.vocab_size} is too small: 256 bytes and eos make 257.")
    key = hash_texts(["bpe-1", str(data.vocab_size), hash_texts(_limited(texts()))])[:16]
    folder = Path(data.cache_dir) / "tokenizers" / key
    if not folder.exists():
        trained = BPETokenizer(_train_bpe(_limited(texts()), data.vocab_size), f"bpe-{data.vocab_size}")
        with atomic_folder(folder) as temporary:
            trained.save(temporary)
    return Tokenizer.load(folder)


def _train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _read_bpe(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    content = json.dumps(read_json(path))
    try:
        return Backend.from_str(content)
    except Exception as error:  # the library raises nothing more precise
        raise UserError(
            f"{path} is not a tokenizer ({error}); delete it, or restore it from a copy."
        ) from error


def _from_pretrained(name: str) -> Any:
    from transformers import AutoTokenizer

    gguf = {"gguf_file": Path(name).name} if name.endswith(".gguf") else {}
    try:
        return AutoTokenizer.from_pretrained(str(Path(name).parent) if gguf else name, **gguf)
    except (OSError, ValueError) as error:  # not found, no network; no tokenizer among the files
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f'cannot load the tokenizer "{name}"{suggest(name, ("bytes", "bpe"))}: {reason}; offline, pass '
            "data.tokenizer=bpe, bytes or the path of a folder that holds one."
        ) from error


def _pieces(text: str) -> Iterator[str]:
    """Cut ``text`` into pieces of about ``PIECE`` characters that encode to what the whole encodes to.

    Every run of white space starts a new word for the BPE, so a cut just before one changes nothing.
    """
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + PIECE)
        end = cut.end() if cut else len(text)
        yield text[start:end]
        start = end


def _limited(texts: Iterable[str]) -> Iterator[str]:
    left = TRAINING_CHARACTERS
    for text in texts:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text)
